"""How far answers are from float64: the definitions over the same codes, and the exact tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, ops_of
from kvc.methods.part import Part
from kvc.ops.dispatch import mode
from kvc.store.store import KVStore
from kvc.store.unit import Query

Exact = NDArray[np.float64]


def wide(x: Any) -> Any:
    """A part of a store as NumPy's arrays, with every number that is not an integer in float64."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        found = ops_of(x).to_numpy(x)
        return found.astype(np.float64) if found.dtype.kind == "f" else np.array(found)
    if isinstance(x, tuple):
        return type(x)(*map(wide, x)) if hasattr(x, "_fields") else tuple(map(wide, x))
    if isinstance(x, list):
        return [wide(y) for y in x]
    if callable(x) and not isinstance(x, type):  # looks up learned maps
        return lambda *args: wide(x(*args))
    if dataclasses.is_dataclass(x) and not isinstance(x, Part | type):  # methods hold no arrays
        named = {f.name: wide(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return dataclasses.replace(x, **named)
    return x


def exact(q: Array, k: Array, v: Array, scale: float) -> Exact:
    """Softmax attention of the first row in float64. Shapes: q [B, Hq, 1, D]; k, v [B, H, T, D]."""
    (_, Hq, L, D), H = q.shape, k.shape[1]
    rows = (wide(x[:1])[0] for x in (q, k, v))
    query, keys, values = rows
    scores = query.reshape(H, Hq // H * L, D) @ keys.swapaxes(-1, -2) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    found: Exact = (p / p.sum(-1, keepdims=True) @ values).reshape(1, Hq, L, D)
    return found


def of_codes(store: KVStore, layer: int, q: Array, scale: float) -> Exact:
    """The definitions in float64 over what a store holds of a layer, in the first row."""
    dense = store.dense(layer)
    if dense is not None:
        return exact(q, *dense, scale)
    owner = store.owner(layer)
    slot = store._slot_of[owner]
    unit = wide(slot.units()[0][1].rows([0]))
    with mode("reference"):
        face = unit.faces[slot.layers.index(owner)]
        return np.asarray(face.attend(Query(wide(q[:1]), scale)).out, np.float64)


def error(got: Array, want: Exact) -> float:
    """The largest difference in the first row, over the largest entry."""
    return float(np.abs(wide(got[:1]) - want).max() / np.abs(want).max())
