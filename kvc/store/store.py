"""The cache of all layers: what adapters append to and attend over, on any backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from kvc.backends.base import Array, ops_of
from kvc.errors import ConfigError, ShapeError
from kvc.methods.base import Method
from kvc.ops.attention import Partial, join
from kvc.store.segments import Tokens, Window

Prefill = Literal["exact", "stream"]


@dataclass(frozen=True, slots=True)
class Report:
    """Bytes of a cache; `ratio` is the dense cache's over its own."""

    nbytes: int
    dense_bytes: int
    ratio: float
    parts: dict[str, int]  # codes, scales, low rank, outliers, window; slack is room in buffers
    layers: list[int]  # bytes by layer; 0 for a layer that reads another's


@dataclass(slots=True)
class Slot:
    """One layer's cache: tokens as they came, until a first block is coded; then groups of rows.

    While nothing is coded, `whole` holds padding and all, so that the library's own attention can
    run on it. Groups hold rows of one length, their padding dropped.
    """

    whole: Window | None = None
    pads: list[int] = field(default_factory=list)  # columns of padding in front of each row
    groups: list[tuple[list[int], Tokens]] = field(default_factory=list)
    last: int = 0  # tokens of the newest append
    in_prompt: bool = True
    prompt_due: bool = True  # the prompt is not coded yet

    def split(self) -> list[tuple[list[int], Tokens]]:
        """The groups of rows, made of `whole` where there are none yet."""
        if self.whole is None:
            return self.groups
        by_pad: dict[int, list[int]] = {}
        for row, pad in enumerate(self.pads):
            by_pad.setdefault(pad, []).append(row)
        if by_pad.keys() == {0}:
            return [(by_pad[0], Tokens(self.whole))]
        return [(rows, Tokens(self.whole.rows(rows, pad))) for pad, rows in by_pad.items()]


def _rows(x: Array, rows: list[int]) -> Array:
    return x if rows == list(range(x.shape[0])) else ops_of(x).take(x, rows, 0)


def _in_order(pieces: Sequence[tuple[list[int], Array]]) -> Array:
    """Rows of several groups, back in the order of the batch."""
    if len(pieces) == 1:
        return pieces[0][1]
    xp = ops_of(pieces[0][1])
    order = [row for rows, _ in pieces for row in rows]
    places = sorted(range(len(order)), key=order.__getitem__)
    return xp.take(xp.concat([x for _, x in pieces], 0), places, 0)


class KVStore:
    """Keys and values [B, n_kv_heads, T, head_dim] of all layers, compressed by a method.

    Compression is lazy: an append first codes what earlier steps have left due, so that every
    reader of a step sees its exact tokens. With `prefill="exact"` the prompt stays dense until the
    first token after it; with `"stream"` each piece of it is coded when the next one comes.

    Args:
        method: what is compressed, and how.
        n_layers: layers that have a cache here.
        prefill: `exact` or `stream`.
        lone_tail: whether the library sends a prompt's last token by itself, as mlx-lm does; such
            a token still belongs to the prompt.

    Raises:
        ConfigError: if `prefill` is neither, or the method does not fit so many layers.
    """

    def __init__(
        self, method: Method, n_layers: int, *, prefill: str = "exact", lone_tail: bool = False
    ) -> None:
        if prefill not in get_args(Prefill):
            raise ConfigError(f"prefill: expected exact or stream, got {prefill!r}")
        self.method, self.prefill, self.lone_tail = method, prefill, lone_tail
        self._owners = method.owners(n_layers)
        self.reset()

    def reset(self) -> None:
        """Forgets every token."""
        self._slots = {layer: Slot() for layer in set(self._owners)}
        self._lengths = [0] * len(self._owners)

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
            KVCError: if older tokens that are coded now hold NaN or infinity.
        """
        self._lengths[layer] += k.shape[2]
        if self._owners[layer] != layer:
            return
        slot, codec = self._slots[layer], self.method.codec
        if codec and not slot.last:
            codec.check(k.shape[3])
        self._settle(layer, slot, k.shape[2])
        slot.last = k.shape[2]
        if slot.whole is None and not slot.groups:
            slot.whole, slot.pads = Window(k, v, k.shape[2]), list(pads or [0] * k.shape[0])
            return
        if slot.whole is not None:
            held = slot.whole.k
            if held.shape[:2] != k.shape[:2] or held.shape[3] != k.shape[3]:
                raise ShapeError(
                    f"layer {layer}: expected tokens like {tuple(held.shape)}, got {tuple(k.shape)}"
                )
            for row, pad in enumerate(pads or ()):
                slot.pads[row] += pad if slot.pads[row] == slot.whole.n else 0
            slot.whole.append(k, v)
            return
        for rows, tokens in slot.groups:
            tokens.window.append(_rows(k, rows), _rows(v, rows))

    def _settle(self, layer: int, slot: Slot, coming: int) -> None:
        """Codes what is due before `coming` tokens are added."""
        if not slot.last or self.method.codec is None:
            return
        if slot.in_prompt:
            tail = self.lone_tail and coming == 1 and slot.last > 1
            if tail or (coming > 1 and self.prefill == "exact"):
                return
            slot.in_prompt = coming > 1
        groups = slot.split()
        for _, tokens in groups:
            tokens.settle(self.method.codec, layer, slot.prompt_due)
        slot.prompt_due = slot.in_prompt
        if any(tokens.blocks for _, tokens in groups):
            slot.groups, slot.whole = groups, None

    def dense(self, layer: int) -> tuple[Array, Array] | None:
        """All tokens as they came, padding included, or None once some are compressed."""
        slot = self._slots[self._owners[layer]]
        return slot.whole.tokens() if slot.whole else None

    def observe(self, layer: int, q: Array, scale: float) -> None:
        """Takes note of queries that the library attended for itself; no codec needs them."""

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
        pieces = []
        for rows, tokens in self._slots[self._owners[layer]].split():
            answer = tokens.attend(_rows(q, rows), scale, softcap)
            if sinks is not None:
                xp = ops_of(q)
                lse = xp.astype(sinks, answer.lse.dtype).reshape(1, -1, 1) + answer.lse * 0
                answer = join([answer, Partial(answer.out * 0, lse)])
            pieces.append((rows, answer.out))
        return ops_of(q).astype(_in_order(pieces), q.dtype)

    def read(self, layer: int) -> tuple[Array, Array]:
        """K and V [B, n_kv_heads, T, D] as attention sees them; padding reads as zeros."""
        n = self._lengths[layer]
        ks, vs = [], []
        for rows, tokens in self._slots[self._owners[layer]].split():
            k, v = tokens.read()
            xp = ops_of(k)
            pad = xp.zeros((*k.shape[:2], n - k.shape[2], k.shape[3]), k.dtype, k)
            ks.append((rows, xp.concat([pad, k], 2)))
            vs.append((rows, xp.concat([pad, v], 2)))
        return _in_order(ks), _in_order(vs)

    def trim(self, n: int) -> None:
        """Forgets the newest `n` tokens of every row.

        Raises:
            ConfigError: if some of them are coded; a larger `window` keeps more as they came.
        """
        windows = [w for slot in self._slots.values() for w in _windows(slot)]
        held = min((w.n for w in windows), default=0)
        if n > held:
            raise ConfigError(
                f"trim: expected at most {held} tokens, as many as are not coded, got {n}; "
                f"gear.window={n} keeps enough"
            )
        for window in windows:
            window.n -= n
        for slot in self._slots.values():
            slot.in_prompt = False
            if slot.whole is not None and slot.whole.n == 0:
                slot.whole, slot.last, slot.in_prompt = None, 0, True
        self._lengths = [length - n for length in self._lengths]

    def reorder(self, rows: Iterable[int]) -> None:
        """Makes row i of the batch a copy of row `rows[i]`, as beam search does."""
        rows = [int(row) for row in rows]
        for slot in self._slots.values():
            if slot.whole is not None:
                slot.whole = slot.whole.rows(rows)
                slot.pads = [slot.pads[row] for row in rows]
            groups = []
            for held, tokens in slot.groups:
                places = [i for i, row in enumerate(rows) if row in held]
                if places:
                    groups.append((places, tokens.rows([held.index(rows[i]) for i in places])))
            slot.groups = groups

    def arrays(self) -> list[Array]:
        """Every array that the store holds."""
        return [x for slot in self._slots.values() for _, x in _parts(slot)]

    @property
    def nbytes(self) -> int:
        """Bytes of every array that the store holds, room in buffers included."""
        return sum(x.nbytes for x in self.arrays())

    def report(self) -> Report:
        """Bytes by part and by layer, and the dense cache's."""
        parts: Counter[str] = Counter()
        layers, dense = [0] * len(self._owners), 0
        for layer, slot in self._slots.items():
            for name, x in _parts(slot):
                parts[name] += x.nbytes
                layers[layer] += x.nbytes
            for window in _windows(slot):
                slack = 2 * window.k.nbytes // window.k.shape[2] * (window.k.shape[2] - window.n)
                parts["window"] -= slack
                parts["slack"] += slack
            batch = sum(w.k.shape[0] for w in _windows(slot))
            for x in [w.k for w in _windows(slot)][:1]:
                token = 2 * x.nbytes // (x.shape[0] * x.shape[2])
                dense += token * batch * self._lengths[layer] * self._owners.count(layer)
        total = sum(layers)
        ratio = dense / total if total else 1.0
        return Report(total, dense, ratio, {k: v for k, v in parts.items() if v}, layers)


def _windows(slot: Slot) -> list[Window]:
    return [slot.whole] if slot.whole else [tokens.window for _, tokens in slot.groups]


def _parts(slot: Slot) -> Iterator[tuple[str, Array]]:
    if slot.whole:
        yield from (("window", slot.whole.k), ("window", slot.whole.v))
    for _, tokens in slot.groups:
        yield from tokens.parts()
