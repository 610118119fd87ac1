"""Triton's kernels compile for GPUs that are not there, without spills, and do not grow."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import need
from tests.triton_aot import Cost, costs, faults, kept, keys, source, stale

TOO_MANY = """
from kvc.cuda_kernels import join
from tests.triton_aot import compiled, keys

made = list(join.variants())
join.variants = lambda: [v._replace(constexprs={**v.constexprs, "PAIRS": 256}) for v in made]
print(compiled(next(key for key in keys(["join"]) if "D256" in key.variant)).spilled)
"""


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    need("triton")
    need("torch")


def test_every_variant_has_figures_within_the_limits() -> None:
    figures = kept()
    names = {str(key) for key in keys()}
    assert names
    assert set(figures) == names, "run `python -m tests.triton_aot`"
    assert faults(figures, {}) == []


def test_what_has_changed_compiles_and_has_not_grown() -> None:
    """And of each module one kernel that has not: the compiler may have."""
    every, figures = keys(), kept()
    sample = {key.module: key for key in every}
    some = sorted({*stale(every, figures), *sample.values()})
    assert faults(costs(some), figures) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"registers": 110}, []),
        ({"registers": 111}, ["join/x/sm_80: registers grew from 100 to 111"]),
        ({"shared": 2000}, ["join/x/sm_80: shared grew from 1000 to 2000"]),
        ({"shared": 2000, "triton": "3.6.0"}, []),  # compilers differ
        ({"spilled": 8}, ["join/x/sm_80: spills 8 bytes"]),
    ],
)
def test_faults_are_said(change: dict[str, Any], said: list[str]) -> None:
    old = Cost(warps=4, registers=100, spilled=0, shared=1000, source="", triton="3.9.0")
    assert faults({"join/x/sm_80": old._replace(**change)}, {"join/x/sm_80": old}) == said


def test_limits_hold_without_figures() -> None:
    large = Cost(warps=4, registers=200, spilled=0, shared=200_000, source="", triton="")
    assert faults({"x/sm_80": large}, {}) == [
        "x/sm_80: 200 registers, more than 168",
        "x/sm_80: 200000 bytes of shared memory do not fit",
    ]
    assert faults({"x/sm_90": large._replace(warps=8)}, {}) == []


def test_a_kernel_that_spills_is_seen() -> None:
    """A join of too many answers at a time, compiled where nothing is interpreted."""
    text = subprocess.run([sys.executable, "-c", TOO_MANY], stdout=subprocess.PIPE, check=True)
    assert int(text.stdout) > 0


def test_what_a_kernel_calls_is_part_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvc.cuda_kernels import softmax

    key = keys(["join"])[0]
    before = source(key)
    assert source(key) == before
    assert stale([key], {str(key): Cost(4, 1, 0, 0, before, "")}) == []
    monkeypatch.setattr(softmax, "LOG2E", 1.0)
    assert stale([key], {str(key): Cost(4, 1, 0, 0, before, "")}) == [key]
