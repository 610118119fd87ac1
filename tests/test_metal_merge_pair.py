"""The Metal kernel of `merge_pair`, executed in the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.ops.dispatch import mode, why_no_kernel
from kvc.ops.merge import Merged, merge_pair
from tests.cases import assert_close, exact, view
from tests.cases.merge_pair import CASES, HOWS, Case, args
from tests.conftest import need
from tests.metal import on_metal
from tests.tolerances import TOLERANCES

INCLUDED = ("tokens",)  # other shaders that it runs


def inputs(case: Case) -> tuple[Any, ...]:
    """What the op is given on MLX: vectors inside larger buffers, the second with heads last."""
    from kvc.backends.mlx import ops as xp

    found = args(case)
    xa = view(xp, found["xa"], case.dtype, axis=2)
    xb = view(xp, found["xb"].swapaxes(1, 2), case.dtype, axis=1).swapaxes(1, 2)
    return xa, xb, found["t"], case.how, case.granularity


def check(case: Case) -> None:
    from kvc.backends.mlx import ops as xp

    xa, xb, *how = inputs(case)
    got = merge_pair(xa, xb, *how)
    with mode("reference"):
        want = merge_pair(exact(xp, xa), exact(xp, xb), *how)
    for name, x in want._asdict().items():
        assert_close(name, exact(xp, getattr(got, name)), x, TOLERANCES["float32"])


def check_quickly() -> None:
    """A few cases that reach every line of the shaders."""
    with on_metal():
        for case in (
            Case("float32", B=2, H=9, T=9, D=80),
            Case(H=34, T=9, D=16, granularity="token"),
            Case("float32", H=3, T=7, how="max-norm", granularity="token"),
            Case("float32", H=3, T=7, how="mean"),
        ):
            check(case)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_it_is_the_definition(metal: None, case: Case) -> None:
    check(case)


CASE = st.builds(
    Case,
    dtype=st.just("float32"),
    B=st.integers(1, 3),
    H=st.integers(1, 5),
    T=st.integers(1, 150),
    how=st.sampled_from(HOWS),
    granularity=st.sampled_from(["head", "token"]),
)


@pytest.mark.metal
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=CASE)
def test_it_is_the_definition_at_any_size(case: Case) -> None:
    need("mlx")
    with on_metal():
        check(case)


def test_special_vectors_have_special_angles(metal: None) -> None:
    from kvc.backends.mlx import ops as xp

    xa, xb, *how = inputs(Case("float32", T=6))
    merged = Merged(*(exact(xp, x) for x in merge_pair(xa, xb, *how)))
    angles = merged.angle[-1, :, ::-1]
    assert_close("angles", angles, np.tile([0, 0, 0, 0, np.pi, 0], (2, 1)), (1e-5, 1e-5))
    assert_close("antipodal", merged.e[-1, :, 1], _unit(exact(xp, xb))[-1, :, 1], (1e-5, 1e-5))
    assert (merged.norm_a[-1, :, 5] == 0).all()
    assert_close("zero and zero", merged.e[-1, :, 3], np.eye(64)[[0, 0]], (1e-5, 1e-5))


def _unit(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("T", [1, 1000])
def test_a_byte_is_moved_once(sim: Any, T: int, granularity: Any) -> None:
    xa, xb, *how = inputs(Case(B=1, H=4, T=T, D=128, granularity=granularity))
    merged = merge_pair(xa, xb, *how)
    (launch,) = sim.launches
    least = xa.nbytes + xb.nbytes + sum(x.nbytes for x in merged)
    assert least <= launch.loaded + launch.stored <= 1.01 * least
    assert launch.threadgroup_bytes <= 256


def test_what_it_does_not_take(metal: None) -> None:
    xa, xb, *how = inputs(Case(T=2))
    wide, _, *_ = inputs(Case("float32", T=2))
    for pair, reason in [
        ((xa, wide), "the same in both layers"),
        ((xa[..., :62], xb[..., :62]), "got 62"),
        ((xa[:, :, :0], xb[:, :, :0]), "at least one token"),
    ]:
        assert reason in str(why_no_kernel("merge_pair", "mlx", *pair, *how))
