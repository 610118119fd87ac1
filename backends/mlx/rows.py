"""mlx-lm's batch protocol over stores of one row each.

Its batch generator merges the caches of sequences, prepares them for prompts of unequal lengths
(padded on the right), filters and extends the batch as sequences leave and join, and extracts what
one sequence has left. `KVCRows` is a layer's entry of such a batch: all that is a list of stores.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache, create_attention_mask, create_causal_mask

from kvc.backends.mlx.attention import RowsHandle
from kvc.backends.mlx.entry import KVCEntry
from kvc.errors import ConfigError
from kvc.store.batch import append_rows, read_rows
from kvc.store.store import KVStore

# Copies of stores that were made last, by the first of those. mlx-lm merges and extracts a cache
# entry by entry, the first layer's first, and all entries of a sequence must be over one copy.
_Refs = list[weakref.ref[KVStore]]
_copies: weakref.WeakKeyDictionary[KVStore, tuple[_Refs, _Refs]] = weakref.WeakKeyDictionary()


def _copied(stores: Sequence[KVStore], layer: int) -> list[KVStore]:
    """Copies of stores: new ones for the first layer, the same ones for those behind it.

    MLX never writes into an array that two hold: a copy takes no memory until it changes.
    """
    refs = [weakref.ref(store) for store in stores]
    known = _copies.get(stores[0])
    if layer and known and known[0] == refs:
        found = [store for ref in known[1] if (store := ref())]
        if [x.length(layer) for x in found] == [x.length(layer) for x in stores]:
            return found
    made = [copy.deepcopy(store) for store in stores]
    _copies[stores[0]] = refs, [weakref.ref(store) for store in made]
    return made


class KVCRows(_BaseCache):
    """One layer of the stores of a batch's rows.

    As with single entries, the first layer's answers for `state` and `nbytes` of all.

    Attributes:
        stores: Of each row.
        kinds: What each of the model's layers keeps, in words, of each row.
    """

    def __init__(self, entries: Sequence[KVCEntry]) -> None:
        for entry in entries:
            if not isinstance(entry, KVCEntry):
                raise ConfigError(
                    f"kvc: expected a cache from kvc.make_cache for every sequence of the batch, "
                    f"got a {type(entry).__name__}"
                )
            if entry.new_shapes[0][:1] not in ((), (1,)):
                raise ConfigError(
                    f"kvc: expected caches of one row to make a batch of, got one of "
                    f"{entry.new_shapes[0][0]}; give each sequence a cache of its own"
                )
        first = entries[0]
        self.layer, self.model_layer, self.mode = first.layer, first.model_layer, first.mode
        # caches that come with a prompt in them stay as they are
        self.stores = _copied([entry.store for entry in entries], self.layer)
        self.kinds = [entry.kinds for entry in entries]
        self._left: list[int] | None = None  # tokens of padded prompts that are still to come

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [store.length(self.layer) for store in self.stores]

    @property
    def offset(self) -> Any:
        """The same as an array [B], for RoPE."""
        return mx.array(self.lengths)

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Append to the stores and return what attention reads: two handles or two arrays."""
        lengths, new = self.lengths, keys.shape[2]
        if self.layer == 0 and any(lengths):
            mx.async_eval(self.state)  # as a single entry does
        counts = [new] * len(lengths)
        if self._left is not None:
            counts = [min(new, left) for left in self._left]
            self._left = [left - n for left, n in zip(self._left, counts, strict=True)]
        append_rows(self.stores, self.layer, keys, values, counts)
        if self.mode == "handle":
            columns = max(lengths) + new
            stores = tuple(self.stores)
            k, v = (RowsHandle(stores, self.layer, x, counts, columns) for x in (keys, values))
            return k, v
        k, v = read_rows(self.stores, self.layer, new, counts)
        return k.astype(keys.dtype), v.astype(values.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The library's mask for `N` new columns; rows behind handles do not read it."""
        lengths = self.lengths
        longest = max(lengths)
        if min(lengths) == longest:
            return create_attention_mask(N, longest, return_array, window_size)
        left = mx.array([longest - n for n in lengths])
        return create_causal_mask(N, longest, window_size, left_padding=left)

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """What comes until `finalize` has `lengths[i]` tokens in row i, and then padding.

        Raises:
            ConfigError: If there is padding on the left, which mlx-lm's generator never asks for.
        """
        if left_padding is not None and any(left_padding):
            raise ConfigError("kvc: expected prompts of a batch padded on the right, not the left")
        if lengths is not None and right_padding is not None and any(right_padding):
            self._left = [int(n) for n in lengths]

    def finalize(self) -> None:
        """The padded prompts are over; their padding was dropped as it came."""
        self._left = None

    def filter(self, batch_indices: Any) -> None:
        """Keep the rows with these indices, in their order."""
        rows = _numbers(batch_indices)
        self.stores = [self.stores[row] for row in rows]
        self.kinds = [self.kinds[row] for row in rows]
        self._left = self._left and [self._left[row] for row in rows]

    def extend(self, other: KVCRows) -> None:
        """Add the rows of another batch behind these."""
        self.stores = [*self.stores, *other.stores]
        self.kinds = [*self.kinds, *other.kinds]

    def extract(self, idx: int) -> KVCEntry:
        """A copy of one row, as a cache of its own that generates on."""
        (store,) = _copied([self.stores[idx]], self.layer)
        entry = KVCEntry(store, self.layer, self.model_layer, self.mode)
        entry.kinds = self.kinds[idx]
        return entry

    @property
    def state(self) -> Any:
        """The live arrays of all rows, for `mx.eval`."""
        return [x for store in self.stores for x in store.arrays()] if self.layer == 0 else []

    @state.setter
    def state(self, value: Any) -> None:
        raise ConfigError("kvc: mlx-lm cannot restore a compressed cache from a file")

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, counted once over all entries."""
        return sum(store.nbytes for store in self.stores) if self.layer == 0 else 0

    def size(self) -> int:
        """How many tokens the longest row has."""
        return max(self.lengths, default=0)

    def empty(self) -> bool:
        """Whether no row has a token."""
        return not any(self.lengths)


def _numbers(rows: Any) -> Iterable[int]:
    return rows.tolist() if isinstance(rows, mx.array) else rows
