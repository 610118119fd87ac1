"""Triton's `quantize` against the definition in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.ops.quant import pack_tokens, quantize, unpack_tokens
from tests.cases import exact, view
from tests.cases.quantize import CASES, Case, args, assert_codes, assert_rounded
from tests.triton_device import counted, kernels, marks, on_gpu

pytestmark = marks()

SOME = CASES if on_gpu() else CASES[::4]  # 23 layouts in turn, so that each of them is there


def inputs(case: Case, device: str) -> tuple[Any, ...]:
    """A block inside a larger buffer, and how to code it."""
    from kvc.backends.torch import ops

    x = view(ops, args(case)["x"], case.dtype, axis=2).to(device)
    dtypes = (ops.dtype(name or case.dtype) for name in (case.scale, case.zero))
    return x, case.bits, case.role, case.backbone, case.group, *dtypes


def compare(case: Case) -> None:
    """Runs the kernel, and the definition in float64."""
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import quantize as kernel

    with kernels() as device:
        x, *how, scale, zero = inputs(case, device)
        assert kernel.why_not(x, *how, scale, zero) is None
        got = kernel.run(x, *how, scale, zero)
    alike = quantize.define(x, *how, scale, zero)
    want = quantize.define(exact(ops, x), *how, *[np.dtype("float64")] * 2)
    for name, y in alike._asdict().items():
        assert (getattr(got, name).shape, getattr(got, name).dtype) == (y.shape, y.dtype), name
    assert_rounded(ops, "step", got.step, want.step, 2e-7)  # computed in float32
    assert_rounded(ops, "low", got.low, want.low, 0)
    assert_codes(ops, got, exact(ops, x), *how)
    codes = unpack_tokens(got.codes, case.bits, case.role, case.D, 0, case.n)
    assert (got.codes == pack_tokens(codes, case.bits, case.role)).all()  # zeros behind the last


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_quantize(case: Case) -> None:
    compare(case)


@settings(max_examples=40 if on_gpu() else 8, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
        bits=st.sampled_from([2, 4, 8]),
        role=st.sampled_from(["k", "v"]),
        backbone=st.sampled_from(["token", "kcvt"]),
        n=st.integers(1, 130),
        D=st.sampled_from([32, 96, 224]),
        group=st.sampled_from([8, 16, 32]),
        H=st.integers(1, 5),
    )
)
def test_blocks_of_any_size(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("role", ["k", "v"])
def test_groups_that_no_words_end_with(role: Any) -> None:
    compare(Case(role=role, n=120, D=80, group=40))


def test_a_step_too_small_for_its_type_is_a_constant_group() -> None:
    from kvc.cuda_kernels import quantize as kernel

    with kernels() as device:
        x, *how = inputs(Case("float32", scale="float16", zero="float32"), device)
        got = kernel.run(x * 1e-10, *how)
    assert (got.step == 1).all()
    assert (got.codes == 0).all()


def test_the_axes_may_lie_in_any_order() -> None:
    from kvc.cuda_kernels import quantize as kernel

    with kernels() as device:
        x, *how = inputs(Case(H=3), device)
        for a, b in ((1, 2), (2, 3), (1, 3)):
            turned = x.transpose(a, b).contiguous().transpose(a, b)
            for got, want in zip(kernel.run(turned, *how), kernel.run(x, *how), strict=True):
                assert (got == want).all()


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
@pytest.mark.parametrize("backbone", ["kivi", "token", "kcvt"])
@pytest.mark.parametrize("role", ["k", "v"])
def test_traffic_is_what_a_launch_moves(role: Any, backbone: Any) -> None:
    from kvc.cuda_kernels.quantize import traffic

    case = Case(role=role, backbone=backbone, n=100 if backbone == "kcvt" else 192, D=80, group=16)
    with counted() as count:
        compare(case)
    told = traffic((1, 2, case.n, 80), 2, 2, role, backbone, 16)
    assert told.touched == count.touched
    assert told.ratio <= (1.9 if role == "k" and backbone == "kcvt" else 1)


def test_what_it_does_not_take() -> None:
    from kvc.cuda_kernels import quantize as kernel

    with kernels() as device:
        x, *how = inputs(Case(), device)
        assert "not 60" in str(kernel.why_not(x[..., :60], *how))
        assert "not float64" in str(kernel.why_not(x.double(), *how))
        assert "not float64" in str(kernel.why_not(x, *how[:-1], x.double().dtype))
        odd = inputs(replace(Case(n=1998), group=999), device)
        assert "not 999" in str(kernel.why_not(*odd))
