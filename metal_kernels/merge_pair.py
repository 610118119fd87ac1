"""Two layers' vectors as one direction, two norms and the angle between them, in one pass."""

from __future__ import annotations

import math
from typing import get_args

import mlx.core as mx

from kvc.metal_kernels.kernel import DTYPES, launch
from kvc.ops.merge import Granularity, How, Merged

SIMDS = 32  # simdgroups of the largest threadgroup
HOW: tuple[How, ...] = ("slerp", "mean", "max-norm")  # as the shader numbers them


def why_not(
    xa: mx.array, xb: mx.array, t: float, how: How = "slerp", granularity: Granularity = "head"
) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    if xa.dtype not in DTYPES or xb.dtype != xa.dtype:
        return "takes float16, bfloat16 and float32, the same in both layers"
    if xa.shape[3] % 4 or xa.shape[3] > 256:
        return f"takes a head_dim that is a multiple of 4 and at most 256, got {xa.shape[3]}"
    if how not in HOW or granularity not in get_args(Granularity):
        return f"knows no {how!r} by {granularity!r}"  # the definition says what there is
    return None if xa.size else "takes at least one token"


def run(
    xa: mx.array, xb: mx.array, t: float, how: How = "slerp", granularity: Granularity = "head"
) -> Merged:
    """The merge of `merge_pair`, from the kernel."""
    B, H, T, D = xa.shape
    token = granularity == "token"
    simds = min(H, SIMDS) if token else 4
    vectors = (B, 1 if token else H, T)
    e, norm_a, norm_b, angle = launch(
        "merge_pair",
        {"xa": xa, "xb": xb, "t": float(t), "how": HOW.index(how)},
        {
            "e": (xa.shape, mx.float32),
            **dict.fromkeys(("norm_a", "norm_b", "angle"), (vectors, mx.float32)),
        },
        template={
            "T": xa.dtype, "D": D, "TOKEN": token, "EACH": math.ceil(H / SIMDS) if token else 1,
        },
        grid=(32 * math.prod(vectors) * (simds if token else 1), 1, 1),
        threadgroup=(32 * simds, 1, 1),
        include=("tokens",),
    )  # fmt: skip
    return Merged(e, norm_a, norm_b, angle)
