"""The Metal kernel of `attend_state`, executed in the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvc.ops.dispatch import mode, why_no_kernel
from kvc.ops.evict import Kernels, attend_state
from tests.cases import array, assert_close, exact, view
from tests.cases.attend_state import CASES, Case, args
from tests.metal import on_metal
from tests.tolerances import TOLERANCES


def inputs(case: Case) -> tuple[Any, Any, Any, Kernels]:
    """What the op is given on MLX: queries turned, the state inside larger buffers."""
    from kvc.backends.mlx import ops as xp

    found = args(case)
    q = view(xp, found["q"].swapaxes(1, 2), case.dtype, axis=1).swapaxes(1, 2)
    state, norm = (view(xp, found[name], "float32", axis=1) for name in ("state", "norm"))
    return q, state, norm, Kernels(*(array(xp, x, case.maps) for x in found["kernels"]))


def check(case: Case) -> None:
    """Compares the kernel with the definition in float64, of the inputs as they are rounded."""
    from kvc.backends.mlx import ops as xp

    q, state, norm, kernels = inputs(case)
    got = attend_state(q, state, norm, kernels)
    wide = Kernels(*(exact(xp, x) for x in kernels))
    with mode("reference"):
        want = attend_state(*(exact(xp, x) for x in (q, state, norm)), wide)
    for name, x in want._asdict().items():
        assert_close(name, exact(xp, getattr(got, name)), x, TOLERANCES["float32"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_it_is_the_definition(metal: None, case: Case) -> None:
    check(case)


def check_quickly() -> None:
    """Few cases that touch every line; `tests.metal_mutants` runs them."""
    with on_metal():
        check(Case(B=3, L=3, G=3, empty=True))
        check(Case("float32", "float32", D=80, M=132, R=33, B=2, L=2))


@pytest.mark.parametrize("B", [1, 2])
def test_a_byte_is_moved_once(sim: Any, B: int) -> None:
    q, state, norm, kernels = inputs(Case(B=B, H=8, G=4, D=128, M=512))
    out, lse = attend_state(q, state, norm, kernels)
    (launch,) = sim.launches
    read = (q, state, norm, kernels.a1, kernels.a2)
    least = sum(x.nbytes for x in (*read, out, lse))
    assert least <= launch.loaded + launch.stored <= 1.10 * least


def test_threadgroup_memory_leaves_room_for_others(sim: Any) -> None:
    attend_state(*inputs(Case(D=128, M=512)))
    attend_state(*inputs(Case(D=256, M=512, L=8)))
    assert sim.launches[0].threadgroup_bytes <= 4096
    assert sim.launches[1].threadgroup_bytes <= 32768


def test_what_it_does_not_take_it_says(metal: None) -> None:
    import mlx.core as mx

    def reason(L: int = 1, D: int = 64, M: int = 64, dtype: mx.Dtype = mx.float16) -> str | None:
        a1, a2 = mx.zeros((2, D, M), dtype), mx.zeros((2, M, 8), dtype)
        q, state, norm = mx.zeros((1, 2, L, D)), mx.zeros((1, 2, 8, D)), mx.zeros((1, 2, 8))
        kernels = Kernels(a1, a2, a1, a2, a2, norm, norm)
        return why_no_kernel("attend_state", "mlx", q, state, norm, kernels)

    assert reason() is None
    assert "9" in str(reason(L=9))
    assert "not 60" in str(reason(M=60))
    assert reason(M=60, dtype=mx.float32) is None
    assert "up to 512, not 520" in str(reason(L=8, M=520))
    assert "not 72" in str(reason(D=72))
    assert "float32" in str(reason(dtype=mx.float64))


def test_erf_is_within_its_bound(metal: None) -> None:
    from math import erf
    from pathlib import Path

    import mlx.core as mx

    import kvc.metal_kernels

    x = np.concatenate([np.linspace(-6, 6, 20001), [0.0, 1e-20, -50.0, 3e38]]).astype(np.float32)
    kernel = mx.fast.metal_kernel(
        name="erf",
        input_names=["x"],
        output_names=["y"],
        source="y[thread_position_in_grid.x] = erf(x[thread_position_in_grid.x]);",
        header=(Path(kvc.metal_kernels.__file__).parent / "gelu.metal").read_text("utf-8"),
    )
    (y,) = kernel(
        inputs=[mx.array(x)],
        output_shapes=[x.shape],
        output_dtypes=[mx.float32],
        grid=(x.size, 1, 1),
        threadgroup=(256, 1, 1),
    )
    want = np.array([erf(float(n)) for n in x])
    assert np.abs(np.array(y) - want).max() < 3e-7
