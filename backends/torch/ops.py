"""The array verbs of `kvc.backends.base.Ops` in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = torch.Tensor

name = "torch"
word = torch.int32  # torch cannot shift uint32; the sign bit is masked away after a shift

abs, exp, log, sqrt, sin, cos, tanh = (
    torch.abs, torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos, torch.tanh,
)  # fmt: skip
arctan2, isfinite, round = torch.arctan2, torch.isfinite, torch.round
gelu = torch.nn.functional.gelu  # by erf


def dtype(name: str) -> Any:
    return getattr(torch, name)


def dtype_name(x: Array) -> str:
    return str(x.dtype).removeprefix("torch.")


def itemsize(x: Array) -> int:
    return x.element_size()


def astype(x: Array, dtype: Any) -> Array:
    return x.to(dtype)


def octets(words: Array) -> Array:
    """The bytes [..., 4 n] of words [..., n], the lowest first."""
    return words.contiguous().view(torch.uint8)


def promote(x: Array) -> Array:
    """To the type that sums are taken in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def from_numpy(x: np.ndarray[Any, Any], like: Array | None = None) -> Array:
    tensor = torch.from_numpy(np.array(x.view(np.int32) if x.dtype == np.uint32 else x))
    return tensor if like is None else tensor.to(like.device)


def to_numpy(x: Array) -> np.ndarray[Any, Any]:
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def zeros(shape: Sequence[int], dtype: Any, like: Array) -> Array:
    return torch.zeros(tuple(shape), dtype=dtype, device=like.device)


def arange(n: int, like: Array) -> Array:
    return torch.arange(n, dtype=torch.int32, device=like.device)


def concat(xs: Sequence[Array], axis: int) -> Array:
    return torch.cat(list(xs), axis)


def stack(xs: Sequence[Array], axis: int) -> Array:
    return torch.stack(list(xs), axis)


def copy(x: Array) -> Array:
    return x.clone(memory_format=torch.contiguous_format)


def broadcast_to(x: Array, shape: Sequence[int]) -> Array:
    return torch.broadcast_to(x, tuple(shape))


def take(x: Array, rows: Sequence[int], axis: int) -> Array:
    return x.index_select(axis, _index(tuple(rows), x.device))


@functools.lru_cache(maxsize=64)
def _index(rows: tuple[int, ...], device: torch.device) -> Array:
    """Rows as a tensor; kept, as the same ones are asked for in every layer and step."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def take_along_axis(x: Array, index: Array, axis: int) -> Array:
    return torch.take_along_dim(x, index.long(), axis)


def put_along_axis(x: Array, index: Array, values: Array, axis: int) -> Array:
    return x.scatter(axis, index.long(), values)


def add_along_axis(x: Array, index: Array, values: Array, axis: int) -> Array:
    """`x` with `values` added at `index`, repeated indices included."""
    return x.scatter_add(axis, index.long(), values)


def top_k(x: Array, k: int) -> Array:
    """Indices of the `k` largest along the last axis, earlier index first among equals."""
    return argsort(-x, -1)[..., :k]  # torch.topk leaves the order of equals open


def argsort(x: Array, axis: int) -> Array:
    return torch.argsort(x, dim=axis, stable=True).to(torch.int32)


def cumsum(x: Array, axis: int) -> Array:
    return torch.cumsum(x, axis)


def min(x: Array, axis: int, keepdims: bool = False) -> Array:
    return torch.amin(x, axis, keepdim=keepdims)


def max(x: Array, axis: int, keepdims: bool = False) -> Array:
    return torch.amax(x, axis, keepdim=keepdims)


def sum(x: Array, axis: int, keepdims: bool = False) -> Array:
    return torch.sum(x, axis, keepdim=keepdims)


def mean(x: Array, axis: int, keepdims: bool = False) -> Array:
    return torch.mean(x, axis, keepdim=keepdims)


def all(x: Array) -> Array:
    return torch.all(x)


def where(condition: Array, a: Any, b: Any) -> Array:
    return torch.where(condition, a, b)


def maximum(a: Array, b: Any) -> Array:
    return torch.maximum(a, b) if isinstance(b, torch.Tensor) else torch.clamp(a, min=b)


def minimum(a: Array, b: Any) -> Array:
    return torch.minimum(a, b) if isinstance(b, torch.Tensor) else torch.clamp(a, max=b)


def write(buffer: Array, start: int | Array, x: Array, axis: int) -> Array:
    """`buffer` with `x` at `start` along `axis`, written in place.

    A start [1] on the device is of one entry.
    """
    if isinstance(start, torch.Tensor):
        return buffer.index_copy_(axis, start, x.to(buffer.dtype))
    buffer.narrow(axis, start, x.shape[axis]).copy_(x)
    return buffer


def after(x: Array, done: Array) -> Array:
    """`x`; all is computed in the order it is written."""
    return x


def orthonormal(x: Array) -> Array:
    """The thin QR's Q of matrices [..., n, r], n >= r."""
    return torch.linalg.qr(x)[0]


def quantized_matmul(
    x: Array, words: Array, step: Array, low: Array, size: int, bits: int
) -> Array | None:
    """None: PyTorch has none for groups along the columns."""
    return None
