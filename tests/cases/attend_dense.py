"""Cases of `attend_dense`: tokens, masks, and answers that are joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np

from tests.cases import DTYPES, GROUPS, HEAD_DIMS, TOKENS, Sized
from tests.cases.join import answers


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
    causal: bool = False
    softcap: float | None = None
    # padding on the left, other tokens in each head, or a batch row that sees nothing
    valid: Literal["all", "padded", "heads", "none"] = "all"
    joined: tuple[int, ...] = ()  # how many answers each of them stacks; 0 is one without the axis
    sinks: bool = False


def args(case: Case) -> dict[str, Any]:
    """q, k, v, scale and the options, in float32."""
    rng = np.random.default_rng(crc32(case.id.encode()))

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    B, H, Hq, T = case.B, case.H, case.H * case.G, case.T
    valid = None
    if case.valid == "padded":
        valid = np.arange(T) >= np.linspace(T // 2, 0, B).round()[:, None, None]
    elif case.valid == "heads":
        valid = rng.random((B, H, T)) < 0.6
    elif case.valid == "none":
        valid = np.ones((B, 1, T), bool)
        valid[-1] = False
    return {
        "q": 3 * draw(B, Hq, case.L, case.D),
        "k": draw(B, H, T, case.D),
        "v": draw(B, H, T, case.D),
        "scale": case.D**-0.5,
        "causal": case.causal,
        "softcap": case.softcap,
        "valid": valid,
        "joined": [answers(rng, n, B, Hq, case.L, case.D) for n in case.joined],
        "sinks": 3 * draw(Hq) if case.sinks else None,
    }


CASES = [
    *(
        Case(dtype, 1 if T == 1000 else 2, 2, GROUPS[(i + j) % 4], 1, D, T)
        for i, dtype in enumerate(DTYPES)
        for j, D in enumerate(HEAD_DIMS)
        for T in TOKENS
    ),
    Case(D=16, G=2),
    Case("float32", D=240, G=3, T=65),
    Case(G=7, T=40),
    *(Case(B=2, G=2, L=4, T=T, causal=True) for T in (1, 3, 4, 5, 65, 1000)),
    *(Case("bfloat16", L=8, D=80, T=T, causal=True) for T in (2, 8, 100)),
    *(Case("float32", G=3, L=3, T=T, causal=True) for T in (2, 3, 64)),
    *(Case("bfloat16", G=5, L=n, T=20, causal=True) for n in (5, 7)),  # rows of several tiles
    Case(G=4, L=2, T=33),
    *(
        Case(B=2, G=4, T=T, valid=valid)
        for valid in ("padded", "heads", "none")
        for T in (1, 7, 65, 1000)
    ),
    *(Case(B=2, G=2, L=4, T=T, causal=True, valid="heads", softcap=2.0) for T in (3, 70)),
    *(Case(G=4, T=T, softcap=2.0) for T in (64, 600)),
    *(
        Case(B=2, G=4, T=T, joined=joined)
        for joined in ((0,), (3,), (1, 40), (0, 5, 300, 1, 2), (0,) * 7)
        for T in (0, 1, 100, 600)
    ),
    *(
        Case(B=2, G=3, L=3, D=256, T=T, joined=(0, 9), sinks=True, causal=True)
        for T in (0, 2, 90, 1000)
    ),
    *(Case(B=2, G=3, T=T, sinks=True, valid="none") for T in (0, 65, 1000)),
]
