"""Triton's `attend_state` against the definition in float64, and the bytes that it moves."""

from __future__ import annotations

import numpy as np
import pytest

from kvc.ops.evict import attend_state
from tests.cases import assert_close, exact
from tests.cases.attend_state import CASES, Case, args
from tests.tolerances import PRODUCTS
from tests.triton_device import counted, kernels, marks, on_gpu, tensor

pytestmark = marks()

MAPS = [(4, 64, 64), (4, 64, 8)]  # A1 [Hq, D, M] and A2 [Hq, M, R]
SHAPES = [(1, 4, 2, 64), (1, 2, 8, 64), (1, 2, 8)]  # of q, state and norm


def compare(case: Case) -> None:
    """Runs the kernel, and the definition on the same numbers in float64."""
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import attend_state as kernel

    inputs = args(case)
    with kernels() as device:
        q = tensor(inputs["q"], case.dtype, device)
        state, norm = (tensor(inputs[name], "float32", device) for name in ("state", "norm"))
        maps = type(inputs["kernels"])(*(tensor(x, case.maps, device) for x in inputs["kernels"]))
        assert kernel.why_not(q, state, norm, maps) is None
        out, lse = kernel.run(q, state, norm, maps)
    wide = [exact(ops, x) for x in (q, state, norm)]
    want = attend_state.define(*wide, type(maps)(*(exact(ops, x) for x in maps)))
    assert_close("out", exact(ops, out), want.out, PRODUCTS["float32"])
    assert_close("lse", exact(ops, lse), want.lse, PRODUCTS["float32"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attend_state(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3.0])
def test_gelu_is_the_exact_one(scale: float) -> None:
    """Features near zero, and where gelu is small against its argument."""
    import torch

    from kvc.backends.torch import ops
    from kvc.cuda_kernels import attend_state as kernel
    from kvc.ops.evict import Kernels

    rng = np.random.default_rng(0)
    maps = [scale * rng.standard_normal(shape).astype(np.float32) for shape in MAPS]
    with kernels() as device:
        q, state, norm = (
            tensor(rng.random(shape).astype(np.float32), "float32", device) for shape in SHAPES
        )
        some = Kernels(*(tensor(x, "float32", device) for x in maps), *[torch.zeros(0)] * 5)
        out, lse = kernel.run(q, state, norm, some)
    wide = [exact(ops, x) for x in (q, state, norm, *some)]
    want = attend_state.define(*wide[:3], Kernels(*wide[3:]))
    assert_close("out", exact(ops, out), want.out, PRODUCTS["float32"])
    assert_close("lse", exact(ops, lse), want.lse, PRODUCTS["float32"])


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
@pytest.mark.parametrize(
    "case",
    [Case(D=80, M=132, R=5), Case(B=19, G=3, L=3), Case("float32", "float32", B=2, L=2)],
    ids=lambda case: case.id,
)
def test_traffic_is_what_a_launch_moves(case: Case) -> None:
    from kvc.cuda_kernels.attend_state import traffic

    with counted() as count:
        compare(case)
    sizes = (case.B, case.H * case.G, case.H, case.L, case.D, case.M, case.R)
    itemsizes = (4 if x == "float32" else 2 for x in (case.dtype, case.maps))
    assert traffic(*sizes, *itemsizes).touched == count.touched


def test_little_more_than_the_maps_is_moved() -> None:
    from kvc.cuda_kernels.attend_state import traffic

    assert traffic(1, 32, 8, 1, 128, 512, 8, 2, 2).ratio <= 1.05
