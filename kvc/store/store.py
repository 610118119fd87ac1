"""The cache of all layers: what adapters append to and attend over, on any backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from kvc.backends.base import Array, Shard, ops_of
from kvc.errors import ConfigError
from kvc.methods.base import Method
from kvc.methods.minicache import MiniCache
from kvc.ops.evict import Kernels
from kvc.store.archive import Archive, Reader
from kvc.store.evicting import Evicting
from kvc.store.pair import Pair
from kvc.store.report import Report, measure
from kvc.store.slot import Slot, Whole
from kvc.store.state import walk_prompt, walk_sizes, walk_slot
from kvc.store.tokens import Series, Tokens
from kvc.store.unit import Query, Unit
from kvc.store.watch import Watch

Prefill = Literal["exact", "stream"]


class KVStore:
    """Keys and values [B, n_kv_heads, T, head_dim] of all layers, compressed by a method.

    Compression is lazy: an append first compresses what earlier steps have left due, so that every
    reader of a step sees its exact tokens. With `prefill="exact"` the prompt stays dense until the
    first token after it; with `"stream"` each piece of it is compressed when the next one comes.

    Args:
        method: what is compressed, and how.
        n_layers: layers that have a cache here.
        prefill: `exact` or `stream`.
        lone_tail: whether the library sends a prompt's last token by itself, as mlx-lm does; such
            a token still belongs to the prompt.

    Raises:
        ConfigError: if `prefill` is neither, or the method does not fit so many layers.
        ArtifactError: if the method's learned maps cannot be read.
    """

    def __init__(
        self, method: Method, n_layers: int, *, prefill: str = "exact", lone_tail: bool = False
    ) -> None:
        if prefill not in get_args(Prefill):
            raise ConfigError(f"prefill: expected exact or stream, got {prefill!r}")
        self.method, self.prefill, self.lone_tail = method, prefill, lone_tail
        self._owners = method.owners(n_layers)
        self._pairs = method.pairs(n_layers)
        self._numbers = method.numbers or range(n_layers)
        files = method.memory.maps(self._numbers) if method.memory else {}
        self._files = {layer: _own(maps, method.shard) for layer, maps in files.items()}
        self._maps: dict[int, Kernels] = {}  # the same in the library of the tokens
        self._prompting = False
        self.changes = 0  # grows with everything but `advance`
        # told of every layer's queries as they come, for what is learned from them
        self.listener: Callable[[Query], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets every token."""
        self.changes += 1
        paired = {layer for pair in self._pairs for layer in pair}
        alone = ((layer,) for layer in sorted(set(self._owners) - paired))
        self._slots = [self._slot(layers) for layers in (*self._pairs, *alone)]
        self._slot_of = {layer: slot for slot in self._slots for layer in slot.layers}
        self._lengths = [0] * len(self._owners)
        self._token_bytes = [0] * len(self._owners)  # of one token of all rows, dense

    def __deepcopy__(self, memo: dict[int, Any]) -> KVStore:
        """The same tokens in a store of its own; what never changes is shared."""
        memo |= {id(x): x for x in (self.method, self._files, self._maps)}
        new = memo[id(self)] = copy.copy(self)
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def _slot(self, layers: tuple[int, ...]) -> Slot:
        # What a slot starts with is not the store: copies of the slot would keep its tokens alive.
        method, first, maps = self.method, layers[0], self._maps.get
        shard = method.shard
        codec = method.codec and method.codec.of(self._numbers[first])

        def start(wholes: list[Whole], score: Array | None, watch: Watch) -> Unit:
            k, v = wholes[0]
            if method.memory:
                tokens = (k.tokens(), v.tokens())
                return Evicting.of(method.memory, codec, first, maps, *tokens, score, watch, shard)
            if len(wholes) == 1:
                return Tokens(Series(k), Series(v), codec, first, shard=shard)
            a, b = (Tokens(Series(k), Series(v)) for k, v in wholes)
            assert isinstance(method.layout, MiniCache)
            return Pair(method.layout, codec, first, (a, b), shard=shard)

        return Slot(layers, start, method.memory.policy if method.memory else "")

    def owner(self, layer: int) -> int:
        """The layer whose cache `layer` reads: itself, unless the method shares layers."""
        return self._owners[layer]

    def length(self, layer: int = 0) -> int:
        """Columns appended so far, padding included."""
        return self._lengths[layer]

    def append(self, layer: int, k: Array, v: Array, pads: Sequence[int] | None = None) -> None:
        """Adds tokens [B, n_kv_heads, L, D]; `pads` counts the padding in front of each row.

        Raises:
            ShapeError: if the tokens do not fit those before.
            ConfigError: if the method's groups do not fit the head dimension.
            KVCError: if a prompt that is compressed now holds NaN or infinity.
        """
        self.changes += 1
        if not self._lengths[layer]:
            self._begin(layer, k)
        self._lengths[layer] += k.shape[2]
        if self._owners[layer] != layer:
            return
        slot = self._slot_of[layer]
        if layer == slot.layers[0]:
            self._settle(slot, k.shape[2])
            slot.last = k.shape[2]
        slot.append(layer, k, v, pads)

    def _begin(self, layer: int, k: Array) -> None:
        """What is known from the first tokens on: sizes, and the library of the arrays."""
        self._token_bytes[layer] = 2 * k.nbytes // k.shape[2]
        if self.method.codec:
            self.method.codec.check(k.shape[3])
        if layer in self._files and layer not in self._maps:
            xp = ops_of(k)
            self._maps[layer] = Kernels(*(xp.from_numpy(x, k) for x in self._files[layer]))

    @contextmanager
    def prompting(self) -> Iterator[None]:
        """Meanwhile what comes after a prompt's pieces is one more of them, a lone token too."""
        self._prompting = True
        try:
            yield
        finally:
            self._prompting = False

    def settle(self) -> None:
        """Compresses what is due before one more token, as its append would."""
        self.changes += 1
        for slot in self._slots:
            self._settle(slot, 1)

    def _settle(self, slot: Slot, coming: int) -> None:
        """Compresses what is due before `coming` tokens are added."""
        if not slot.last or not self.method.parts:
            return
        if slot.in_prompt:
            tail = self.lone_tail and coming == 1 and slot.last > 1
            more = coming > 1 or self._prompting
            if tail or (more and self.prefill == "exact"):
                return
            slot.in_prompt = more
        slot.settle(slot.prompt_due)
        slot.prompt_due = slot.in_prompt

    def dense(self, layer: int) -> tuple[Array, Array] | None:
        """All tokens as they came, padding included, or None once some are compressed."""
        owner = self._owners[layer]
        whole = self._slot_of[owner].whole.get(owner)
        return (whole[0].tokens(), whole[1].tokens()) if whole else None

    def observe(
        self,
        layer: int,
        q: Array,
        scale: float,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> None:
        """Takes note of queries that the library attended for itself; eviction asks for them."""
        query = self._heard(Query(q, scale, softcap, sinks, layer))
        self._slot_of[self._owners[layer]].observe(query)

    def attend(
        self,
        layer: int,
        q: Array,
        scale: float,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> Array:
        """Attention of queries [B, n_heads, L, D] over all tokens, causal among the newest L.

        `sinks` [n_heads] are logits that take part in the softmax and carry no value.
        """
        owner = self._owners[layer]
        query = self._heard(Query(q, scale, softcap, sinks, layer))
        return self._slot_of[owner].attend(owner, query)

    def _heard(self, query: Query) -> Query:
        if self.listener:
            self.listener(query)
        return query

    def read(self, layer: int) -> tuple[Array, Array]:
        """K and V [B, n_kv_heads, T, D] as attention sees them; padding reads as zeros.

        Raises:
            ConfigError: if the method evicts tokens, so that there are no T of them.
        """
        owner = self._owners[layer]
        return self._slot_of[owner].read(owner, self._lengths[layer])

    def trim(self, n: int) -> None:
        """Forgets the newest `n` tokens of every row.

        Raises:
            ConfigError: if some of them are compressed for good; nothing is changed then.
        """
        held = min((slot.held for slot in self._slots if slot.last), default=0)
        if n > held and n < max(self._lengths):
            codec, memory = self.method.codec, self.method.memory
            may = codec and not memory and codec.value_window == "chunk"
            mend = f"; gear.window={n} keeps enough" if may else ""
            raise ConfigError(
                f"trim: expected at most {held} tokens, as many as are not compressed, got "
                f"{n}{mend}"
            )
        if n >= max(self._lengths):
            self.reset()
            return
        self.changes += 1
        for slot in self._slots:
            slot.trim(n)
        self._lengths = [length - n for length in self._lengths]

    def reorder(self, rows: Iterable[int]) -> None:
        """Makes row i of the batch a copy of row `rows[i]`, as beam search does."""
        self.changes += 1
        rows = [int(row) for row in rows]
        for slot in self._slots:
            slot.reorder(rows)

    def units(self) -> list[Unit]:
        """The caches of all layers' rows, once they are compressed; none before."""
        if any(slot.whole for slot in self._slots):
            return []
        return [unit for slot in self._slots for _, unit in slot.groups]

    def advance(self) -> None:
        """Counts a token of every row that a recorded step has written."""
        self._lengths = [length + 1 for length in self._lengths]
        for slot in self._slots:
            slot.last = 1
        for unit in self.units():
            assert isinstance(unit, Tokens)
            unit.advance()

    def arrays(self) -> list[Array]:
        """Every array that the store holds."""
        return [x for slot in self._slots for _, (_, x, _) in slot.parts()]

    @property
    def nbytes(self) -> int:
        """Bytes of every array that the store holds, room in buffers included."""
        return sum(x.nbytes for x in self.arrays())

    def exchange(self, archive: Archive) -> None:
        """Writes all that it holds to an archive, or takes on, being empty, what one holds.

        Raises:
            CacheFileError: if a file does not hold the state of such a store.
        """
        names = [f"layers.{number}" for number in self._numbers]
        sizes = walk_sizes(archive, self._slots, names)
        if isinstance(archive, Reader):
            for layer, owner in enumerate(self._owners):
                self._begin(layer, archive.token(*sizes[owner]))
        kept = int(self.method.memory.heavy) if self.method.memory else 0
        slots = [walk_slot(archive, slot, names, sizes, kept) for slot in self._slots]
        prompt = walk_prompt(archive, self.prefill, self.lone_tail, slots)
        if isinstance(archive, Reader):
            self.changes += 1
            self._slots, (self.prefill, self.lone_tail) = slots, prompt
            self._slot_of = {layer: slot for slot in slots for layer in slot.layers}
            self._lengths = [archive.columns] * len(self._owners)

    def report(self) -> Report:
        """Bytes by part and by layer, and the dense cache's."""
        dense = sum(b * n for b, n in zip(self._token_bytes, self._lengths, strict=True))
        return measure(self._slots, len(self._owners), dense)


def _own(maps: Kernels, shard: Shard) -> Kernels:
    """The learned maps of a process's heads."""
    return Kernels(*(shard.own(x, 0) for x in maps))
