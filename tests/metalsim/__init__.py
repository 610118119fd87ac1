"""Runs Metal kernels on a CPU, and finds their faults. README.md says how and what it proves."""

from __future__ import annotations

import os

from tests.metalsim.build import CompileError, MetalError, missing
from tests.metalsim.patch import Launch, Simulation, simulate

__all__ = ["CompileError", "Launch", "MetalError", "Simulation", "need", "simulate"]


def need() -> None:
    """Skips a test where nothing can be compiled; fails it where KVC_REQUIRE names clang."""
    import pytest

    if reason := missing():
        if "clang" in {name.strip() for name in os.environ.get("KVC_REQUIRE", "").split(",")}:
            pytest.fail(f"KVC_REQUIRE names clang: {reason}")
        pytest.skip(reason)
