"""Faults planted into small kernels, for tests that they are found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from tests.metalsim.build import CompileError, MetalError
from tests.metalsim.compute import compute
from tests.metalsim.patch import simulate

# Tiles of 64 numbers; each thread adds what another one put into the tile.
TILES = """
threadgroup float tile[64];
const uint i = thread_position_in_threadgroup.x;
float sum = 0;
for (int t = 0; t < x_shape[0]; t += 64) {
  tile[i] = x[t + i];
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile is whole
  sum += tile[63 - i];
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile may go
}
out[i] = sum;
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FIRST, SECOND = f"{BARRIER}  // the tile is whole", f"{BARRIER}  // the tile may go"
I = "const uint i = thread_position_in_grid.x;\n"
_WHO = r"thread \(\d+, 0, 0\) of threadgroup \(\d+, 0, 0\), lane \d+ of simdgroup \d"


def tiles(before: str, after: str) -> str:
    """The kernel TILES with a change."""
    assert before in TILES
    return TILES.replace(before, after)


@dataclass(frozen=True)
class Fault:
    """A kernel with a fault, what the message says of it, and the line that it quotes."""

    id: str
    source: str
    says: str
    quotes: str | None = None
    n: int = 256  # numbers of x
    thread: bool = True  # whether the message names one
    options: dict[str, Any] = field(default_factory=dict)

    def expect_found(self) -> None:
        """Runs the kernel: the simulator names the fault, its line and its thread."""
        options = {"shape": (64,), **self.options}
        with simulate("check", seconds=1), pytest.raises(MetalError, match=self.says) as caught:
            compute(self.source, {"x": mx.zeros((self.n,))}, **options)
        assert not isinstance(caught.value, CompileError), caught.value
        if self.thread:
            assert caught.match(_WHO)
        if self.quotes:
            assert caught.match(r"test\.metal:\d+")
            lines = [line.strip() for line in self.source.split("\n") if self.quotes in line]
            assert any(line in str(caught.value) for line in lines)
