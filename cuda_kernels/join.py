"""The join of partial answers in one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from kvc.cuda_kernels.launch import (
    TYPES,
    Traffic,
    Variant,
    off_device,
    off_head_dim,
    off_types,
    type_name,
)
from kvc.cuda_kernels.softmax import finish, take_sink, take_stack
from kvc.ops.attention import Partial

PARTS = 6  # stacks of answers in a launch
NUMBERS = 2048  # that a program reads at a time, of as many answers
WARPS = 4


@triton.jit(do_not_specialize=["Hq", "L"])
def join_kernel(
    outs, lses, counts, sinks, out, lse, Hq, L,
    D: tl.constexpr, DP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A program has one row, a query of a query head.

    outs [n, B, Hq, L, D] and lses [n, B, Hq, L], contiguous, counts 2 n + 1 of each; sinks [Hq];
    out [B, Hq, L, D]; lse [B, Hq, L]. DP is D or the next power of two.
    """
    at = tl.program_id(0)
    every = tl.num_programs(0)
    row = tl.arange(0, 1)
    d = tl.arange(0, DP)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    weighted = tl.zeros([1, DP], tl.float32)
    for i in tl.static_range(len(outs)):
        top, total, weighted = take_stack(
            top, total, weighted, outs[i], lses[i], counts[i] // 2, every, at, 1, row, d, D, PAIRS
        )
    if sinks is not None:
        top, total, weighted = take_sink(
            top, total, weighted, tl.load(sinks + at // L % Hq + row).to(tl.float32)
        )
    answer, own_lse = finish(top, total, weighted)
    where = out + (at.to(tl.int64) + row)[:, None] * D + d[None, :]
    tl.store(where, answer.to(out.dtype.element_ty), mask=(d < D)[None, :])
    tl.store(lse + at + row, own_lse)


def why_not(
    parts: Sequence[Partial], *, sinks: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    arrays = [x for part in parts for x in part]
    if any(x.dtype != torch.float32 for x in arrays):
        return "takes answers in float32"
    if dtype is not None and dtype not in TYPES:
        return f"gives float16, bfloat16 or float32, not {type_name(dtype)}"
    return (
        off_device(*arrays, sinks)
        or (off_types(sinks) if sinks is not None else None)
        or off_head_dim(parts[0].out.shape[-1])
    )


def run(
    parts: Sequence[Partial], *, sinks: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> Partial:
    """As `kvc.ops.attention.join`; more stacks than a launch takes are joined by several."""
    while len(parts) > PARTS:
        parts = [run(parts[:PARTS]), *parts[PARTS:]]
    B, Hq, L, D = parts[0].out.shape[-4:]
    like = parts[0].out
    out = like.new_empty((B, Hq, L, D), dtype=dtype or torch.float32)
    lse = like.new_empty((B, Hq, L))
    DP = triton.next_power_of_2(D)
    outs, lses, counts = stacks(parts)
    join_kernel[(B * Hq * L,)](
        outs, lses, counts, sinks, out, lse, Hq, L,
        D=D, DP=DP, PAIRS=NUMBERS // DP, num_warps=WARPS,
    )  # fmt: skip
    return Partial(out, lse)


def stacks(
    parts: Sequence[Partial],
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Answers as kernels take them: outs [n, B, Hq, L, D], lses [n, B, Hq, L], 2 n + 1 of each.

    Triton compiles anew for an integer in a tuple that becomes 1 or a multiple of 16: no odd number
    above 1 does.
    """
    wide = [
        part if part.out.ndim == 5 else Partial(part.out[None], part.lse[None]) for part in parts
    ]
    return (
        tuple(part.out.contiguous() for part in wide),
        tuple(part.lse.contiguous() for part in wide),
        tuple(2 * part.out.shape[0] + 1 for part in wide),
    )


def traffic(rows: int, D: int, answers: int, *, itemsize: int = 4, sinks: int = 0) -> Traffic:
    """Bytes of a join of so many answers for each row, in one launch.

    Args:
        rows: Rows, B * Hq * L.
        D: The head_dim.
        answers: Answers for each row, those of all stacks.
        itemsize: Bytes of a number of the result.
        sinks: Bytes of a sink; 0 where there are none.
    """
    least = rows * (answers * (D + 1) * 4 + D * itemsize + 4)
    return Traffic(least + rows * sinks, least)


def variants() -> Iterator[Variant]:
    """The kernel as it is compiled: for every width, with one stack and with all."""
    for D in (64, 80, 128, 256):
        DP = triton.next_power_of_2(D)
        for parts in (1, PARTS):
            yield Variant(
                f"D{D}-parts{parts}",
                join_kernel,
                {
                    "outs": ("*fp32:16",) * parts,
                    "lses": ("*fp32:16",) * parts,
                    "counts": ("i32",) * parts,
                    "sinks": "*bf16:16",
                    "out": "*bf16:16",
                    "lse": "*fp32:16",
                    "Hq": "i32",
                    "L": "i32",
                },
                {"D": D, "DP": DP, "PAIRS": NUMBERS // DP},
                WARPS,
                1,
            )
