"""The Metal kernels of `attention_mass`, executed in the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvc.ops.attention import attend_dense
from kvc.ops.dispatch import mode, why_no_kernel
from kvc.ops.mass import attention_mass
from tests import metalsim
from tests.cases import array, assert_close, exact, view
from tests.cases.attention_mass import CASES, Case, args
from tests.conftest import need
from tests.metal import on_metal
from tests.tolerances import TOLERANCES

INCLUDED = ("attention_lse", "score_tiles")  # other shaders that it runs


def inputs(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the op is given on MLX: keys inside a larger buffer, and queries turned."""
    from kvc.backends.mlx import ops as xp

    found = args(case)
    q = view(xp, found.pop("q").swapaxes(1, 2), case.dtype, axis=1).swapaxes(1, 2)
    k = view(xp, found.pop("k"), case.dtype, axis=2)
    if found["valid"] is not None:
        found["valid"] = xp.from_numpy(found["valid"])
    if found["sinks"] is not None:
        found["sinks"] = array(xp, found["sinks"], case.dtype)
    return (q, k, found.pop("scale")), found


def check(case: Case) -> None:
    from kvc.backends.mlx import ops as xp

    (q, k, scale), options = inputs(case)
    wide = {name: x if name == "softcap" else None for name, x in options.items()}
    if options["valid"] is not None:
        wide["valid"] = xp.to_numpy(options["valid"])
    if options["sinks"] is not None:
        wide["sinks"] = exact(xp, options["sinks"])
    got = attention_mass(q, k, scale, **options)
    with mode("reference"):
        want = attention_mass(exact(xp, q), exact(xp, k), scale, **wide)
    assert_close("mass", exact(xp, got), want, TOLERANCES["float32"])


def check_quickly() -> None:
    """A few cases that reach every line of the shaders."""
    with on_metal():
        for case in (
            Case("float32", B=2, G=3, L=20, T=63, softcap=3.0, valid="heads", sinks=True),
            Case(H=1, G=2, L=2, T=600, D=80, valid="padded"),
            Case(H=1, L=70, T=75),
        ):
            check(case)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_it_is_the_definition(metal: None, case: Case) -> None:
    check(case)


@pytest.mark.metal
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    H=st.integers(1, 3),
    G=st.integers(1, 5),
    L=st.integers(2, 40),
    older=st.integers(0, 200),
)
def test_it_is_the_definition_at_any_size(B: int, H: int, G: int, L: int, older: int) -> None:
    need("mlx")
    with on_metal():
        check(Case(B=B, H=H, G=G, L=L, T=L + older, valid="heads"))


def test_all_mass_of_a_query_is_one(metal: None) -> None:
    from kvc.backends.mlx import ops as xp

    (q, k, scale), _ = inputs(Case(B=2, H=3, G=2, L=5, T=600))
    found = exact(xp, attention_mass(q, k, scale)).sum(-1)
    assert_close("sums", found, np.full((2, 3), 10.0), (1e-5, 1e-5))


def test_the_order_of_threads_changes_nothing() -> None:
    from kvc.backends.mlx import ops as xp

    need("mlx")
    metalsim.need()
    given, options = inputs(Case(B=2, G=3, L=20, T=63, valid="padded"))
    found = []
    for order in ("forward", "reverse", "random"):
        with metalsim.simulate("check", order=order), mode("fused"):
            found.append(exact(xp, attention_mass(*given, **options)))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize("T", [1000, 4096])
def test_keys_are_read_once_a_launch_in_decoding(sim: Any, T: int) -> None:
    (q, k, scale), options = inputs(Case(H=2, G=4, D=128, T=T))
    attention_mass(q, k, scale, **options)
    assert len(sim.launches) == 2
    for launch in sim.launches:
        least = launch.inputs_bytes + launch.outputs_bytes
        assert least <= launch.loaded + launch.stored <= 1.05 * least
        assert launch.threadgroup_bytes <= 8192


def test_a_prompt_reads_a_tile_again_for_each_other_tile(sim: Any) -> None:
    (q, k, scale), options = inputs(Case(H=1, G=4, L=128, T=128))
    attention_mass(q, k, scale, **options)
    lse, mass = sim.launches
    blocks = 4 * 128 // 32  # of rows; a block sees half of the keys on average
    assert lse.loaded_by["q"] == q.nbytes
    assert lse.loaded_by["k"] <= 0.55 * blocks * k.nbytes
    assert mass.loaded_by["k"] == k.nbytes
    assert mass.loaded_by["q"] <= (1 + 0.5) * q.nbytes  # two tiles of 64 keys
    assert max(lse.threadgroup_bytes, mass.threadgroup_bytes) <= 20 * 1024


def test_what_it_does_not_take(metal: None) -> None:
    (q, k, scale), _ = inputs(Case(T=9, L=9))
    for call, reason in [
        ((q, k[:, :, :8], scale), "got 9 and 8"),
        ((q[:, :, :0], k, scale), "at least one query"),
        ((q[..., :60], k[..., :60], scale), "got 60"),
    ]:
        assert reason in str(why_no_kernel("attention_mass", "mlx", *call))


@pytest.mark.parametrize("case", [c for c in CASES if c.L <= 8], ids=lambda c: c.id)
def test_what_attention_found_is_not_sought_again(sim: Any, case: Case) -> None:
    from kvc.backends.mlx import ops as xp

    given, options = inputs(case)
    q, k, scale = given
    seen = {name: options[name] for name in ("softcap", "valid")}
    lse = attend_dense(q, k, k, scale, causal=True, sinks=options["sinks"], **seen).lse
    want = attention_mass(*given, **options)
    before = len(sim.launches)
    got = attention_mass(*given, **options, lse=lse)
    assert len(sim.launches) == before + 1
    with mode("reference"):
        defined = attention_mass(*given, **options, lse=lse)
    for x in (want, defined):
        assert_close("mass", exact(xp, got), exact(xp, x), TOLERANCES["float32"])
