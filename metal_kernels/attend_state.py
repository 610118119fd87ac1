"""The answer of LESS's state in one launch."""

from __future__ import annotations

import mlx.core as mx

from kvc.metal_kernels import join
from kvc.metal_kernels.kernel import DTYPES, launch
from kvc.ops.attention import Partial
from kvc.ops.evict import Kernels

SIMDS = 8  # simdgroups of a threadgroup
ROWS = 8  # queries that share a read of the maps
HIDDEN = 4096  # hidden features of all rows that fit into threadgroup memory
QUERIES = 8


def why_not(q: mx.array, state: mx.array, norm: mx.array, kernels: Kernels) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    (_, _, L, D), a1, a2 = q.shape, kernels.a1, kernels.a2
    if any(x.dtype not in DTYPES for x in (q, state, norm, a1, a2)):
        return "takes float16, bfloat16 or float32"
    if L > QUERIES:
        return f"takes up to {QUERIES} queries per step, not {L}"
    if a1.shape[-1] * a1.dtype.size % 16 or L * a1.shape[-1] > HIDDEN:
        return (
            f"takes hidden features of a multiple of 16 bytes, up to {HIDDEN // L}, "
            f"not {a1.shape[-1]}"
        )
    return join.why_not_answers(D, (), None)


def run(q: mx.array, state: mx.array, norm: mx.array, kernels: Kernels) -> Partial:
    """As `kvc.ops.evict.attend_state`."""
    B, Hq, L, D = q.shape
    M, R = kernels.a2.shape[1:]
    batch = max(1, min(B, ROWS // L, HIDDEN // (L * M)))
    pieces = M * kernels.a1.dtype.size // 16
    threads = 32 * SIMDS
    out, lse = launch(
        "attend_state",
        {
            "q": q,
            "state": state,
            "norm": norm,
            "a1": mx.contiguous(kernels.a1),
            "a2": mx.contiguous(kernels.a2),
        },
        {"out": ((B, Hq, L, D), mx.float32), "lse": ((B, Hq, L), mx.float32)},
        template={
            "K": kernels.a1.dtype,
            "D": D,
            "M": M,
            "R": R,
            "L": L,
            "BATCH": batch,
            "SIMDS": SIMDS,
            "WIDE": next(wide for wide in (8, 4, 2, 1) if wide == 1 or wide * SIMDS <= pieces),
        },
        grid=(threads * -(-B // batch), Hq, 1),
        threadgroup=(threads, 1, 1),
        include=("softmax", "gelu"),
    )
    return Partial(out, lse)
