"""Cases of `merge_pair`: two layers' vectors, some of them zero, parallel or antipodal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from kvc.ops.merge import Granularity, How
from tests.cases import DTYPES, HEAD_DIMS, TOKENS, Sized


@dataclass(frozen=True)
class Case(Sized):
    """Sizes of a call, and how it merges."""

    dtype: str = "float16"
    B: int = 2
    H: int = 2
    T: int = 65
    D: int = 64
    how: How = "slerp"
    granularity: Granularity = "head"


def args(case: Case) -> dict[str, Any]:
    """xa, xb and t, in float32; some vectors of the last heads are special."""
    rng = np.random.default_rng(crc32(case.id.encode()))
    xa, other = rng.standard_normal((2, case.B, case.H, case.T, case.D)).astype(np.float32)
    xb = (xa + 0.7 * other) * np.exp(rng.standard_normal((1, 1, case.T, 1)).astype(np.float32))
    special = [(0, 1), (1, 0), (0, 0), (1, 1), (1, -1), (1, 2)]  # times xa
    for t, (a, b) in zip(range(case.T - 1, -1, -1), special, strict=False):
        xb[-1, :, t] = b * xa[-1, :, t]
        xa[-1, :, t] *= a
    return {"xa": xa, "xb": xb, "t": 0.6}


HOWS: tuple[How, ...] = ("slerp", "mean", "max-norm")
CASES = [
    *(
        Case(dtype, 2, 3, TOKENS[(i + j) % 6], D, HOWS[(i + j) % 3], granularity)
        for i, dtype in enumerate(DTYPES)
        for j, D in enumerate(HEAD_DIMS)
        for granularity in ("head", "token")
    ),
    *(Case(T=T, how=how) for T in TOKENS for how in HOWS),
    *(Case(B=1, H=H, T=9, granularity="token") for H in (1, 8, 32, 40)),
    *(Case(D=D, T=7) for D in (16, 208)),
]
