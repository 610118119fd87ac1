"""The Metal kernel of `quantize`, executed in the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.ops.dispatch import mode, why_no_kernel
from kvc.ops.quant import quantize
from tests.cases import exact, view
from tests.cases.quantize import CASES, Case, args, assert_codes, assert_rounded
from tests.conftest import need
from tests.metal import on_metal

INCLUDED = ("code_of",)  # other shaders that it runs


def inputs(case: Case) -> tuple[Any, ...]:
    """What the op is given on MLX: a block inside a larger buffer."""
    from kvc.backends.mlx import ops as xp

    x = view(xp, args(case)["x"], case.dtype, axis=2)
    dtypes = (xp.dtype(name or case.dtype) for name in (case.scale, case.zero))
    return x, case.bits, case.role, case.backbone, case.group, *dtypes


def check(case: Case) -> None:
    from kvc.backends.mlx import ops as xp

    x, *how, scale, zero = inputs(case)
    got = quantize(x, *how, scale, zero)
    with mode("reference"):
        alike = quantize(x, *how, scale, zero)
        want = quantize(exact(xp, x), *how, np.dtype("float64"), np.dtype("float64"))
    for name, y in alike._asdict().items():
        assert (getattr(got, name).shape, getattr(got, name).dtype) == (y.shape, y.dtype), name
    assert_rounded(xp, "step", got.step, want.step, 2e-7)  # computed in float32
    assert_rounded(xp, "low", got.low, want.low, 0)
    assert_codes(xp, got, exact(xp, x), *how)


def check_quickly() -> None:
    """A few cases that reach every line of the shaders."""
    with on_metal():
        for case in (
            Case("float32", 2, "k", "kivi", 100, 80, 20),
            Case("float16", 4, "v", "kivi", 65, 80, 16, 3, 2),
            Case("float32", 8, "k", "token", 37, 48, 16),
            Case("float16", 2, "v", "kcvt", 20, 64, H=3, B=2),
            Case("float32", 2, "k", "kcvt", 2100, 16, H=1),
        ):
            check(case)
        check_axes()


def check_axes() -> None:
    """The same codes from a block whose axes lie in another order."""
    from kvc.backends.mlx import ops as xp

    x, *how = inputs(Case(H=3))
    for a, b in ((1, 2), (2, 3), (1, 3)):
        turned = xp.copy(x.swapaxes(a, b)).swapaxes(a, b)
        for got, want in zip(quantize(turned, *how), quantize(x, *how), strict=True):
            assert np.array_equal(exact(xp, got), exact(xp, want))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_it_is_the_definition(metal: None, case: Case) -> None:
    check(case)


CASE = st.builds(
    Case,
    dtype=st.sampled_from(["float16", "float32"]),
    role=st.sampled_from(["k", "v"]),
    backbone=st.sampled_from(["token", "kcvt"]),
    n=st.integers(1, 300),
    D=st.sampled_from([32, 96, 224]),
    group=st.sampled_from([8, 16, 32]),
    H=st.integers(1, 9),
)


@pytest.mark.metal
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=CASE)
def test_it_is_the_definition_at_any_size(case: Case) -> None:
    need("mlx")
    with on_metal():
        check(case)


def test_a_step_too_small_for_its_type_is_a_constant_group(metal: None) -> None:
    from kvc.backends.mlx import ops as xp

    case = Case("float32", scale="float16", zero="float32")
    x, *how = inputs(case)
    got = quantize(x * 1e-10, *how)
    assert (exact(xp, got.step) == 1).all()
    assert (xp.to_numpy(got.codes) == 0).all()


def test_the_axes_may_lie_in_any_order(metal: None) -> None:
    check_axes()


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("backbone", ["kivi", "token", "kcvt"])
@pytest.mark.parametrize("n", [64, 1000])
def test_a_byte_is_moved_once(sim: Any, role: Any, backbone: Any, n: int) -> None:
    case = Case(role=role, backbone=backbone, n=n, D=128, group=64 if n == 64 else 8)
    x, *how = inputs(case)
    code = quantize(x, *how)
    (launch,) = sim.launches
    least = x.nbytes + sum(y.nbytes for y in code)
    assert least <= launch.loaded + launch.stored <= 1.02 * least
    assert launch.threadgroup_bytes <= 24 * 1024


def test_a_group_longer_than_a_tile_is_read_twice(sim: Any) -> None:
    x, *how = inputs(Case(backbone="kcvt", n=4096, D=32, H=1))
    code = quantize(x, *how)
    (launch,) = sim.launches
    least = 2 * x.nbytes + sum(y.nbytes for y in code)
    assert least <= launch.loaded + launch.stored <= 1.02 * least


def test_what_it_does_not_take(metal: None) -> None:
    x, *how = inputs(Case())
    assert "got 60" in str(why_no_kernel("quantize", "mlx", x[..., :60], *how))
    odd = inputs(replace(Case(n=1998), group=999))
    assert "got 999" in str(why_no_kernel("quantize", "mlx", *odd))
