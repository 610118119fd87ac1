"""What every launch needs: a device that can take it, a configuration, and the shape of its grid.

A module of an op has `why_not` and `run`, which take the op's arguments, and beside them

- `variants()`: the kernels as they are compiled for GPUs, for the check ahead of time. Every row of
  the module's table of configurations is in it, with the types and flags that cost most.
- `traffic(...)`: from shapes and sizes of elements alone, the bytes that the loads and stores of
  the op touch, and the least that any kernel must touch: each input read once, each answer written
  once. It asks the same function as `run` for its splits, so it tells what a launch does. Bytes
  that one instruction reads twice count once; bytes that two instructions read count twice, though
  a cache may serve them. The interpreter counts in the same way, and a test compares.

Integers that change while a text grows are kept out of the key of compiled kernels: they are named
in `do_not_specialize`. Integers inside a tuple cannot be named there; see `join.stacks`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

T = TypeVar("T")

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
FILL = 528  # programs that fill the largest GPU: four on each of 132 multiprocessors
QUERIES = 8  # of one step
GROUP = 16  # query heads for each head of K and V


class Config(NamedTuple):
    """How a kernel is compiled."""

    tile: int  # tokens that a program takes at a time
    num_warps: int
    num_stages: int  # tiles on their way at a time


class Variant(NamedTuple):
    """One kernel as it is compiled.

    Types are Triton's names: `*fp16`, `i32`, `fp32`, `*i1` of booleans; with `:16` behind them a
    multiple of 16, as a pointer or a stride mostly is. A tuple of arguments has a tuple of types.
    """

    name: str  # unique in its module
    kernel: Any  # the function that is decorated by triton.jit
    signature: Mapping[str, Any]  # types of all arguments that are not constants
    constexprs: Mapping[str, Any]  # None for pointers that are left out
    num_warps: int
    num_stages: int


class Traffic(NamedTuple):
    """Bytes in device memory."""

    touched: int
    least: int

    @property
    def ratio(self) -> float:
        """How much more than must be."""
        return self.touched / self.least


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


def off_device(*tensors: torch.Tensor | None) -> str | None:
    """Why kernels cannot reach these tensors, or None."""
    for x in tensors:
        if x is not None and not (x.is_cuda or interpreted()):
            return f"takes tensors on a CUDA GPU, not on {x.device}"
    return None


def type_name(x: torch.dtype) -> str:
    """A type as it is called in messages."""
    return str(x).removeprefix("torch.")


def off_types(*tensors: torch.Tensor) -> str | None:
    """Why kernels cannot take numbers of these types, or None."""
    for x in tensors:
        if x.dtype not in TYPES:
            return f"takes float16, bfloat16 or float32, not {type_name(x.dtype)}"
    return None


def off_shape(q: torch.Tensor, heads: int) -> str | None:
    """Why kernels cannot take queries [B, Hq, L, D] for so many heads of K and V, or None."""
    _, Hq, L, D = q.shape
    if L > QUERIES:
        return f"takes up to {QUERIES} queries per step, not {L}"
    if Hq > GROUP * heads:
        return f"takes up to {GROUP} query heads per head of K and V, not {Hq // heads}"
    return off_head_dim(D)


def off_head_dim(D: int) -> str | None:
    """Why kernels cannot take vectors of D elements, or None."""
    if D % 16 or not 16 <= D <= 256:
        return f"takes a head_dim that is a multiple of 16 up to 256, not {D}"
    return None


def product_type(*dtypes: torch.dtype) -> tl.dtype:
    """The type that products are taken in: the widest of these.

    The interpreter has no arithmetic of bfloat16.
    """
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    if interpreted() and widest == torch.bfloat16:
        return tl.float32
    return TYPES[widest]


def capability(x: torch.Tensor) -> int:
    """The compute capability of a tensor's device as 80, 90, ...; 0 in the interpreter."""
    return _capability(x.device) if x.is_cuda else 0


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def newest(table: Mapping[int, T], capability: int) -> T:
    """The entry for the newest devices that are not newer than this; the oldest if all are."""
    return table[max((key for key in table if key <= capability), default=min(table))]


def span(n: int, unit: int, programs: int, least: int) -> int:
    """How many of n tokens a program takes, in whole units, of `programs` for each split.

    As many splits as fill the GPU, of at least so many tokens: a split costs a partial answer for
    each query, written and read.
    """
    splits = max(1, min(n // least, -(-FILL // programs)))
    return max(1, -(-n // (splits * unit))) * unit
