"""The Metal kernel of `attend_coded`, executed in the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.ops.attention import Partial, attend_coded, join
from kvc.ops.codec import arrays
from kvc.ops.dispatch import mode, why_no_kernel
from tests import metalsim
from tests.cases import array, assert_close, exact
from tests.cases.attend_coded import CASES, Case, args, in_float64, pasts
from tests.conftest import need
from tests.metal import on_metal
from tests.tolerances import TOLERANCES

INCLUDED = ("coded", "coded_rest", "coded_tile")


def numbers(x: Any) -> np.ndarray[Any, Any]:
    """An array of MLX in NumPy; floats in float64."""
    import mlx.core as mx

    from kvc.backends.mlx import ops as xp

    return exact(xp, x) if mx.issubdtype(x.dtype, mx.floating) else xp.to_numpy(x)


def inputs(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the op is given on MLX: coded tokens, and queries that lie in another order."""
    from kvc.backends.mlx import ops as xp

    def to(x: np.ndarray[Any, Any]) -> Any:
        return xp.from_numpy(x) if x.dtype == np.int32 else array(xp, x, case.dtype)

    found = args(case)
    q = array(xp, found["q"], case.dtype)
    if case.B == 1:
        q = xp.copy(q.swapaxes(1, 2)).swapaxes(1, 2)
    with mode("reference"):
        k, v, valid = pasts(case, to)
    return (q, k, v, found["scale"]), {"softcap": case.softcap, "valid": valid}


def defined(given: tuple[Any, ...], options: dict[str, Any]) -> Partial:
    """The definition in float64, of the very codes."""
    q, k, v, scale = given
    valid = None if options["valid"] is None else numbers(options["valid"])
    wide = numbers(q), in_float64(k, numbers), in_float64(v, numbers)
    with mode("reference"):
        return attend_coded(*wide, scale, softcap=options["softcap"], valid=valid)


def answer(given: tuple[Any, ...], options: dict[str, Any]) -> Partial:
    """The kernel's answers over all splits, joined in float64."""
    found = Partial(*map(numbers, attend_coded(*given, **options)))
    with mode("reference"):
        return join([found])


def check(case: Case) -> None:
    """Compares the kernel with the definition."""
    given, options = inputs(case)
    got, want = answer(given, options), defined(given, options)
    for name, x in want._asdict().items():
        assert_close(name, getattr(got, name), x, TOLERANCES["float32"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_it_is_the_definition(metal: None, case: Case) -> None:
    check(case)


def check_quickly() -> None:
    """Few cases that touch every line; `tests.metal_mutants` runs them."""
    small = (("group_size", 8), ("buffer", 8), ("outliers", 0.1))
    with on_metal():
        check(Case("gear", (*small, ("rank", 4)), (296,) * 2, B=2, G=3, L=3, softcap=2.0))
        check(Case("gear", (*small, ("prefill_rank", 2)), (24,) * 6))
        check(Case(blocks=(192,), G=4, loud=25.0))
        check(Case("gear", (("bits", 8),), (128, 64), "merged", B=2, H=1))
        check(Case("gear2", (("outliers", 0.04),), (1152,), D=80, G=8))
        check(Case("gear2", (("buffer", 32), ("bits", 4)), (96, 96), G=4))
        check(Case("kcvt", (("bits", 8),), (33, 33), B=2, D=80, G=16))
        check(Case("kcvt", (("bits", 8),), (33, 33), B=2, D=80))
        check(Case("kcvt", (), (300,)))
        check(Case("token", (("bits", 2),), (45, 45), D=128))
        check(Case("token", (), (140,), "kept", B=2, G=4))
        check(Case("", (), (140,), "merged", B=2, H=4, merge=(("granularity", "token"),)))
        check(Case("", (), (40,), "merged", D=80, merge=(("gamma", 1.0),)))
        check(Case("gear", (("outliers", 0.05),), (3072,), H=1))
    with metalsim.simulate("check") as sim, mode("fused"):
        check_traffic(sim, LARGE["gear"])


CASE = st.one_of(
    st.builds(
        Case,
        st.just("gear"),
        st.just((("group_size", 8), ("buffer", 8), ("outliers", 0.1), ("rank", 4))),
        st.lists(st.integers(1, 60), min_size=1, max_size=3).map(lambda x: tuple(8 * n for n in x)),
        B=st.integers(1, 2),
        H=st.integers(1, 3),
        G=st.integers(1, 3),
    ),
    st.builds(
        Case,
        st.sampled_from(["kcvt", "token"]),
        st.just((("bits", 4),)),
        st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple),
        B=st.integers(1, 2),
        H=st.integers(1, 3),
        G=st.integers(1, 2),
        L=st.integers(1, 2),
    ),
    st.builds(
        Case,
        st.just(""),
        st.just(()),
        st.lists(st.integers(1, 90), min_size=1, max_size=3).map(tuple),
        st.just("merged"),
        H=st.integers(1, 3),
        layer=st.integers(0, 1),
    ),
)


@pytest.mark.metal
@settings(max_examples=15, deadline=None, derandomize=True)
@given(case=CASE)
def test_it_is_the_definition_at_any_size(case: Case) -> None:
    need("mlx")
    with on_metal():
        check(case)


def test_the_order_of_threads_changes_nothing() -> None:
    need("mlx")
    metalsim.need()
    given, options = inputs(Case("gear", (("outliers", 0.05),), (320,), G=4))
    found = []
    for order in ("forward", "reverse", "random"):
        with metalsim.simulate("check", order=order), mode("fused"):
            found.append(numbers(attend_coded(*given, **options).out))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


# a layer of a large model: a prompt of about 1000 tokens, or many later blocks
LARGE = {
    name: Case(name, settings, blocks, H=8, G=4, D=128)
    for name, settings, blocks in (
        ("kivi", (), (960,)),
        ("gear-l", (), (960,)),
        ("gear", (), (960,)),
        ("kcvt", (), (1000,)),
        ("token", (), (1000,)),
        ("gear2", (), (896,)),
    )
} | {
    "gear at 4 bits": Case("gear", (("bits", 4), ("prefill_rank", 2)), (64,) * 15, H=8, G=4, D=128),
    "splits": Case("gear-l", (), (1984,), H=8, G=4, D=128),
}


def check_traffic(sim: Any, case: Case) -> None:
    given, options = inputs(case)
    out, lse = attend_coded(*given, **options)
    codes = [x for past in given[1:3] for run in past.runs for _, x in arrays(run.code)]
    least = sum(x.nbytes for x in (given[0], out, lse, *codes))
    (launch,) = sim.launches
    assert least <= launch.loaded + launch.stored <= 1.05 * least


@pytest.mark.parametrize("name", LARGE)
def test_a_byte_is_moved_once(sim: Any, name: str) -> None:
    check_traffic(sim, LARGE[name])


@pytest.mark.parametrize("case", [LARGE["gear"], LARGE["gear2"]], ids=["gear", "gear2"])
def test_threadgroup_memory_leaves_room_for_others(sim: Any, case: Case) -> None:
    given, options = inputs(replace(case, blocks=(128,), H=1))
    attend_coded(*given, **options)
    assert sim.launches[0].threadgroup_bytes <= 16384


def test_it_is_compiled_once_however_many_blocks_there_are(
    sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvc.metal_kernels import attend_coded as kernel

    signatures, launch = set(), kernel.launch

    def noted(op: str, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        sorts = [(n, x.dtype, x.size < 8) for n, x in inputs.items() if x is not None]
        signatures.add((*sorts, *options["template"].items()))
        return launch(op, inputs, *rest, **options)

    monkeypatch.setattr(kernel, "launch", noted)
    for n in (1, 2, 5, 30):
        given, options = inputs(Case("gear", (("buffer", 64), ("prefill_rank", 2)), (64,) * n))
        attend_coded(*given, **options)
    assert len(signatures) == 1


def test_what_it_does_not_take_it_says(metal: None) -> None:
    def reason(case: Case, other: Case | None = None) -> str | None:
        q, k, v, scale = inputs(case)[0]
        if other:
            v = inputs(other)[0][2]
        return why_no_kernel("attend_coded", "mlx", q, k, v, scale)

    assert reason(Case()) is None
    assert "9" in str(reason(Case(L=9)))
    assert "17" in str(reason(Case(G=17)))
    assert "72" in str(reason(Case(settings=(("group_size", 8), ("buffer", 8)), D=72)))
    assert "same tokens" in str(reason(Case(), Case(blocks=(64,))))
    assert "not 4" in str(reason(Case(settings=(("v_group", 4),))))
    assert "not 12" in str(reason(Case(settings=(("k_group", 12), ("buffer", 12)), blocks=(120,))))
    assert "rank" in str(reason(Case("gear-l", (("prefill_rank", 20),))))
    assert "retained" in str(reason(Case("gear2", (), (128,), "merged")))
    assert "rotated" in str(reason(Case(), Case("gear2")))
    assert "groups of channels" in str(reason(Case("token", (("group_size", 8),), D=128)))
    assert "tokens" in str(reason(Case("gear2", (("buffer", 16),), (64,))))
