"""The Metal kernel of `fold_evicted`, executed in the simulator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.ops.dispatch import mode, why_no_kernel
from kvc.ops.evict import Kernels, fold_evicted
from tests.cases import array, assert_close, exact, view
from tests.cases.fold_evicted import CASES, Case, args
from tests.conftest import need
from tests.metal import on_metal
from tests.tolerances import TOLERANCES

INCLUDED = ("gelu", "tokens")  # other shaders that it runs


def inputs(case: Case) -> tuple[Any, ...]:
    """What the op is given on MLX: tokens inside larger buffers, NaN where there is none."""
    from kvc.backends.mlx import ops as xp

    found = args(case)
    gone = ~found["valid"][..., None]
    k, v = (
        view(xp, np.where(gone, np.float32(np.nan), found[name]), case.dtype, axis=2)
        for name in "kv"
    )
    state, norm, valid = (xp.from_numpy(found[name]) for name in ("state", "norm", "valid"))
    kernels = Kernels(*(array(xp, b, case.maps) for b in found["kernels"]))
    return state, norm, k, v, valid, kernels


def defined(state: Any, norm: Any, k: Any, v: Any, valid: Any, kernels: Any) -> Any:
    """The definition in float64, of the inputs as they are rounded."""
    from kvc.backends.mlx import ops as xp

    wide = [np.nan_to_num(exact(xp, x)) for x in (state, norm, k, v)]
    with mode("reference"):
        return fold_evicted(*wide, xp.to_numpy(valid), Kernels(*(exact(xp, b) for b in kernels)))


def check(case: Case) -> None:
    from kvc.backends.mlx import ops as xp

    given = inputs(case)
    for name, got, want in zip(
        ("state", "norm"), fold_evicted(*given), defined(*given), strict=True
    ):
        assert_close(name, exact(xp, got), want, TOLERANCES["float32"])


def check_gelu() -> None:
    """erf within 2e-7, gelu within a millionth."""
    import mlx.core as mx

    from kvc.metal_kernels import kernel

    x = np.concatenate([np.linspace(-8, 8, 4001), 10.0 ** np.arange(-9, 9)]).astype(np.float32)
    compute = mx.fast.metal_kernel(
        "gelu",
        ["x"],
        ["y", "z"],
        "const uint i = thread_position_in_grid.x; y[i] = erf(x[i]); z[i] = gelu(x[i]);",
        header=kernel.text("gelu"),
    )
    y, z = compute(
        inputs=[mx.array(x)],
        output_shapes=[x.shape] * 2,
        output_dtypes=[mx.float32] * 2,
        grid=(len(x), 1, 1),
        threadgroup=(256, 1, 1),
    )
    want = np.array([math.erf(v) for v in x])
    assert np.abs(np.array(y) - want).max() < 2e-7
    half = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()])
    assert (np.abs(np.array(z) - half) < 1e-6 * np.maximum(1, np.abs(half))).all()


def check_quickly() -> None:
    """A few cases that reach every line of the shaders."""
    with on_metal():
        for case in (
            Case(B=3, T=3, M=300, valid="shared"),
            Case("float32", B=2, T=37, D=80, R=5),
            Case(T=130, M=40),
            Case(T=40, valid="none"),
        ):
            check(case)
        check_gelu()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_it_is_the_definition(metal: None, case: Case) -> None:
    check(case)


@pytest.mark.metal
@settings(max_examples=15, deadline=None, derandomize=True)
@given(B=st.integers(2, 3), H=st.integers(1, 3), T=st.integers(9, 300), M=st.integers(1, 300))
def test_it_is_the_definition_at_any_size(B: int, H: int, T: int, M: int) -> None:
    need("mlx")
    with on_metal():
        check(Case(B=B, H=H, T=T, M=M))


def test_gelu_is_exact(metal: None) -> None:
    check_gelu()


def test_nothing_is_read_where_there_is_no_token(sim: Any) -> None:
    fold_evicted(*inputs(Case(T=9, valid="none")))
    (launch,) = sim.launches
    assert not any(launch.loaded_by[name] for name in ("k", "v", "b1", "b2", "b3"))


def test_a_byte_is_moved_once_in_decoding(sim: Any) -> None:
    for B in (1, 4):
        state, norm, k, v, _, kernels = given = inputs(Case(B=B, D=128, M=512, valid="all"))
        fold_evicted(*given)
        maps = sum(b.nbytes for b in kernels[2:])
        least = 2 * (state.nbytes + norm.nbytes) + k.nbytes + v.nbytes + maps
        moved = sim.launches[-1].loaded + sim.launches[-1].stored
        assert least <= moved <= 1.01 * least


def test_a_prompt_reads_the_maps_once_for_16_tokens(sim: Any) -> None:
    T = 1000
    *_, k, v, valid, kernels = given = inputs(Case(H=1, T=T, D=128, M=512, valid="all"))
    new_state, new_norm = fold_evicted(*given)
    (launch,) = sim.launches
    maps = sum(b.nbytes for b in kernels[2:])
    parts = -(-T // 128) * (new_state.nbytes + new_norm.nbytes)
    least = -(-T // 16) * maps + k.nbytes + v.nbytes + valid.nbytes + parts
    assert launch.loaded + launch.stored <= 1.05 * least
    assert launch.threadgroup_bytes <= 28 * 1024


def test_what_it_does_not_take(metal: None) -> None:
    state, norm, k, v, valid, kernels = inputs(Case(T=2))
    for call, reason in [
        ((state, norm, k[:, :, :0], v[:, :, :0], valid[:, :, :0], kernels), "one token"),
        ((state, norm, k, v.astype(state.dtype), valid, kernels), "for k and v"),
        ((state.astype(k.dtype), norm, k, v, valid, kernels), "float32 state"),
        (inputs(Case(R=33)), "got 64 and 33"),
    ]:
        assert reason in str(why_no_kernel("fold_evicted", "mlx", *call))
