"""Cases of `fold_evicted`: tokens that go, some of which are none, and a layer's maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np

from kvc.ops.evict import Kernels
from tests.cases import DTYPES, HEAD_DIMS, TOKENS, Sized


@dataclass(frozen=True)
class Case(Sized):
    """Sizes of a call: T tokens, M hidden units and R features, and which tokens there are."""

    dtype: str = "float16"  # of tokens
    maps: str = "float32"  # of the learned maps
    B: int = 1
    H: int = 2
    T: int = 1
    D: int = 64
    M: int = 96
    R: int = 8
    valid: Literal["all", "some", "shared", "none"] = "some"


def args(case: Case) -> dict[str, Any]:
    """state, norm, k, v, valid and kernels, in float32."""
    rng = np.random.default_rng(crc32(case.id.encode()))

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    B, H, T, D, M, R = case.B, case.H, case.T, case.D, case.M, case.R
    valid = rng.random((B, 1 if case.valid == "shared" else H, T)) < 0.7
    kernels = Kernels(
        a1=draw(H, D, M),
        a2=draw(H, M, R),
        b1=draw(H, D, M) / np.float32(np.sqrt(D)),
        b2=draw(H, M, R) / np.float32(np.sqrt(M)),
        b3=draw(H, R, R) / 4,
        s1=draw(H, R),
        s2=draw(H, R),
    )
    return {
        "state": draw(B, H, R, D),
        "norm": np.abs(draw(B, H, R)),
        "k": 2 * draw(B, H, T, D),
        "v": draw(B, H, T, D),
        "valid": {"all": valid | True, "none": valid & False}.get(case.valid, valid),
        "kernels": kernels,
    }


CASES = [
    *(
        Case(dtype, DTYPES[(i + j + 1) % 3], 1 + (i + j) % 2, 2, TOKENS[(i + 2 * j) % 5], D)
        for i, dtype in enumerate(DTYPES)
        for j, D in enumerate(HEAD_DIMS)
    ),
    *(Case(B=B, T=T) for B in (1, 3, 9) for T in (1, 3, 9)),
    *(Case(T=T, valid=valid) for T in (1, 130) for valid in ("all", "shared", "none")),
    *(Case(T=9, M=M, R=R) for M, R in ((16, 1), (300, 5), (512, 32))),
    Case(T=1000, H=1),
]
