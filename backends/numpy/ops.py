"""The array verbs of `kvc.backends.base.Ops` in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

name = "numpy"
word = np.uint32

abs, exp, log, sqrt, sin, cos, tanh = np.abs, np.exp, np.log, np.sqrt, np.sin, np.cos, np.tanh
arctan2, isfinite, where, maximum, minimum = (
    np.arctan2,
    np.isfinite,
    np.where,
    np.maximum,
    np.minimum,
)
round = np.rint
_erf = np.vectorize(math.erf, otypes=[np.float64])


def dtype(name: str) -> Any:
    return np.dtype(name)


def dtype_name(x: Array) -> str:
    return x.dtype.name


def itemsize(x: Array) -> int:
    return x.dtype.itemsize


def astype(x: Array, dtype: Any) -> Array:
    return x.astype(dtype)


def octets(words: Array) -> Array:
    """The bytes [..., 4 n] of words [..., n], the lowest first."""
    return words.astype("<u4", order="C", copy=False).view(np.uint8)


def promote(x: Array) -> Array:
    """To the type that sums are taken in: float64 stays, everything else becomes float32."""
    return x if x.dtype == np.float64 else x.astype(np.float32)


def from_numpy(x: Array, like: Array | None = None) -> Array:
    return x


def to_numpy(x: Array) -> Array:
    return x


def zeros(shape: Sequence[int], dtype: Any, like: Array) -> Array:
    return np.zeros(shape, dtype)


def arange(n: int, like: Array) -> Array:
    return np.arange(n, dtype=np.int32)


def concat(xs: Sequence[Array], axis: int) -> Array:
    return np.concatenate(xs, axis)


def stack(xs: Sequence[Array], axis: int) -> Array:
    return np.stack(xs, axis)


def copy(x: Array) -> Array:
    return x.copy()


def broadcast_to(x: Array, shape: Sequence[int]) -> Array:
    return np.broadcast_to(x, shape)


def take(x: Array, rows: Sequence[int], axis: int) -> Array:
    return np.take(x, np.asarray(rows), axis)


def take_along_axis(x: Array, index: Array, axis: int) -> Array:
    return np.take_along_axis(x, index, axis)


def put_along_axis(x: Array, index: Array, values: Array, axis: int) -> Array:
    x = x.copy()
    np.put_along_axis(x, index, values, axis)
    return x


def add_along_axis(x: Array, index: Array, values: Array, axis: int) -> Array:
    """`x` with `values` added at `index`, repeated indices included."""
    x, axis = x.copy(), axis % x.ndim
    grid = np.ogrid[tuple(slice(n) for n in index.shape)]
    np.add.at(x, tuple(index if i == axis else g for i, g in enumerate(grid)), values)
    return x


def top_k(x: Array, k: int) -> Array:
    """Indices of the `k` largest along the last axis, earlier index first among equals."""
    return argsort(-x, -1)[..., :k]


def argsort(x: Array, axis: int) -> Array:
    return np.argsort(x, axis, kind="stable").astype(np.int32)


def cumsum(x: Array, axis: int) -> Array:
    return np.cumsum(x, axis)


def min(x: Array, axis: int, keepdims: bool = False) -> Array:
    return np.min(x, axis, keepdims=keepdims)


def max(x: Array, axis: int, keepdims: bool = False) -> Array:
    return np.max(x, axis, keepdims=keepdims)


def sum(x: Array, axis: int, keepdims: bool = False) -> Array:
    return np.sum(x, axis, keepdims=keepdims)


def mean(x: Array, axis: int, keepdims: bool = False) -> Array:
    return np.mean(x, axis, keepdims=keepdims)


def gelu(x: Array) -> Array:
    return (0.5 * x * (1 + _erf(x * math.sqrt(0.5)))).astype(x.dtype)


def all(x: Array) -> Any:
    return np.all(x)


def write(buffer: Array, start: int | Array, x: Array, axis: int) -> Array:
    """`buffer` with `x` at `start` along `axis`; a new array, so inputs may be read-only."""
    buffer, start = buffer.copy(), np.asarray(start).item()
    np.moveaxis(buffer, axis, 0)[start : start + x.shape[axis]] = np.moveaxis(x, axis, 0)
    return buffer


def after(x: Array, done: Array) -> Array:
    """`x`; all is computed in the order it is written."""
    return x


def orthonormal(x: Array) -> Array:
    """The thin QR's Q of matrices [..., n, r], n >= r."""
    return np.linalg.qr(x)[0]


def quantized_matmul(
    x: Array, words: Array, step: Array, low: Array, size: int, bits: int
) -> Array | None:
    """None: NumPy has none for groups along the columns."""
    return None
