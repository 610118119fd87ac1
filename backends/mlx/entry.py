"""mlx-lm's prompt cache over the store: one entry per layer, all entries over one store.

Layers that keep all their tokens are ours. Sliding and recurrent layers keep the library's entries.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, _BaseCache, create_attention_mask

from kvc.backends.mlx.attention import Handle
from kvc.errors import ConfigError
from kvc.methods import Method
from kvc.store.store import KVStore

if TYPE_CHECKING:
    from kvc.backends.mlx.rows import KVCRows


class KVCEntry(_BaseCache):
    """One layer of the store as mlx-lm sees it.

    mlx-lm calls `trim` and reads `state` and `nbytes` of every entry in turn, but they concern the
    whole store: the first layer's entry answers for all.

    Attributes:
        store: Where the tokens are.
        layer: The store's number of this layer.
        model_layer: The library's number of it: its place in the list of entries.
        kinds: What each of the model's layers keeps, in words.
        offset: How many tokens this layer has seen.
    """

    def __init__(
        self, store: KVStore, layer: int, model_layer: int, mode: str, *, trial: bool = False
    ) -> None:
        self.store, self.layer, self.model_layer = store, layer, model_layer
        self.mode, self.trial = mode, trial  # in a trial even uncompressed tokens take our way
        self.offset = store.length(layer)
        self.windowed = False
        self.kinds: tuple[str, ...] = ()
        self.new_shapes: tuple[Any, Any] = ((), ())
        self.dtype_bytes = 0

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Append to the store and return what attention reads: two handles or two arrays."""
        if self.layer == 0 and self.offset:
            # What attention has not read of the last step (running sums, new codes) would hold on
            # to that step's graph, and to the next one's, without end.
            mx.async_eval(self.store.arrays())
        self.new_shapes, self.dtype_bytes = (keys.shape, values.shape), keys.dtype.size
        self.store.append(self.layer, keys, values)
        self.offset += keys.shape[2]
        if self.mode == "handle":
            k, v = (Handle(self.store, self.layer, x, self.trial) for x in (keys, values))
            return k, v
        dense = None if self.trial else self.store.dense(self.layer)
        k, v = self.store.read(self.layer) if dense is None else dense
        return k.astype(keys.dtype), v.astype(values.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The library's mask for `N` new tokens: read while attention is still the library's."""
        self.windowed |= window_size is not None
        return create_attention_mask(N, self.offset, return_array, window_size)

    @property
    def state(self) -> Any:
        """The live arrays of the store, for `mx.eval`."""
        return self.store.arrays() if self.layer == 0 else []

    @state.setter
    def state(self, value: Any) -> None:
        raise ConfigError("kvc: mlx-lm cannot restore a compressed cache from a file")

    @property
    def nbytes(self) -> int:
        """Bytes of the store, counted once over all entries."""
        return int(self.store.nbytes) if self.layer == 0 else 0

    def size(self) -> int:
        """How many tokens this layer has seen."""
        return self.offset

    def empty(self) -> bool:
        """Whether this layer has seen no token."""
        return self.offset == 0

    def is_trimmable(self) -> bool:
        """Always; how far back it goes depends on what is compressed by then."""
        return True

    def trim(self, n: int) -> int:
        """Forget the newest `n` tokens.

        Raises:
            ConfigError: From the store, if some of them are compressed; nothing is changed then.
        """
        n = min(self.offset, n)
        if self.layer == 0 and self.offset:
            self.store.trim(n)
        self.offset -= n
        return n

    @classmethod
    def merge(cls, entries: Sequence[KVCEntry]) -> KVCRows:
        """One layer's entry of a batch whose rows go on from these, which stay as they are.

        Raises:
            ConfigError: If one of the caches is none of ours, or has several rows.
        """
        from kvc.backends.mlx.rows import KVCRows

        return KVCRows(entries)

    def to_quantized(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the cache is compressed already."""
        raise ConfigError("kvc: this cache is compressed already; leave out kv_bits")

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCEntry:
        # Entries copied together share one copy of the store.
        new = copy.copy(self)
        new.store = copy.deepcopy(self.store, memo)
        memo[id(self)] = new
        return new


def library_entries(model: Any) -> list[Any]:
    """The cache that mlx-lm itself makes, also where `model.make_cache` was set to ours."""
    make = getattr(type(model), "make_cache", None)
    return [KVCache() for _ in model.layers] if make is None else make(model)


def build(model: Any, method: Method, prefill: str, mode: str, *, trial: bool = False) -> list[Any]:
    """The library's entries with those of full-attention layers replaced by ours."""
    entries = library_entries(model)
    ours = [i for i, entry in enumerate(entries) if type(entry) is KVCache]
    if not ours:
        kinds = ", ".join(sorted({type(entry).__name__ for entry in entries}))
        raise ConfigError(
            f"kvc: no layer of this {name_of(model)} model has a plain KVCache (they have "
            f"{kinds}): there is nothing to compress"
        )
    # mlx-lm sends the last token of a prompt alone.
    store = KVStore(method, len(ours), prefill=prefill, lone_tail=True)
    # An array that is built in one thread cannot be evaluated in another.
    mx.eval(store.arrays())
    for layer, i in enumerate(ours):
        entries[i] = KVCEntry(store, layer, i, mode, trial=trial)
    return entries


def sharers(entries: Sequence[Any]) -> tuple[int, ...]:
    """The layers, by the library's numbers, that read another layer's tokens."""
    ours = [entry for entry in entries if isinstance(entry, KVCEntry)]
    return tuple(e.model_layer for e in ours if e.store.owner(e.layer) != e.layer)


def name_of(model: Any) -> str:
    """What messages call a model: its type in config.json, else its class."""
    return str(getattr(model, "model_type", None) or type(model).__name__)
