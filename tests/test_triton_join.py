"""Triton's `join` against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest

from kvc.ops.attention import Partial, join
from tests.cases import assert_close, exact
from tests.cases.join import CASES, Case, args
from tests.tolerances import PRODUCTS
from tests.triton_device import counted, kernels, marks, on_gpu, tensor

pytestmark = marks()


def wide(part: Partial) -> Partial:
    return Partial(*(np.asarray(x, np.float64) for x in part))


def compare(case: Case, dtype: str = "float32") -> None:
    """Runs the kernel, and the definition in float64."""
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import join as kernel

    inputs = args(case)
    want = join.define([wide(part) for part in inputs["parts"]], sinks=inputs["sinks"])
    with kernels() as device:
        parts = [Partial(*(tensor(x, "float32", device) for x in p)) for p in inputs["parts"]]
        sinks = None if inputs["sinks"] is None else tensor(inputs["sinks"], "float32", device)
        assert kernel.why_not(parts, sinks=sinks, dtype=ops.dtype(dtype)) is None
        out, lse = kernel.run(parts, sinks=sinks, dtype=ops.dtype(dtype))
    assert ops.dtype_name(out) == dtype
    assert_close("out", exact(ops, out), want.out, PRODUCTS[dtype])
    assert_close("lse", exact(ops, lse), want.lse, PRODUCTS["float32"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_join(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_returned_in_16_bits(dtype: str) -> None:
    compare(Case(B=2, D=80, parts=(0, 5), sinks=True), dtype)


def test_answers_in_16_bits_are_not_taken() -> None:
    from kvc.cuda_kernels import join as kernel

    with kernels() as device:
        x = tensor(np.zeros((1, 2, 1, 64)), "float16", device)
        assert kernel.why_not([Partial(x, x[..., 0])]) == "takes answers in float32"


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
def test_traffic_is_what_a_launch_moves() -> None:
    from kvc.cuda_kernels.join import traffic

    with counted() as count:
        compare(Case(B=2, Hq=3, L=2, D=80, parts=(0, 7, 40), sinks=True), "float16")
    told = traffic(2 * 3 * 2, 80, 48, itemsize=2, sinks=4)
    assert told.touched == count.touched
    assert told.ratio <= 1.05
