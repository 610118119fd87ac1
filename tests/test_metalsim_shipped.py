"""MLX's own Metal kernels, as its wheel ships them, in the simulator: equal to MLX on the CPU.

They compile on a Mac and are right there, so what is said of them here is said of the simulator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest

mx = pytest.importorskip("mlx.core", reason="the simulator needs mlx")

# ruff: noqa: E402
from tests.metalsim import MetalError, need
from tests.metalsim.build import mlx_include
from tests.metalsim.lint import complaints
from tests.metalsim.shipped import (
    TYPES,
    Shipped,
    affine_qmm_t,
    affine_qmv_fast,
    sdpa_vector,
    steel_attention,
)

CASES: dict[str, Callable[..., tuple[Shipped, mx.array]]] = {
    "sdpa_vector": sdpa_vector,
    "sdpa_vector-causal": partial(sdpa_vector, causal=True),
    "affine_qmv_fast": affine_qmv_fast,
    "affine_qmm_t": affine_qmm_t,
    "affine_qmm_t-odd": partial(affine_qmm_t, n=40),
    "steel_attention": steel_attention,
    "steel_attention-causal": partial(steel_attention, causal=True),
}
BARRIER = re.compile(r"threadgroup_barrier\([^;]*\);")
# what of the source runs: the functions between these two words
RUNS = {
    "sdpa_vector": ("void sdpa_vector(", "[[kernel]]"),
    "affine_qmm_t": ("void qmm_t_impl(", "METAL_FUNC void"),
    "affine_qmm_t-odd": ("void qmm_t_impl(", "METAL_FUNC void"),
    "steel_attention": ("void attention(", "[[kernel]]"),
}
# Barriers, by their number, that are not needed: why
NEEDLESS = {
    "sdpa_vector": {},
    "affine_qmm_t": dict.fromkeys((0, 1, 4, 5), "of another instantiation")
    | {8: "nothing is shared after it"},
    "affine_qmm_t-odd": {8: "nothing is shared after it"},
    "steel_attention": {0: "nothing is shared before it", -1: "it orders no memory"}
    | dict.fromkeys((3, 4), "of another instantiation"),
}
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}  # of the largest entry


@pytest.fixture(autouse=True, scope="module")
def _clang() -> None:
    need()


def error(got: mx.array, expected: mx.array) -> float:
    return (mx.abs(got.astype(mx.float32) - expected).max() / mx.abs(expected).max()).item()


@pytest.mark.parametrize("mode", ["check", "fast"])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("case", CASES)
def test_equals_mlx(case: str, dtype: mx.Dtype, mode: str) -> None:
    kernel, expected = CASES[case](dtype)
    assert error(kernel.run(mode), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("case", CASES)
def test_equals_mlx_in_every_order(case: str, order: str) -> None:
    kernel, expected = CASES[case](mx.float32)
    assert error(kernel.run("check", order=order), expected) < TOLERANCE[mx.float32]


def without_barriers(case: str, text: str) -> Iterator[str]:
    """The source less one barrier, for each barrier that runs."""
    start, stop = RUNS[case]
    begin = text.index(start)
    end = text.find(stop, begin + len(start))
    for found in BARRIER.finditer(text, begin, end if end > 0 else len(text)):
        yield text[: found.start()] + ";" + text[found.end() :]


@pytest.mark.parametrize("case", RUNS)
def test_each_missing_barrier_is_found(case: str) -> None:
    kernel, _ = CASES[case](mx.float32)
    mutants = [*without_barriers(case, kernel.text())]
    needless = {i % len(mutants) for i in NEEDLESS[case]}
    for i, text in enumerate(mutants):
        if i not in needless:
            where = rf"(data race|read of uninitialised)(.|\n)*{kernel.kernel}\.metal:\d+"
            with pytest.raises(MetalError, match=where):
                kernel.run("check", text)


def test_lint_has_no_complaint_about_them() -> None:
    folder = mlx_include() / "mlx/backend/metal/kernels"
    headers = [p for p in folder.rglob("*.h") if p.name != "type_traits.h"]  # on bare pointers
    assert len(headers) > 50
    for header in headers:
        assert not [*complaints(header.read_text())], header
