"""Cases of `quantize`: every layout of groups and words, in awkward sizes."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any
from zlib import crc32

import numpy as np

from kvc.ops.quant import Backbone, Quantized, Role, grouped, ungrouped, unpack_tokens
from tests.cases import DTYPES, Sized, array, exact
from tests.tolerances import TIE


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
    scale: str = ""  # the dtype of step; empty: of x
    zero: str = ""  # the dtype of low


def args(case: Case) -> dict[str, Any]:
    """x in float32: channels and tokens of different sizes, and a channel that is constant."""
    rng = np.random.default_rng(crc32(case.id.encode()))

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    B, H, n, D = case.B, case.H, case.n, case.D
    x = draw(B, H, n, D) * np.exp(draw(1, H, 1, D)) + 2 * draw(1, H, 1, D) + draw(B, 1, n, 1) / 2
    x[-1, -1, :, 0] = 1.5
    x[-1, -1, -1] = -0.25
    return {"x": x}


def assert_rounded(
    xp: ModuleType, name: str, got: Any, want: np.ndarray[Any, Any], noise: float
) -> None:
    """Fails where a stored number is not `want`, times 1 + `noise` at most, rounded to its type."""
    ends = [exact(xp, array(xp, want * (1 + off), xp.dtype_name(got))) for off in (-noise, noise)]
    assert (np.minimum(*ends) <= exact(xp, got)).all(), name
    assert (exact(xp, got) <= np.maximum(*ends)).all(), name


def assert_codes(
    xp: ModuleType,
    code: Quantized,
    x: np.ndarray[Any, Any],
    bits: int,
    role: Role,
    backbone: Backbone,
    group_size: int,
) -> None:
    """Fails where a code is not that of `x` with the stored step and low, but for ties."""
    groups, _ = grouped(x, role, backbone, group_size)
    place = (groups - exact(xp, code.low)) / exact(xp, code.step)
    place = ungrouped(place, x.shape, role, backbone).clip(0, 2**bits - 1)
    found = unpack_tokens(xp.to_numpy(code.codes), bits, role, x.shape[3], 0, x.shape[2])
    assert (np.abs(found - place) <= 0.5 + TIE).all()


# role, backbone, n, head_dim, group, heads
LAYOUTS: tuple[tuple[Role, Backbone, int, int, int, int], ...] = (
    ("k", "kivi", 64, 64, 64, 2),
    ("k", "kivi", 100, 80, 20, 2),
    ("k", "kivi", 1000, 64, 40, 1),
    ("k", "kivi", 65, 256, 5, 1),
    ("k", "kivi", 1, 96, 1, 3),
    ("v", "kivi", 1, 64, 64, 2),
    ("v", "kivi", 65, 80, 16, 2),
    ("v", "token", 1000, 128, 128, 1),
    ("v", "kivi", 100, 256, 32, 1),
    ("k", "token", 1, 64, 32, 2),
    ("k", "token", 63, 80, 16, 2),
    ("k", "token", 100, 256, 256, 1),
    ("k", "token", 1000, 64, 64, 1),
    ("k", "kcvt", 1, 64, 64, 2),
    ("k", "kcvt", 20, 128, 64, 2),
    ("k", "kcvt", 63, 96, 64, 2),
    ("k", "kcvt", 1000, 32, 64, 2),
    ("k", "kcvt", 2100, 16, 64, 1),  # longer than a tile
    ("v", "kcvt", 1, 64, 64, 2),
    ("v", "kcvt", 20, 256, 64, 2),
    ("v", "kcvt", 63, 80, 64, 3),
    ("v", "kcvt", 1000, 16, 64, 2),
    ("v", "kcvt", 3, 256, 64, 40),  # longer than a tile
)
CASES = [
    *(
        Case(dtype, bits, role, backbone, n, D, group, H, B=1 + (n < 64))
        for dtype in DTYPES
        for bits in (2, 4, 8)
        for role, backbone, n, D, group, H in LAYOUTS
    ),
    Case(scale="float32", zero="bfloat16"),
    Case("float32", 4, "v", scale="float16", zero="float16"),
    Case("bfloat16", 8, "k", "token", scale="bfloat16", zero="float32"),
]
