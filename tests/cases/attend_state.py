"""Cases of `attend_state`: sizes of the maps and of the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from kvc.ops.evict import Kernels
from tests.cases import DTYPES, GROUPS, HEAD_DIMS, Sized


@dataclass(frozen=True)
class Case(Sized):
    """Sizes of a call, and the types of queries and of maps."""

    dtype: str = "float16"
    maps: str = "float16"
    B: int = 1
    H: int = 2
    G: int = 2  # query heads of a head
    L: int = 1
    D: int = 64
    M: int = 64  # hidden features
    R: int = 8  # features
    empty: bool = False  # whether the last batch row has folded nothing yet


def args(case: Case) -> dict[str, Any]:
    """q, state, norm and kernels, in float32."""
    rng = np.random.default_rng(crc32(case.id.encode()))
    B, H, Hq, D, M, R = case.B, case.H, case.H * case.G, case.D, case.M, case.R

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    state, norm = draw(B, H, R, D), np.abs(draw(B, H, R))
    if case.empty:
        state[-1], norm[-1] = 0, 0
    kernels = Kernels(
        *(draw(Hq, D, M) / D**0.5, draw(Hq, M, R) * 2 / M**0.5),
        *(draw(H, D, M), draw(H, M, R), draw(H, R, R), draw(H, R), draw(H, R)),
    )
    return {"q": 2 * draw(B, Hq, case.L, D), "state": state, "norm": norm, "kernels": kernels}


CASES = [
    *(
        Case(dtype, DTYPES[i - 1], G=GROUPS[i], D=D)
        for i, dtype in enumerate(DTYPES)
        for D in HEAD_DIMS
    ),
    *(Case(D=128, M=512, L=n, B=b) for n, b in ((1, 1), (1, 3), (8, 1))),
    *(Case(L=n, B=b, G=3, empty=True) for n, b in ((1, 1), (1, 9), (3, 3), (8, 2), (5, 2))),
    Case(H=1, G=16, M=40, R=5),
    Case(M=104, R=1, B=2),
    Case("float32", "float32", D=80, M=132, R=33, B=2, L=2),
]
