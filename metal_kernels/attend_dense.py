"""Attention over tokens as they came: few in one launch, many split over the GPU and joined."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kvc.metal_kernels import join
from kvc.metal_kernels.kernel import DTYPES, launch
from kvc.ops.attention import Partial

SIMDS = 8  # simdgroups of a threadgroup
SPAN = 32 * SIMDS  # tokens that they take at a time
SHORT = 2 * SPAN  # tokens up to which nothing is split
ROWS = 16  # queries that share a read
FILL = 512  # threadgroups that fill a large GPU; more splits are only more to join
QUERIES = 8
GROUP = 16


def why_not(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
    valid: mx.array | None = None,
    length: mx.array | None = None,
    joined: Sequence[Partial] = (),
    sinks: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    _, Hq, L, D = q.shape
    if any(x.dtype not in DTYPES for x in (q, k, v)) or k.dtype != v.dtype:
        return f"takes float16, bfloat16 or float32 tokens, not {q.dtype}, {k.dtype}, {v.dtype}"
    if L > QUERIES:
        return f"takes up to {QUERIES} queries per step, not {L}"
    if length is not None:
        return "takes the tokens that there are, not room for more and a length"
    if Hq > GROUP * k.shape[1]:
        return f"takes up to {GROUP} query heads per head of K and V, not {Hq // k.shape[1]}"
    if v.shape[-1] != D:
        return f"takes K and V of one head_dim, not {D} and {v.shape[-1]}"
    return join.why_not_answers(D, joined, dtype)


def run(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
    valid: mx.array | None = None,
    length: mx.array | None = None,
    joined: Sequence[Partial] = (),
    sinks: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> Partial:
    """As `kvc.ops.attention.attend_dense`.

    K and V may be views whose last axis is contiguous and whose tokens start at multiples of 16
    bytes; they are read where they lie.
    """
    B, Hq, L, D = q.shape
    H, T = k.shape[1], k.shape[2]
    if T == 0:
        nothing = Partial(mx.zeros((B, Hq, L, D)), mx.full((B, Hq, L), -mx.inf))
        return join.run(joined or [nothing], sinks=sinks, dtype=dtype)
    rows = Hq // H * L
    # a thread has at most 64 weighted values, 4 or 8 of each row: more do not fit into registers
    tiles = -(-rows // (ROWS if D <= 128 else ROWS // 2))
    each = -(-rows // tiles)
    piece = 8 if each > ROWS // 2 and k.dtype.size == 2 else 16
    span = _span(T, B * H * tiles, rows)
    S = -(-T // span)
    lead = (S,) if S > 1 else ()
    if S == 1 and len(joined) > join.PARTS - 1:
        joined = [join.run(joined)]
    others = join.inputs(joined, sinks) if S == 1 else {}
    if valid is not None:  # of eight elements or more, however short T is
        valid = mx.broadcast_to(valid, (8, B, H, T))
    threads = 32 * SIMDS
    out, lse = launch(
        "attend_dense",
        {
            "q": q,
            "k": k,
            "v": v,
            "valid": valid,
            "scale": scale,
            "softcap": softcap or 0.0,
            "span": span,
            **others,
        },
        {
            "out": ((*lead, B, Hq, L, D), mx.float32 if S > 1 or dtype is None else dtype),
            "lse": ((*lead, B, Hq, L), mx.float32),
        },
        template={
            "T": k.dtype,
            "D": D,
            "ROWS": each,
            "BYTES": piece,
            "SIMDS": SIMDS,
            "CAUSAL": causal and L > 1,
        },
        grid=(threads * tiles, B * H, S),
        threadgroup=(threads, 1, 1),
        include=("softmax",),
    )
    if S == 1:
        return Partial(out, lse)
    return join.run([Partial(out, lse), *joined], sinks=sinks, dtype=dtype)


def _span(T: int, groups: int, rows: int) -> int:
    """How many of T tokens a threadgroup takes, of `groups` threadgroups per split.

    A split costs a partial answer for each row, written and read: few tokens are not worth it.
    """
    if T <= SHORT:
        return T
    splits = min(-(-T // max(SPAN, 32 * rows)), -(-FILL // groups))
    return -(-T // (splits * SPAN)) * SPAN
