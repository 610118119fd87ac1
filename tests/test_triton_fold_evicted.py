"""Triton's `fold_evicted` against the definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvc.ops.evict import Kernels, fold_evicted
from tests.cases import assert_close, exact, view
from tests.cases.fold_evicted import CASES, Case, args
from tests.tolerances import STORED
from tests.triton_device import counted, kernels, marks, on_gpu, tensor

pytestmark = marks()


def compare(case: Case, state_dtype: str = "float32") -> None:
    """Runs the kernel, and the definition in float64."""
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import fold_evicted as kernel

    given = args(case)
    with kernels() as device:
        state, norm = (tensor(given[x], state_dtype, device) for x in ("state", "norm"))
        k, v = (view(ops, given[x], case.dtype, axis=2).to(device) for x in ("k", "v"))
        valid = ops.from_numpy(given["valid"]).to(device)
        maps = Kernels(*(tensor(x, case.maps, device) for x in given["kernels"]))
        before = state.clone()
        assert kernel.why_not(state, norm, k, v, valid, maps) is None
        got = kernel.run(state, norm, k, v, valid, maps)
        assert (state == before).all()
    wide: list[Any] = [exact(ops, x) for x in (state, norm, k, v)]
    want = fold_evicted.define(*wide, given["valid"], Kernels(*(exact(ops, x) for x in maps)))
    for name, x, y in zip(("state", "norm"), got, want, strict=True):
        assert ops.dtype_name(x) == state_dtype
        assert_close(name, exact(ops, x), y, STORED[state_dtype])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_fold_evicted(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("T", [1, 200])  # of one program for a head, and of several
def test_a_state_in_16_bits(T: int) -> None:
    compare(Case(T=T, M=32), "bfloat16")


def test_the_order_of_sums_is_always_the_same() -> None:
    from kvc.cuda_kernels import fold_evicted as kernel

    given = args(Case(T=300, M=16))
    with kernels() as device:
        names = ("state", "norm", "k", "v")
        inputs = [tensor(given[x], "float32", device) for x in names]
        valid = tensor(given["valid"], "float32", device) > 0
        maps = Kernels(*(tensor(x, "float32", device) for x in given["kernels"]))
        one, two = (kernel.run(*inputs, valid, maps) for _ in range(2))
    for x, y in zip(one, two, strict=True):
        assert (x == y).all()


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
@pytest.mark.parametrize("T", [1, 40, 200])
def test_traffic_is_what_a_launch_moves(T: int) -> None:
    from kvc.cuda_kernels.fold_evicted import traffic

    with counted() as count:
        compare(Case(maps="float16", T=T, D=128, M=64, valid="all"))
    told = traffic(1, 2, T, 128, 64, 8, 2, 2)
    assert told.touched == count.touched
    assert T > 1 or told.ratio <= 1.05


def test_what_it_does_not_take() -> None:
    from kvc.cuda_kernels import fold_evicted as kernel

    with kernels() as device:
        state = tensor(np.zeros((1, 2, 40, 64)), "float32", device)
        k = tensor(np.zeros((1, 2, 1, 64)), "float16", device)
        maps = Kernels(*[k] * 7)
        assert "not 40" in str(kernel.why_not(state, state, k, k, k > 0, maps))
        assert "not 60" in str(kernel.why_not(state[:, :, :8, :60], state, k, k, k > 0, maps))
