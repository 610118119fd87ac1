"""The low-rank fit of what codes leave of a block: E is about A C^T, with A orthonormal.

A block of decoding takes one launch. Of a longer one only the span of C matters until
the last step, and the span of E^T Q, Q R = E C, is that of E^T E C: one reading of E for each
iteration, and two for the last, whose A has to be orthonormal.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton

from kvc.cuda_kernels.encode_low_rank_kernel import gather, iterate, project, tall
from kvc.cuda_kernels.launch import Variant, span
from kvc.ops.quant import Role
from kvc.ops.residual import LowRank, Seed, start

SHORT = 256  # tokens of a block that one program takes
TILE = 8192  # entries that a program takes at a time
HELD = 32  # tokens of these, of a block that it does not hold whole
WARPS = 8
TALL = 1024  # rows of A that are taken at a time


@lru_cache(maxsize=256)  # those of one step: copies to a GPU take longer than a fit does
def beginning(seed: Seed, role: Role, H: int, D: int, r: int, device: torch.device) -> torch.Tensor:
    """The start of the iteration, float32 [H, D, r]."""
    c = torch.from_numpy(start(seed, role, H, D, r).astype("float32"))
    return c.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else c


def fit(e: torch.Tensor, r: int, n_iter: int, role: Role, seed: Seed, dtype: Any) -> LowRank:
    """A and C of e, float32 [B, H, n, D] and contiguous, by power iteration."""
    B, H, n, D = e.shape
    c0 = beginning(seed, role, H, D, r, e.device)
    a, c = e.new_empty((B, H, n, r), dtype=dtype), e.new_empty((B, H, D, r), dtype=dtype)
    flags = sizes(D, r)
    y, tokens = e.new_empty((B * H, n, r)), TILE // flags["WIDTH"]
    if n <= SHORT:
        iterate[(B * H,)](
            e, c0, y, a, c, n, n_iter, H=H, **tiling(n, D), **flags, num_warps=warps(D)
        )
        return LowRank(a, c)
    size = span(n, tokens, B * H, 4 * tokens)
    splits = triton.cdiv(n, size)
    wide_c, parts = e.new_empty((B * H, D, r)), e.new_empty((B * H, splits, D, r))

    def read(c: Any, a: Any, parts: Any, turn: bool = False) -> None:
        heads = H if c is c0 else B * H
        project[(splits, B * H)](
            e, c, a, parts, n, size, heads, H=H, TOKENS=tokens, TURN=turn, **flags, num_warps=WARPS
        )

    right = c0
    for _ in range(n_iter - 1):
        read(right, None, parts)
        gather[(B * H,)](parts, wide_c, splits, BASIS=True, **flags, num_warps=4)
        right = wide_c
    read(right, y, None)
    tall[(B * H,)](y, a, n, R=r, RANKS=flags["RANKS"], ROWS=TALL, num_warps=WARPS)
    read(None, y, parts, turn=True)
    gather[(B * H,)](parts, c, splits, BASIS=False, **flags, num_warps=4)
    return LowRank(a, c)


def sizes(D: int, r: int) -> dict[str, int]:
    """What every kernel here is compiled for."""
    return {
        "D": D, "R": r, "RANKS": triton.next_power_of_2(r), "WIDTH": triton.next_power_of_2(D)
    }  # fmt: skip


def tiling(n: int, D: int) -> dict[str, int]:
    """A tile of `iterate` for blocks of n tokens."""
    rows, most = triton.next_power_of_2(n), TILE // triton.next_power_of_2(D)
    return {"ROWS": rows, "TOKENS": rows if rows <= most else min(HELD, most // 2)}


def warps(D: int) -> int:
    """Warps of a program that fits a block alone."""
    return WARPS if D > 128 else 2 * WARPS


def variants() -> Iterator[Variant]:
    """Blocks of decoding and of prompts."""
    fp32 = "*fp32:16"
    for D, rows, r in ((64, 64, 2), (128, 64, 2), (128, 128, 4), (256, 64, 8)):
        flags = sizes(D, r)
        yield Variant(
            f"iterate-{rows}x{D}-rank{r}",
            iterate,
            {
                "e": fp32,
                "c0": fp32,
                "y": fp32,
                "a": "*bf16:16",
                "c": "*bf16:16",
                "n": "i32",
                "n_iter": "i32",
            },
            {**flags, "H": 8, **tiling(rows, D)},
            warps(D),
            3,
        )
        for name, turn, missing in (
            ("span", False, "a"), ("left", False, "parts"), ("right", True, "c")
        ):  # fmt: skip
            nothing = {missing: None}
            given = {key: fp32 for key in ("e", "c", "a", "parts") if key not in nothing}
            yield Variant(
                f"project-{name}-{D}-rank{r}",
                project,
                {**given, "n": "i32", "size": "i32", "of_head": "i32"},
                {**flags, **nothing, "H": 8, "TOKENS": TILE // D, "TURN": turn},
                WARPS,
                3,
            )
        yield Variant(
            f"gather-{D}-rank{r}",
            gather,
            {"parts": fp32, "c": fp32, "splits": "i32"},
            {**flags, "BASIS": True},
            4,
            3,
        )
        yield Variant(
            f"tall-{D}-rank{r}",
            tall,
            {"y": fp32, "a": "*bf16:16", "n": "i32"},
            {"R": r, "RANKS": flags["RANKS"], "ROWS": TALL},
            WARPS,
            3,
        )
