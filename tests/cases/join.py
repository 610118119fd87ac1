"""Cases of `join`: answers over disjoint sets of tokens, alone and in stacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from kvc.ops.attention import Partial
from tests.cases import HEAD_DIMS, Sized


@dataclass(frozen=True)
class Case(Sized):
    """Sizes of a call, and which answers it joins."""

    B: int = 1
    Hq: int = 4
    L: int = 1
    D: int = 64
    parts: tuple[int, ...] = (0, 0)  # how many answers each stacks; 0 is one without the axis
    sinks: bool = False


def answers(rng: np.random.Generator, n: int, B: int, Hq: int, L: int, D: int) -> Partial:
    """An answer [B, Hq, L, D], or a stack of n; a few of them have seen nothing."""
    shape = (B, Hq, L) if n == 0 else (n, B, Hq, L)
    lse = 4 * rng.standard_normal(shape).astype(np.float32)
    out = rng.standard_normal((*shape, D)).astype(np.float32)
    nothing = rng.random(shape) < 0.2
    return Partial(
        np.where(nothing[..., None], np.float32(0), out), np.where(nothing, -np.inf, lse)
    )


def args(case: Case) -> dict[str, Any]:
    """parts and sinks, in float32."""
    rng = np.random.default_rng(crc32(case.id.encode()))
    parts = [answers(rng, n, case.B, case.Hq, case.L, case.D) for n in case.parts]
    for part in parts:  # the last row has seen nothing anywhere
        part.out[..., -1, -1, :], part.lse[..., -1, -1] = 0, -np.inf
    sinks = rng.standard_normal(case.Hq).astype(np.float32) if case.sinks else None
    return {"parts": parts, "sinks": sinks}


CASES = [
    *(Case(2, 4, 3, D, parts, sinks) for D in HEAD_DIMS for parts, sinks in [((0, 5), True)]),
    *(Case(D=D, parts=(0, 0)) for D in (16, 208)),
    *(
        Case(B=2, L=2, parts=parts, sinks=sinks)
        for parts in ((0,), (1,), (7,), (200,), (0, 33, 1), (1, 0, 2, 0, 3, 4), (0,) * 13)
        for sinks in (False, True)
    ),
]
