"""Triton's `merge_pair` against the definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvc.ops.merge import merge_pair
from tests.cases import assert_close, exact, view
from tests.cases.merge_pair import CASES, Case, args
from tests.tolerances import STORED
from tests.triton_device import counted, kernels, marks, on_gpu

pytestmark = marks()


def compare(case: Case) -> None:
    """Runs the kernel, and the definition in float64."""
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import merge_pair as kernel

    given = args(case)
    how: tuple[Any, ...] = (given["t"], case.how, case.granularity)
    with kernels() as device:
        xa, xb = (view(ops, given[x], case.dtype, axis=2).to(device) for x in ("xa", "xb"))
        assert kernel.why_not(xa, xb, *how) is None
        got = kernel.run(xa, xb, *how)
    want = merge_pair.define(exact(ops, xa), exact(ops, xb), *how)
    for name, y in want._asdict().items():
        found = getattr(got, name)
        assert ops.dtype_name(found) == "float32"
        assert found.shape == y.shape
        assert_close(name, exact(ops, found), y, STORED["float32"])


# the interpreter takes seconds for a million numbers
SOME = [case for case in CASES if on_gpu() or case.H * case.T * case.D < 2**18]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_merge_pair(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("angle", [1e-6, 9e-4, 1.1e-3, 1.5, 3.13, 3.1407, 3.1415])
def test_every_angle(t: float, angle: float) -> None:
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import merge_pair as kernel

    xa, xb = np.zeros((2, 1, 1, 1, 16), np.float32)
    xa[..., 0], xb[..., :2] = 2, (3 * np.cos(angle), 3 * np.sin(angle))
    with kernels() as device:
        got = kernel.run(*(ops.from_numpy(x).to(device) for x in (xa, xb)), t)
    want = merge_pair.define(xa.astype(np.float64), xb.astype(np.float64), t)
    for name, y in want._asdict().items():
        # near pi, u + v is what float32 leaves of two unit vectors
        np.testing.assert_allclose(exact(ops, getattr(got, name)), y, 1e-6, 2e-4 * (angle > 3.1))


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
@pytest.mark.parametrize("granularity", ["head", "token"])
def test_traffic_is_what_a_launch_moves(granularity: Any) -> None:
    from kvc.cuda_kernels.merge_pair import traffic

    with counted() as count:
        compare(Case(H=3, T=37, D=80, granularity=granularity))
    told = traffic(2, 3, 37, 80, 2, granularity)
    assert told.touched == count.touched
    assert told.ratio == 1


def test_what_it_does_not_take() -> None:
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import merge_pair as kernel

    with kernels() as device:
        x = ops.from_numpy(np.zeros((1, 129, 1, 128), np.float32)).to(device)
        assert "not 16512" in str(kernel.why_not(x, x, 0.6, "slerp", "token"))
        assert "not 1.5" in str(kernel.why_not(x, x, 1.5))
        assert "not float64" in str(kernel.why_not(x.double(), x, 0.6))
