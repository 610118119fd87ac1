"""Triton's `attend_coded` against the definition in float64, and the bytes that it moves."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from kvc.ops.attention import Partial, attend_coded, join
from kvc.ops.dispatch import mode
from kvc.store.coded import Coded
from tests.cases import array, assert_close, exact
from tests.cases.attend_coded import CASES, Case, args, in_float64, pasts
from tests.tolerances import PRODUCTS
from tests.triton_device import counted, kernels, marks, on_gpu

pytestmark = marks()

WORK = 50_000  # numbers of K in a case that the interpreter takes in seconds; a GPU takes all
WIDE = 128  # channels of outliers and two-sided scales
TAKEN = [case for case in CASES if case.D <= WIDE or case.method not in ("gear", "gear2")]
SOME = [case for case in TAKEN if on_gpu() or case.B * case.H * case.D * sum(case.blocks) <= WORK]


def numbers(x: Any) -> np.ndarray[Any, Any]:
    """A tensor in NumPy; floats in float64."""
    from kvc.backends.torch import ops

    return exact(ops, x) if x.dtype.is_floating_point else ops.to_numpy(x)


def inputs(case: Case, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the op is given: coded tokens, and queries that lie in another order."""
    from kvc.backends.torch import ops

    def to(x: np.ndarray[Any, Any]) -> Any:
        made = ops.from_numpy(x) if x.dtype == np.int32 else array(ops, x, case.dtype)
        return made.to(device)

    found = args(case)
    q = to(found["q"])
    if case.B == 1:
        q = q.swapaxes(1, 2).contiguous().swapaxes(1, 2)
    with mode("reference"):
        k, v, valid = pasts(case, to)
    return (q, k, v, found["scale"]), {"softcap": case.softcap, "valid": valid}


def check(case: Case) -> None:
    """Compares the kernel, piece by piece as a cache calls it, with the definition."""
    from kvc.cuda_kernels import attend_coded as kernel

    with kernels() as device:
        given, options = inputs(case, device)
        q, k, v, scale = given
        parts = []
        for piece_k, piece_v in zip(k.pieces(), v.pieces(), strict=True):
            assert kernel.why_not(q, piece_k, piece_v, scale, **options) is None
            parts.append(Partial(*map(numbers, kernel.run(q, piece_k, piece_v, scale, **options))))
    with mode("reference"):
        got = join(parts)
        valid = None if options["valid"] is None else numbers(options["valid"])
        wide = numbers(q), in_float64(k, numbers), in_float64(v, numbers)
        want = attend_coded(*wide, scale, softcap=options["softcap"], valid=valid)
    for name, x in want._asdict().items():
        assert_close(name, getattr(got, name), x, PRODUCTS[case.dtype])


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_attend_coded(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case("kivi", (("bits", 4),), (64,) * 4, G=2),
        Case("kcvt", (("bits", 8),), (20,) * 4),
        Case(
            "gear2", (("outliers", 0.05), ("sink", 0), ("window", 0)), (128,) * 3, dtype="float32"
        ),
    ],
    ids=lambda case: case.id,
)
def test_the_device_says_how_many_tokens_there_are(case: Case) -> None:
    """What lies behind them is not read, and programs without any leave an empty answer."""
    import torch

    from kvc.cuda_kernels import attend_coded as kernel

    n, room = case.blocks[0], len(case.blocks)
    with kernels() as device:
        (q, k, v, scale), _ = inputs(case, device)
        for past in (k, v):  # as a cache leaves it: anything may be there
            past.runs[0].code.d[2][-1] = float("nan")
        answers = []
        for blocks in (0, 1, room - 1):
            length = torch.tensor([blocks * n], dtype=torch.int32, device=device)
            assert kernel.why_not(q, k, v, scale, length=length) is None
            answers.append(Partial(*map(numbers, kernel.run(q, k, v, scale, length=length))))
    assert len({answer.out.shape for answer in answers}) == 1
    assert not answers[0].out.any()
    assert np.isneginf(answers[0].lse).all()
    with mode("reference"):
        for blocks, got in zip((1, room - 1), answers[1:], strict=True):
            some = []
            for past in (k, v):
                wide = in_float64(past, numbers)
                assert isinstance(wide, Coded)
                wide.runs[0].n = blocks
                some.append(wide)
            want = attend_coded(numbers(q), *some, scale)
            for name, x in want._asdict().items():
                assert_close(name, getattr(join([got]), name), x, PRODUCTS[case.dtype])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["kivi", "gear-l", "gear2", "kcvt", "token"])
def test_a_launch_moves_hardly_more_than_it_must(name: str, bits: int) -> None:
    """Of prompts, and of blocks that were coded one by one, with partial answers.

    All heads share the steps of kcvt's values, and the programs of each head read them.
    """
    import torch

    from kvc.cuda_kernels.attend_coded_traffic import traffic
    from kvc.cuda_kernels.attend_coded_variants import layouts

    more: dict[str, Any] = {"gear-l": {"rank": 4}, "gear2": {"rank": 2, "scales": "dual"}}
    backbone, most = name if name in ("kcvt", "token") else "kivi", 1.15 if name == "kcvt" else 1.05
    size = 128 if name == "gear2" else 64
    for T, D, (B, H), G in product(
        (1000, 4096, 32768, 131072), (64, 128), ((1, 8), (1, 32), (4, 8), (16, 8)), (1, 4, 8)
    ):
        whole = T if backbone != "kivi" else -(-T // size) * size
        for n, blocks in ((whole, 1), (size, -(-T // size))):
            pair = layouts(
                backbone, bits, n, blocks, D, torch.float16, B=B, H=H, **more.get(name, {})
            )
            q = torch.empty((B, H * G, 1, D), dtype=torch.float16, device="meta")
            assert traffic(q, *pair).ratio <= most, (T, D, B, H, G, n)


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
@pytest.mark.parametrize(
    "case",
    [
        Case("kivi", (("bits", 4),), (640,), G=4),
        Case("kivi", (("bits", 8),), (64,) * 3, G=2, D=128),
        Case("gear-l", (("bits", 4), ("rank", 4)), (64,) * 3, G=4, D=128),
        Case("kcvt", (), (20,) * 5, G=2),
        Case("token", (), (90,), G=4),
        Case("gear2", (), (128,) * 2, G=4),
        Case("token", (), (40,), "kept", G=4),
        Case("gear-l", (("bits", 4), ("rank", 4)), (64,) * 2, H=1, G=2, D=256),
    ],
    ids=lambda case: case.id,
)
def test_traffic_is_what_a_launch_moves(case: Case) -> None:
    from kvc.cuda_kernels import attend_coded as kernel
    from kvc.cuda_kernels.attend_coded_traffic import traffic

    with kernels() as device:
        given, options = inputs(case, device)
        with counted() as count:
            kernel.run(*given, **options)
    q, k, v, _ = given
    told = traffic(q, k.layout(), v.layout(), options["valid"] is not None)
    assert told.touched == count.touched
