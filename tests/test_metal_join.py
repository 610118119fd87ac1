"""The Metal kernel of `join`, executed in the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvc.ops.attention import Partial, join
from kvc.ops.dispatch import mode, why_no_kernel
from tests.cases import array, assert_close, exact
from tests.cases.join import CASES, Case, args
from tests.metal import on_metal
from tests.tolerances import TOLERANCES


def given(case: Case) -> tuple[list[Partial], Any]:
    """Parts and sinks on MLX."""
    from kvc.backends.mlx import ops as xp

    inputs = args(case)
    parts = [Partial(*(array(xp, x, "float32") for x in part)) for part in inputs["parts"]]
    return parts, None if inputs["sinks"] is None else array(xp, inputs["sinks"], "float16")


def check(case: Case) -> None:
    """Compares the kernel with the definition in float64, of the inputs as they are rounded."""
    from kvc.backends.mlx import ops as xp

    parts, sinks = given(case)
    got = join(parts, sinks=sinks)
    wide = [Partial(*(exact(xp, x) for x in part)) for part in parts]
    with mode("reference"):
        want = join(wide, sinks=None if sinks is None else exact(xp, sinks))
    for name, x in want._asdict().items():
        assert_close(name, exact(xp, getattr(got, name)), x, TOLERANCES["float32"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_it_is_the_definition(metal: None, case: Case) -> None:
    check(case)


def check_quickly() -> None:
    """Few cases that touch every line; `tests.metal_mutants` runs them."""
    with on_metal():
        for parts in ((0, 5), (200,)):
            check(Case(B=2, L=3, D=80, parts=parts, sinks=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_16_bits_it_is_the_same_answer_rounded(metal: None, dtype: str) -> None:
    from kvc.backends.mlx import ops as xp

    parts, _ = given(Case(Hq=3, D=80, parts=(4, 0)))
    whole, half = join(parts), join(parts, dtype=xp.dtype(dtype))
    assert half.out.dtype == xp.dtype(dtype)
    assert bool(xp.all(half.out == xp.astype(whole.out, half.out.dtype)))
    assert bool(xp.all(half.lse == whole.lse))


def test_parts_may_lie_in_any_order(metal: None) -> None:
    from kvc.backends.mlx import ops as xp

    (part,), _ = given(Case(Hq=4, L=3, parts=(5,)))
    turned = Partial(*(x.swapaxes(2, 3) for x in part))
    got, want = join([turned]), join([part])
    assert np.array_equal(exact(xp, got.out.swapaxes(1, 2)), exact(xp, want.out))


def test_a_byte_is_moved_once(sim: Any) -> None:
    parts, _ = given(Case(Hq=32, D=128, parts=(0, 16)))
    out, lse = join(parts)
    (launch,) = sim.launches
    least = sum(x.nbytes for part in parts for x in part) + out.nbytes + lse.nbytes
    assert launch.loaded + launch.stored <= 1.05 * least
    assert launch.threadgroup_bytes <= 4096


def test_one_launch_joins_six_stacks(sim: Any) -> None:
    join(given(Case(parts=(0, 1, 2, 3, 4, 5)))[0])
    assert len(sim.launches) == 1
    join(given(Case(parts=(0,) * 11))[0])
    assert len(sim.launches) == 3


def test_what_it_does_not_take_it_says(metal: None) -> None:
    import mlx.core as mx

    def reason(dtype: mx.Dtype, D: int, to: mx.Dtype | None = None) -> str | None:
        part = Partial(mx.zeros((1, 2, 1, D), dtype), mx.zeros((1, 2, 1)))
        return why_no_kernel("join", "mlx", [part], dtype=to)

    assert reason(mx.float32, 64) is None
    assert reason(mx.float16, 64) == "takes answers in float32"
    assert "float64" in str(reason(mx.float32, 64, mx.float64))
    assert "not 72" in str(reason(mx.float32, 72))
    assert "not 272" in str(reason(mx.float32, 272))
