"""Kernels and definitions: which of them runs, by the mode, and what is there of each op."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import kvc.metal_kernels
from kvc.errors import ConfigError, KernelUnavailable
from kvc.ops import dispatch
from kvc.ops.dispatch import mode, op, registered, why_no_kernel
from kvc.store.store import KVStore
from tests.conftest import need

ROOT = Path(__file__).parents[1]
PROMPT = "one two three four five six seven eight nine ten " * 8


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An op, and its kernel for MLX, which takes vectors and returns one more."""
    need("mlx")
    monkeypatch.setattr(dispatch, "_ops", registered())

    @op
    def twice(x: Any) -> Any:
        return x + x

    module = ModuleType("kvc.metal_kernels.twice")
    module.__dict__["why_not"] = lambda x: None if x.ndim == 1 else "takes vectors"
    module.__dict__["run"] = lambda x: x + x + 1
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(kvc.metal_kernels, "FUSED", {"twice"})
    monkeypatch.setattr(kvc.metal_kernels, "unavailable", lambda: None)
    return twice


def ones(*shape: int) -> Any:
    return import_module("mlx.core").ones(shape)


@pytest.mark.parametrize(("name", "want"), [("auto", 3), ("fused", 3), ("reference", 2)])
def test_a_kernel_runs_unless_the_mode_says_not(twice: Any, name: str, want: int) -> None:
    with mode(name):  # type: ignore[arg-type]
        assert twice(ones(1)).item() == want


def test_arguments_that_a_kernel_does_not_take(twice: Any) -> None:
    with mode("auto"):
        assert twice(ones(1, 1)).item() == 2
    with mode("fused"), pytest.raises(KernelUnavailable, match=r"twice: .* takes vectors"):
        twice(ones(1, 1))


def test_a_device_that_is_not_there(twice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvc.metal_kernels, "unavailable", lambda: "there is no Metal GPU")
    with mode("auto"):
        assert twice(ones(1)).item() == 2
    with mode("fused"), pytest.raises(KernelUnavailable, match="there is no Metal GPU"):
        twice(ones(1))


def test_an_op_without_a_kernel(twice: Any) -> None:
    kvc.metal_kernels.FUSED.clear()  # type: ignore[attr-defined]
    assert "no kernel for twice" in (why_no_kernel("twice", "mlx", ones(1)) or "")
    with mode("fused"), pytest.raises(KernelUnavailable, match="numpy has no kernels"):
        twice(np.ones(1))


def test_a_block_leaves_the_mode_as_it_was() -> None:
    before = dispatch._mode
    with pytest.raises(ConfigError, match="got 'quick'"), mode("quick"):  # type: ignore[arg-type]
        pass
    with mode("reference"), mode("fused"):
        pass
    assert dispatch._mode == before


def run(chosen: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvc", "generate", *args, PROMPT],
        env={**os.environ, "KVC_MODE": chosen},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_the_environment_sets_the_mode() -> None:
    need("torch")
    args = ("--backend", "cpu", "--method", "kivi", "--max-tokens", "2")
    assert run("reference", *args).returncode == 0
    done = run("fused", *args)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kvc: encode: expected a kernel in mode fused")


def test_a_wrong_mode_in_the_environment() -> None:
    done = run("quick")
    assert done.returncode != 0
    assert "KVC_MODE: expected one of auto, fused, reference, got 'quick'" in done.stderr


def test_every_kernel_has_its_four_places() -> None:
    """The definition, the module, the shader and the cases of an op have one name."""
    assert KVStore  # whose module imports all ops
    for name in kvc.metal_kernels.FUSED:
        assert name in registered()
        for place in (f"metal_kernels/{name}.py", f"metal_kernels/{name}.metal"):
            assert (ROOT / place).is_file(), place
        assert (ROOT / f"tests/cases/{name}.py").is_file()
    modules = {path.stem for path in (ROOT / "metal_kernels").glob("*.py")}
    assert {name for name in modules if name in registered()} == kvc.metal_kernels.FUSED
