"""A low-rank fit: one launch for a short block, as decoding makes them; MLX's matmuls for long."""

from __future__ import annotations

import mlx.core as mx

from kvc.metal_kernels.kernel import launch
from kvc.ops.residual import LowRank, power_iteration

SIMDS = 16  # simdgroups of a threadgroup
TOKENS = 128  # at most, in registers
RANK = 16


def run(rest: mx.array, c0: mx.array, n_iter: int, dtype: mx.Dtype) -> LowRank:
    """The fit A C^T of `power_iteration`, in `dtype`.

    Shapes: rest [B, H, n, D]; c0 [H, D, r].
    """
    B, H, n, D = rest.shape
    r = c0.shape[2]
    if n > TOKENS or r > RANK or D > 256:
        return LowRank(*(x.astype(dtype) for x in power_iteration(rest, c0, n_iter)))
    a, c = launch(
        "encode_fit",
        {"rest": rest, "c0": c0, "n_iter": n_iter},
        {"a": ((B, H, n, r), dtype), "c": ((B, H, D, r), dtype)},
        template={"O": dtype, "TOKENS": n, "D": D, "R": r, "SIMDS": SIMDS},
        grid=(B * H * 32 * SIMDS, 1, 1),
        threadgroup=(32 * SIMDS, 1, 1),
        include=("tokens",),
    )
    return LowRank(a, c)
