"""The array verbs of `kvc.backends.base.Ops` in MLX."""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

Array: TypeAlias = mx.array

name = "mlx"
word = mx.uint32

abs, exp, log, sqrt, sin, cos, tanh = mx.abs, mx.exp, mx.log, mx.sqrt, mx.sin, mx.cos, mx.tanh
arctan2, isfinite, round = mx.arctan2, mx.isfinite, mx.round
where, maximum, minimum = mx.where, mx.maximum, mx.minimum


def dtype(name: str) -> Any:
    return getattr(mx, name)


def dtype_name(x: Array) -> str:
    return str(x.dtype).removeprefix("mlx.core.")


def itemsize(x: Array) -> int:
    return int(x.itemsize)


def astype(x: Array, dtype: Any) -> Array:
    return x.astype(dtype)


def octets(words: Array) -> Array:
    """The bytes [..., 4 n] of words [..., n], the lowest first."""
    return words.view(mx.uint8)


def promote(x: Array) -> Array:
    """To the type that sums are taken in: float64 stays, everything else becomes float32."""
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


def from_numpy(x: np.ndarray[Any, Any], like: Array | None = None) -> Array:
    return mx.array(x)


def to_numpy(x: Array) -> np.ndarray[Any, Any]:
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def zeros(shape: Sequence[int], dtype: Any, like: Array) -> Array:
    return mx.zeros(tuple(shape), dtype)


def arange(n: int, like: Array) -> Array:
    return mx.arange(n, dtype=mx.int32)


def concat(xs: Sequence[Array], axis: int) -> Array:
    return mx.concatenate(list(xs), axis)


def stack(xs: Sequence[Array], axis: int) -> Array:
    return mx.stack(list(xs), axis)


def copy(x: Array) -> Array:
    return mx.contiguous(x + mx.array(0, x.dtype))  # a slice would keep its whole parent alive


def broadcast_to(x: Array, shape: Sequence[int]) -> Array:
    return mx.broadcast_to(x, tuple(shape))


def take(x: Array, rows: Sequence[int], axis: int) -> Array:
    return mx.take(x, mx.array(list(rows), dtype=mx.int32), axis)


def take_along_axis(x: Array, index: Array, axis: int) -> Array:
    # MLX broadcasts no axis here, NumPy and torch do
    shape = [builtins.max(a, b) for a, b in zip(x.shape, index.shape, strict=True)]
    at = axis % x.ndim
    x = mx.broadcast_to(x, [*shape[:at], x.shape[at], *shape[at + 1 :]])
    index = mx.broadcast_to(index, [*shape[:at], index.shape[at], *shape[at + 1 :]])
    return mx.take_along_axis(x, index, axis)


def put_along_axis(x: Array, index: Array, values: Array, axis: int) -> Array:
    return mx.put_along_axis(x, index, values, axis)


def add_along_axis(x: Array, index: Array, values: Array, axis: int) -> Array:
    """`x` with `values` added at `index`, repeated indices included."""
    axis %= x.ndim
    grid = [
        mx.arange(n).reshape([-1 if i == j else 1 for j in range(x.ndim)])
        for i, n in enumerate(index.shape)
    ]
    return x.at[tuple(index if i == axis else g for i, g in enumerate(grid))].add(values)


def top_k(x: Array, k: int) -> Array:
    """Indices of the `k` largest along the last axis, earlier index first among equals."""
    return argsort(-x, -1)[..., :k]


def argsort(x: Array, axis: int) -> Array:
    return mx.argsort(x, axis).astype(mx.int32)  # a stable merge sort on both of MLX's devices


def cumsum(x: Array, axis: int) -> Array:
    return mx.cumsum(x, axis)


def min(x: Array, axis: int, keepdims: bool = False) -> Array:
    return mx.min(x, axis, keepdims=keepdims)


def max(x: Array, axis: int, keepdims: bool = False) -> Array:
    return mx.max(x, axis, keepdims=keepdims)


def sum(x: Array, axis: int, keepdims: bool = False) -> Array:
    return mx.sum(x, axis, keepdims=keepdims)


def mean(x: Array, axis: int, keepdims: bool = False) -> Array:
    return mx.mean(x, axis, keepdims=keepdims)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5)))


def all(x: Array) -> Array:
    return mx.all(x)


def write(buffer: Array, start: int | Array, x: Array, axis: int) -> Array:
    """`buffer` with `x` at `start` along `axis`; MLX reuses the memory where it can."""
    at = start if isinstance(start, mx.array) else mx.array([start])
    return mx.slice_update(buffer, x.astype(buffer.dtype), at, [axis % buffer.ndim])


def after(x: Array, done: Array) -> Array:
    """`x`, not before `done` is computed, so that what both come from need not wait in memory."""
    return mx.depends([x], [done])[0]


def orthonormal(x: Array) -> Array:
    """The thin QR's Q of matrices [..., n, r], n >= r, by Gram-Schmidt twice over.

    MLX factorizes on the CPU alone, which would stall the GPU in every block. A column that depends
    on those before it becomes 0: rounding noise is all that is left of it, and where rows are equal
    the noise is so too, and lies in what the others span already.
    """
    columns: list[Array] = []
    peaks = mx.maximum(mx.max(mx.abs(x), -2, keepdims=True), mx.array(1e-30, x.dtype))
    x = x / peaks  # so that no square vanishes
    for i in range(x.shape[-1]):
        c = x[..., i : i + 1]
        for _ in range(2):
            for b in columns:
                c = c - b * mx.sum(b * c, -2, keepdims=True)
        norm = mx.sqrt(mx.sum(c * c, -2, keepdims=True))
        columns.append(mx.where(norm > 1e-5, c / mx.maximum(norm, 1e-5), 0))
    return mx.concatenate(columns, -1)


def quantized_matmul(
    x: Array, words: Array, step: Array, low: Array, size: int, bits: int
) -> Array | None:
    """`x` (step code + low), for groups of `size` that MLX knows; else None."""
    if size not in (32, 64, 128) or step.shape[-1] * size * bits != 32 * words.shape[-1]:
        return None
    return mx.quantized_matmul(x, words, step, low, False, size, bits)
