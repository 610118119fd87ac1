"""Cases of `encode`: what the store can ask of the codec, in awkward sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvc.ops.codec import Spec
from kvc.ops.quant import Backbone, Role
from kvc.ops.residual import Seed
from tests.cases import DTYPES, Sized
from tests.cases import quantize as blocks


@dataclass(frozen=True)
class Case(Sized):
    """Sizes of a block, and how it is coded."""

    dtype: str = "float16"
    bits: int = 2
    role: Role = "k"
    backbone: Backbone = "kivi"
    n: int = 64
    D: int = 64
    group: int = 32
    H: int = 2
    B: int = 1
    rank: int = 2
    outliers: float = 0.0
    n_iter: int = 3
    rotate: str = ""
    scales: str = ""
    tile: int = 128
    scale: str = ""  # the dtype of step; empty: of x

    @property
    def spec(self) -> Spec:
        return Spec(
            self.role, self.bits, self.backbone, self.group, self.n, self.D, self.rotate,
            self.scales, self.tile, self.scale, self.scale,
        )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        """The other arguments of the op."""
        seed = Seed(0, 3, self.n)
        return {
            "rank": self.rank, "outliers": self.outliers, "n_iter": self.n_iter, "seed": seed
        }  # fmt: skip


def args(case: Case) -> dict[str, Any]:
    """x in float32, its tokens not all alike."""
    x = blocks.args(blocks.Case(n=case.n, D=case.D, H=case.H, B=case.B))["x"]
    return {"x": x + np.sin(np.arange(case.n, dtype=np.float32))[:, None]}


ROLES: tuple[Role, ...] = ("k", "v")
BACKBONES: tuple[Backbone, ...] = ("kivi", "token", "kcvt")
GEAR2 = {"rotate": "hadamard", "scales": "dual"}
CASES = [
    *(  # a prompt's block, longer than the fit holds in registers, and one of decoding
        Case(dtype, bits, role, backbone, n, 64, 32, 2, 1, rank, outliers=0.05)
        for i, dtype in enumerate(DTYPES)
        for j, backbone in enumerate(BACKBONES)
        for role in ROLES
        for bits in ((2, 4, 8)[(i + j) % 3],)
        for n, rank in ((64, 2), (320, 4))
    ),
    *(
        Case("float32", role=role, D=D, group=16, H=3, B=2, rank=4, outliers=0.03, n_iter=2)
        for role in ROLES
        for D in (80, 96, 256)
    ),
    *(Case(role=role, n=128, D=128, rank=0, outliers=0.02, rotate="hadamard") for role in ROLES),
    *(
        Case(dtype, bits, role, n=n, D=D, scale=scale, **GEAR2)
        for role, bits, D in (("k", 4, 128), ("v", 2, 128), ("k", 2, 80), ("v", 8, 64))
        for dtype, n, scale in (("float16", 128, ""), ("bfloat16", 100, "float32"))
    ),
    *(
        Case("float32", 2, role, n=n, B=2, rank=0, scales="dual", tile=tile)
        for role in ROLES
        for n, tile in ((1, 128), (192, 64), (80, 20))
    ),
    *(Case(role=role, n=256, outliers=0.05, **GEAR2) for role in ROLES),
]
