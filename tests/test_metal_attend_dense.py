"""The Metal kernel of `attend_dense`, executed in the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.ops.attention import Partial, attend_dense
from kvc.ops.dispatch import mode, why_no_kernel
from tests import metalsim
from tests.cases import array, assert_close, exact, view
from tests.cases.attend_dense import CASES, Case, args
from tests.conftest import need
from tests.metal import on_metal
from tests.tolerances import TOLERANCES

INCLUDED = ("softmax",)


def inputs(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the op is given on MLX: tokens inside larger buffers, and one row's queries turned."""
    from kvc.backends.mlx import ops as xp

    found = args(case)
    q = array(xp, found.pop("q"), case.dtype)
    if case.B == 1:
        q = xp.copy(q.swapaxes(1, 2)).swapaxes(1, 2)
    k, v = (view(xp, found.pop(name), case.dtype, axis=2) for name in "kv")
    found["joined"] = [Partial(*map(xp.from_numpy, part)) for part in found["joined"]]
    if found["valid"] is not None:
        found["valid"] = xp.from_numpy(found["valid"])
    if found["sinks"] is not None:
        found["sinks"] = array(xp, found["sinks"], case.dtype)
    return (q, k, v, found.pop("scale")), found


def defined(given: tuple[Any, ...], options: dict[str, Any]) -> Partial:
    """The definition in float64, of the inputs as they are rounded."""
    from kvc.backends.mlx import ops as xp

    wide = dict(options)
    wide["joined"] = [Partial(*(exact(xp, x) for x in part)) for part in options["joined"]]
    if options["valid"] is not None:
        wide["valid"] = xp.to_numpy(options["valid"])
    if options["sinks"] is not None:
        wide["sinks"] = exact(xp, options["sinks"])
    *tokens, scale = given
    with mode("reference"):
        return attend_dense(*(exact(xp, x) for x in tokens), scale, **wide)


def check(case: Case) -> None:
    """Compares the kernel with the definition in float64, of the inputs as they are rounded."""
    from kvc.backends.mlx import ops as xp

    given, options = inputs(case)
    got, want = attend_dense(*given, **options), defined(given, options)
    for name, x in want._asdict().items():
        assert_close(name, exact(xp, getattr(got, name)), x, TOLERANCES["float32"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_it_is_the_definition(metal: None, case: Case) -> None:
    check(case)


def check_quickly() -> None:
    """Few cases that touch every line; `tests.metal_mutants` runs them."""
    with on_metal():
        for T in (2, 65):
            check(Case(B=2, G=3, L=3, D=256, T=T, causal=True, joined=(0, 9, 300), sinks=True))
        for T, valid in ((300, "none"), (1000, "heads")):
            check(Case(B=2, G=4, D=80, T=T, softcap=2.0, valid=valid))
        check(Case("bfloat16", G=12, T=40))
        check(Case(D=16, G=2))
    with metalsim.simulate("check") as sim, mode("fused"):
        check_traffic(sim, 1000)


CASE = st.builds(
    Case,
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    G=st.integers(1, 4),
    L=st.integers(1, 4),
    T=st.integers(0, 600),
    softcap=st.sampled_from([None, 3.0]),
    valid=st.sampled_from(["all", "padded", "heads", "none"]),
    joined=st.sampled_from([(), (0, 6)]),
    sinks=st.booleans(),
)


@pytest.mark.metal
@settings(max_examples=15, deadline=None, derandomize=True)
@given(case=CASE)
def test_it_is_the_definition_at_any_size(case: Case) -> None:
    need("mlx")
    with on_metal():
        check(replace(case, causal=case.L > 1))  # the same kernels for both


@pytest.mark.parametrize("T", [70, 600])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_16_bits_it_is_the_same_answer_rounded(metal: None, dtype: str, T: int) -> None:
    from kvc.backends.mlx import ops as xp

    given, options = inputs(Case(dtype, G=4, T=T))
    whole = attend_dense(*given, **options)
    half = attend_dense(*given, **options, dtype=xp.dtype(dtype))
    assert half.out.dtype == xp.dtype(dtype)
    assert bool(xp.all(half.out == xp.astype(whole.out, half.out.dtype)))
    assert bool(xp.all(half.lse == whole.lse))


def test_the_order_of_threads_changes_nothing() -> None:
    from kvc.backends.mlx import ops as xp

    need("mlx")
    metalsim.need()
    given, options = inputs(Case(B=2, G=3, L=3, T=600, causal=True, sinks=True))
    found = []
    for order in ("forward", "reverse", "random"):
        with metalsim.simulate("check", order=order), mode("fused"):
            found.append(exact(xp, attend_dense(*given, **options).out))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def large(T: int, **other: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of a layer of a large model."""
    return inputs(replace(Case(H=8, G=4, D=128, T=T), **other))


def check_traffic(sim: metalsim.Simulation, T: int) -> None:
    (q, k, v, scale), options = large(T, joined=(4,))
    out, lse = attend_dense(q, k, v, scale, **options, dtype=q.dtype)
    arrays = (q, k, v, *options["joined"][0], out, lse)
    least = sum(x.nbytes for x in arrays)
    moved = sum(launch.loaded + launch.stored for launch in sim.launches)
    assert least <= moved <= 1.05 * least


@pytest.mark.parametrize("T", [100, 1000, 4096])
def test_a_byte_is_moved_once(sim: Any, T: int) -> None:
    check_traffic(sim, T)


@pytest.mark.parametrize(("G", "L"), [(16, 1), (4, 4)])
def test_all_queries_of_a_group_share_one_read(sim: Any, G: int, L: int) -> None:
    given, options = large(300, G=G, L=L)
    attend_dense(*given, **options)
    read = sim.launches[0].loaded_by
    assert (read["k"], read["v"]) == (given[1].nbytes, given[2].nbytes)


def test_a_window_is_one_launch(sim: Any) -> None:
    given, options = large(300, joined=(0, 4), sinks=True)
    attend_dense(*given, **options)
    assert len(sim.launches) == 1
    given, options = large(1000, joined=(0, 4), sinks=True)
    attend_dense(*given, **options)
    assert len(sim.launches) == 3  # the window, and the two of many tokens


@pytest.mark.parametrize(("dtype", "D"), [("float16", 128), ("float32", 256)])
def test_threadgroup_memory_leaves_room_for_others(sim: Any, dtype: str, D: int) -> None:
    given, options = inputs(Case(dtype, G=8, D=D))
    attend_dense(*given, **options)
    assert sim.launches[0].threadgroup_bytes <= 16384


def test_what_it_does_not_take_it_says(metal: None) -> None:
    import mlx.core as mx

    def reason(Hq: int = 2, L: int = 1, D: int = 64, wide: int = 64, **other: Any) -> str | None:
        q, k, v = (mx.zeros(s, mx.float16) for s in ((1, Hq, L, D), (1, 2, 9, D), (1, 2, 9, wide)))
        return why_no_kernel("attend_dense", "mlx", q, k, other.pop("v", v), 1.0, **other)

    assert reason() is None
    assert reason(dtype=mx.bfloat16, valid=mx.zeros((1, 1, 9), mx.bool_)) is None
    assert "9" in str(reason(L=9))
    assert "17" in str(reason(Hq=34))
    assert "80" in str(reason(wide=80))
    assert "not 72" in str(reason(D=72, wide=72))
    assert "float32" in str(reason(v=mx.zeros((1, 2, 9, 64))))
    part = Partial(mx.zeros((1, 2, 1, 64), mx.float16), mx.zeros((1, 2, 1)))
    assert reason(joined=[part]) == "takes answers in float32"
    assert "float64" in str(reason(dtype=mx.float64))
    assert "length" in str(reason(length=mx.array([3])))
