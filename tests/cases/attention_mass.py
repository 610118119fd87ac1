"""Cases of `attention_mass`: the newest L tokens are the queries' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np

from tests.cases import DTYPES, GROUPS, HEAD_DIMS, TOKENS, Sized


@dataclass(frozen=True)
class Case(Sized):
    """Sizes of a call, and which options it has."""

    dtype: str = "float16"
    B: int = 1
    H: int = 2
    G: int = 1  # query heads of a head
    L: int = 1
    D: int = 64
    T: int = 100
    softcap: float | None = None
    valid: Literal["all", "padded", "heads", "none"] = "all"
    sinks: bool = False


def args(case: Case) -> dict[str, Any]:
    """q, k, scale and the options, in float32."""
    rng = np.random.default_rng(crc32(case.id.encode()))

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    B, H, Hq, T = case.B, case.H, case.H * case.G, case.T
    valid = {
        "all": None,
        "padded": np.arange(T) >= np.linspace(T // 2, 0, B).round()[:, None, None],
        "heads": rng.random((B, H, T)) < 0.6,
        "none": np.arange(B)[:, None, None] < np.full((1, 1, T), B - 1),  # in the last row
    }[case.valid]
    return {
        "q": 3 * draw(B, Hq, case.L, case.D),
        "k": draw(B, H, T, case.D),
        "scale": case.D**-0.5,
        "softcap": case.softcap,
        "valid": valid,
        "sinks": 3 * draw(Hq) if case.sinks else None,
    }


CASES = [
    *(
        Case(dtype, 1, 2, GROUPS[(i + j) % 2], 1, D, TOKENS[(i + 2 * j) % 6])
        for i, dtype in enumerate(DTYPES)
        for j, D in enumerate(HEAD_DIMS)
    ),
    *(
        Case(DTYPES[j % 3], 1, 1, GROUPS[j % 4], (33, 17, 1)[j % 3], D, (40, 65, 100)[j % 3])
        for j, D in enumerate(HEAD_DIMS)
    ),
    *(
        Case(B=2, G=3, L=L, T=T, softcap=softcap, valid=valid, sinks=valid == "heads")
        for L, T in ((1, 65), (2, 600), (20, 63))
        for softcap, valid in ((None, "padded"), (3.0, "heads"), (None, "none"))
    ),
    *(Case(G=2, L=T, T=T) for T in TOKENS if T < 1000),
    Case(H=1, L=300, T=333),
]
