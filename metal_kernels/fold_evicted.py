"""Tokens that go, folded into the state: features, outer products and sums in one launch."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from kvc.metal_kernels.kernel import DTYPES, launch
from kvc.ops.evict import Kernels

THREADS = 256
PIECE = 128  # tokens of a threadgroup, where there are many
FEATURES = 32  # R at most


def why_not(
    state: mx.array, norm: mx.array, k: mx.array, v: mx.array, valid: mx.array, kernels: Kernels
) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    if v.dtype != k.dtype or any(x.dtype not in DTYPES for x in (k, *kernels[2:])):
        return "takes float16, bfloat16 and float32, one of them for k and v"
    if state.dtype != mx.float32 or norm.dtype != mx.float32:
        return f"takes a float32 state, got {state.dtype}"
    D, R = state.shape[3], state.shape[2]
    if D % 16 or D > 256 or R > FEATURES:
        return (
            f"takes a head_dim of 16 to 256 in steps of 16 and up to {FEATURES} features, "
            f"got {D} and {R}"
        )
    return None if k.size else "takes at least one token"


def run(
    state: mx.array, norm: mx.array, k: mx.array, v: mx.array, valid: mx.array, kernels: Kernels
) -> tuple[mx.array, mx.array]:
    """The state and norm of `fold_evicted`, from the kernel."""
    B, H, T, D = k.shape
    R = state.shape[2]
    slots = 1 if B * T == 1 else 16 if T > 8 and D <= 128 else 8
    rows = max(1, min(B, slots // T))
    split = T if T <= PIECE else PIECE
    parts = math.ceil(T / split)
    alone = parts == 1
    inputs: dict[str, Any] = {
        "k": k, "v": v, "valid": valid, "split": rows * T if alone else split,
        **{name: getattr(kernels, name) for name in ("b1", "b2", "b3", "s1", "s2")},
        "state": state if alone else None, "norm": norm if alone else None,
    }  # fmt: skip
    front = () if alone else (parts,)
    new_state, new_norm = launch(
        "fold_evicted",
        inputs,
        {
            "new_state": ((*front, *state.shape), mx.float32),
            "new_norm": ((*front, *norm.shape), mx.float32),
        },
        template={
            "T": k.dtype, "D": D, "R": R, "SLOTS": slots, "ROWS": rows, "THREADS": THREADS,
        },
        grid=(H * THREADS, parts, math.ceil(B / rows)),
        threadgroup=(THREADS, 1, 1),
        include=("gelu", "tokens"),
    )  # fmt: skip
    if alone:
        return new_state, new_norm
    return state + new_state.sum(0), norm + new_norm.sum(0)
