"""Stores of a small shape on any library, through files and into batches, for random histories."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import library_of, ops_named
from kvc.files.cache import Entry, deflated, open_cache, write_cache
from kvc.files.header import CACHE, header_of
from kvc.methods import Method
from kvc.store.archive import Reader, Writer
from kvc.store.store import KVStore

Array = NDArray[np.float32]
LAYERS, HEADS, KV_HEADS, D = 4, 4, 2, 8
SCALE = D**-0.5


def to(library: str, x: Array) -> Any:
    """An array of a library."""
    return ops_named(library).from_numpy(np.ascontiguousarray(x))


def back(x: Any) -> Array:
    """An array as NumPy has it."""
    found: Array = ops_named(library_of(x)).to_numpy(x)
    return found


def step(store: KVStore, library: str, kv: Array, q: Array, pads: list[int] | None = None) -> Array:
    """Appends tokens to all layers, and attends in each as it comes, as a model does.

    Shapes: kv [2, LAYERS, B, KV_HEADS, L, D]; q, returns [LAYERS, B, HEADS, L, D].
    """
    out = []
    for layer in range(LAYERS):
        k, v = (to(library, x[layer]) for x in kv)
        store.append(layer, k, v, pads)
        out.append(back(store.attend(layer, to(library, q[layer]), SCALE)))
    return np.stack(out)


def through_a_file(
    store: KVStore, method: Method, target: str, path: Path, packed: bool
) -> KVStore:
    """The store of another library, or the same, that a file of this one gives."""
    source = library_of(store.arrays()[0])
    writer = Writer(store.length(), import_module(f"kvc.backends.{source}.saved"))
    store.exchange(writer)
    ids = np.zeros((writer.rows, writer.columns), "<i4")
    header = {
        **{key: str(x) for key, x in header_of(CACHE, "model", "").items()},
        "dtype": writer.dtype, "method": "{}", "kernels": "", "library": source,
        "state": json.dumps(writer.values),
    }  # fmt: skip
    codes = map(deflated, writer.codes) if packed else writer.codes
    write_cache(
        path, header, [Entry("tokens", "int32", ids.shape, lambda: ids), *codes, *writer.entries]
    )
    saved = import_module(f"kvc.backends.{target}.saved")
    like = import_module("torch").device("cpu") if target == "torch" else None
    with open_cache(path) as file:
        reader = Reader(file, lambda x, dtype: saved.array(x, dtype, like), mapped=False)
        new = KVStore(method, LAYERS, prefill=store.prefill, lone_tail=store.lone_tail)
        new.exchange(reader)
        reader.ids(0)
        reader.end()
    return new


def attention(q: Array, k: Array, v: Array) -> NDArray[np.float64]:
    """Of the newest queries over all tokens, causal among them, in float64.

    Shapes: q [HEADS, L, D]; k, v [KV_HEADS, T, D]; returns as q.
    """
    wide, (L, T) = np.float64, (q.shape[1], k.shape[1])
    keys, values = (np.repeat(x.astype(wide), HEADS // KV_HEADS, 0) for x in (k, v))
    s = SCALE * q.astype(wide) @ keys.swapaxes(1, 2)
    s[:, np.arange(T) > np.arange(T - L, T)[:, None]] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    found: NDArray[np.float64] = p / p.sum(-1, keepdims=True) @ values
    return found
