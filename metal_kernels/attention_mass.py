"""Attention mass: each query's log-sum-exp, unless it is known, then each key's probabilities."""

from __future__ import annotations

import math

import mlx.core as mx

from kvc.metal_kernels.kernel import DTYPES, launch

SIMDS = 8  # simdgroups of a threadgroup
SPLIT = 256  # keys of a threadgroup at least, where a step has few queries


def why_not(
    q: mx.array,
    k: mx.array,
    scale: float,
    *,
    valid: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    lse: mx.array | None = None,
) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    if q.dtype not in DTYPES or k.dtype not in DTYPES:
        return "takes float16, bfloat16 and float32"
    D = k.shape[3]
    if D % 16 or D > 256:
        return f"takes a head_dim of 16 to 256 in steps of 16, got {D}"
    if q.shape[2] > k.shape[2]:
        return f"takes queries that are among the keys, got {q.shape[2]} and {k.shape[2]}"
    return None if q.size else "takes at least one query"


def run(
    q: mx.array,
    k: mx.array,
    scale: float,
    *,
    valid: mx.array | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    lse: mx.array | None = None,
) -> mx.array:
    """The mass of `attention_mass`, from the kernels."""
    B, Hq, L, D = q.shape
    H, T = k.shape[1], k.shape[2]
    rows = Hq // H * L
    few = rows <= 8
    queries = 8 if few else 32 if D <= 128 else 16
    template = {"T": k.dtype, "D": D, "QUERIES": queries, "SIMDS": SIMDS}
    # a softcap of 0 or None is none
    inputs = {"q": q, "k": k, "scale": float(scale), "valid": valid, "softcap": softcap or None}
    include = ("softmax", "score_tiles", "tokens")
    # at least 8 numbers: MLX hands fewer over in another way, which would be another kernel
    least = math.ceil(8 / (B * Hq * L))
    if lse is None:
        blocks = math.ceil(rows / queries)
        keys = max(SPLIT, math.ceil(T * blocks * B * H / 1024 / SPLIT) * SPLIT) if few else T
        splits = max(math.ceil(T / keys), least)
        (lse,) = launch(
            "attention_lse",
            inputs | {"keys": keys},
            {"lse": ((splits, B, Hq, L), mx.float32)},
            template=template,
            grid=(H * blocks * 32 * SIMDS, splits, B),
            threadgroup=(32 * SIMDS, 1, 1),
            include=include,
        )
    else:
        sinks = None  # lse has them
        lse = mx.contiguous(lse.astype(mx.float32))[None]
        if least > 1:
            nothing = mx.full((least - 1, B, Hq, L), -math.inf)
            lse = mx.concatenate([lse, nothing], 0)
    keys = SPLIT if rows <= queries else 8 * SIMDS
    (mass,) = launch(
        "attention_mass",
        inputs | {"lse": lse, "sinks": sinks, "keys": keys},
        {"mass": ((B, H, T), mx.float32)},
        template=template,
        grid=(math.ceil(T / keys) * 32 * SIMDS, H, B),
        threadgroup=(32 * SIMDS, 1, 1),
        include=include,
    )
    return mass
