"""MLX's arrays as the numbers of a cache file, and back, and entries that are not ours."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from kvc.backends.mlx.entry import KVCEntry, library_entries
from kvc.errors import CacheFileError
from kvc.files.cache import Raw
from kvc.store.archive import FLOATS, Archive
from kvc.store.store import KVStore

MAPPED = False  # MLX copies: a map of the file would be in memory beside the copy


def raw(x: Any) -> Raw:
    """The numbers of an array, bfloat16 as uint16."""
    return np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def array(x: Raw, dtype: str, like: Any) -> Any:
    """An array of such numbers."""
    found = mx.array(x)
    return found.view(mx.bfloat16) if dtype == "bfloat16" else found


def key_dtype(model: Any) -> str:
    """The dtype of the model's keys and values: that of a token which is never computed."""
    entries = library_entries(model)
    model(mx.array([[0]]), cache=entries)
    keys = next(e.keys for e in entries if getattr(e, "keys", None) is not None)
    return str(keys.dtype).removeprefix("mlx.core.")


def place(model: Any) -> None:
    """Where its cache is: MLX has one memory."""


def store_of(cache: list[Any]) -> KVStore:
    """The store behind a prompt cache."""
    return next(entry.store for entry in cache if isinstance(entry, KVCEntry))


def exchange(archive: Archive, cache: list[Any]) -> None:
    """Writes what entries hold that are not the store's, or takes it from a file.

    Raises:
        CacheFileError: If an entry cannot be written, or a file has none like it.
    """
    for i, entry in enumerate(cache):
        ar, kind = archive.at(f"layers.{i}"), type(entry).__name__
        if isinstance(entry, KVCEntry):
            entry.offset = entry.store.length(entry.layer)
        elif kind == "RotatingKVCache" and entry.keep == 0:
            ar.kind("sliding_attention")
            _sliding(ar, entry)
        elif kind == "ChunkedKVCache":
            ar.kind("chunked_attention of mlx-lm")
            _chunked(ar, entry)
        elif kind == "ArraysCache" and entry.left_padding is None and entry.lengths is None:
            ar.kind("linear_attention of mlx-lm")
            for j, x in enumerate(entry.cache):
                if ar.has(f"state{j}", x):
                    entry[j] = ar.array(f"state{j}", x, FLOATS, None)
        else:
            raise CacheFileError(f"layer {i}: cannot keep a {kind} of mlx-lm in a file")
    # An array that is built in one thread cannot be evaluated in another.
    mx.eval([entry.state for entry in cache])


def _sliding(ar: Archive, entry: Any) -> None:
    """The newest tokens in order of time, one less than the window: the next one's own is in it."""
    size, T = entry.max_size, ar.columns
    n, found = min(T, size - 1), []
    for name in ("keys", "values"):
        x = None if ar.reading else entry._temporal_order(getattr(entry, name))[:, :, -n:]
        found.append(ar.array(f"{name[0]}.sliding", x, FLOATS, (ar.rows, None, n, None)))
    if not ar.reading:
        return
    if size <= T:  # a full ring, of which the oldest goes next
        found = [mx.concatenate([mx.zeros_like(x[:, :, :1]), x], 2) for x in found]
    entry.state = (*found, T, entry.keep, size, found[0].shape[2])


def _chunked(ar: Archive, entry: Any) -> None:
    """Tokens of the newest chunk, and where it starts."""
    start = ar.number("start", entry.start_position, 0, ar.columns)
    shape = (ar.rows, None, ar.columns - start, None)
    held = None if ar.reading else entry.keys_and_values()
    k, v = (ar.array(f"{z}.chunk", held and held[i], FLOATS, shape) for i, z in enumerate("kv"))
    if ar.reading:
        entry.state = (k, v, ar.columns, entry.chunk_size, start)
