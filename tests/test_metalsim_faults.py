"""Faults planted into small kernels: each is found, with its line and its thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from tests.metalsim import CompileError, MetalError, need, simulate
from tests.metalsim.compute import compute

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
LANE = "const uint lane = thread_index_in_simdgroup;\n"
WHO = r"thread \(\d+, 0, 0\) of threadgroup \(\d+, 0, 0\), lane \d+ of simdgroup \d"


@pytest.fixture(autouse=True, scope="module")
def _clang() -> None:
    need()


@dataclass(frozen=True)
class Fault:
    """A kernel with a fault, what the message says of it, and the line that it quotes."""

    id: str
    source: str
    says: str
    quotes: str | None = None
    n: int = 256  # numbers of x
    header: str = ""
    thread: bool = True  # whether the message names one
    options: dict[str, Any] = field(default_factory=dict)


def tiles(before: str, after: str) -> str:
    assert before in TILES
    return TILES.replace(before, after)


FAULTS = [
    Fault("no first barrier", tiles(FIRST, ""), "uninitialised|data race", "tile["),
    Fault("no second barrier", tiles(SECOND, ""), "data race", "tile["),
    Fault(
        "first barrier orders nothing",
        tiles(FIRST, FIRST.replace("mem_threadgroup", "mem_none")),
        "uninitialised|data race",
        "tile[",
    ),
    Fault(
        "second barrier orders device memory",
        tiles(SECOND, SECOND.replace("mem_threadgroup", "mem_device")),
        "data race .(write after read|read after write)",
        "tile[",
    ),
    Fault(
        "barrier of a simdgroup only",
        TILES.replace("threadgroup_barrier", "simdgroup_barrier"),
        "uninitialised|data race",
        "tile[",
    ),
    Fault(
        "device memory without its flag",
        f"out[thread_position_in_grid.x] = 1;\n{BARRIER}\n"
        "out[thread_position_in_grid.x] = out[63 - thread_position_in_grid.x] + x[0];",
        "data race .read after write.*device buffer `out`|uninitialised.*device buffer `out`",
        "63 -",
    ),
    Fault(
        "barrier under a condition",
        f"{I}out[i] = x[i];\nif (i < 32) {BARRIER}",
        r"not reached by every thread(.|\n)*32 thread.s. in threadgroup_barrier",
        BARRIER,
        thread=False,
    ),
    Fault(
        "different barriers",
        f"{I}out[i] = x[i];\nif (i < 32) {BARRIER}\nelse {BARRIER}",
        "threads of one threadgroup wait at different barriers",
        BARRIER,
    ),
    Fault(
        "return before a barrier",
        f"{I}out[i] = x[i];\nif (i == 40) return;\n{BARRIER}",
        r"not reached by every thread(.|\n)*returned from the kernel: 40",
        BARRIER,
        thread=False,
    ),
    Fault(
        "out-of-bounds read",
        f"{I}out[i] = x[i + 193];",
        "out-of-bounds read: 4 bytes at byte 1024 of device buffer `x` .1024 bytes., element 256",
        "x[i + 193]",
    ),
    Fault(
        "read before a buffer",
        f"{I}out[i] = x[int(i) - 1];",
        "out-of-bounds read: 4 bytes at byte -4 of device buffer `x`",
        "int(i) - 1",
    ),
    Fault(
        "out-of-bounds read of constants",
        f"{I}out[i] = x[i];",
        "out-of-bounds read: .* of constant buffer `x` .28 bytes., element \\d+ of 7",
        "x[i]",
        n=7,
    ),
    Fault("out-of-bounds write", f"{I}out[i + 1] = x[i];", "out-of-bounds write.*`out`", "out[i"),
    Fault(
        "threadgroup array overrun",
        tiles("tile[63 - i]", "tile[64 - i]"),
        "array index out of bounds",
        "tile[64 - i]",
    ),
    Fault(
        "threadgroup array overrun by a pointer",
        tiles("tile[63 - i]", "*(tile + 64 - i)"),
        "out-of-bounds read: 4 bytes at byte 256 of threadgroup array `tile` .256 bytes.",
        "tile + 64 - i",
    ),
    Fault(
        "threadgroup array overwritten",
        tiles("tile[i] =", "tile[i + 1] ="),
        "array index out of bounds|out-of-bounds write: .* of threadgroup array `tile`",
        "tile[i + 1]",
    ),
    Fault(
        "private array overrun",
        f"{I}float mine[4] = {{0}};\nfor (uint k = 0; k <= 4; k++)\n  mine[k] = x[i + k];\n"
        "out[i] = mine[i % 4];",
        "array index out of bounds",
        "mine[k]",
    ),
    Fault(
        "write to an input",
        f"{I}((device float*)x)[i] = 0;\nout[i] = 1;",
        "write to an input: 4 bytes .* of device buffer `x`",
        "(device float*)x",
    ),
    Fault(
        "unwritten output",
        f"{I}if (i != 17) out[i] = x[i];",
        "output `out`: 4 of 256 bytes are never written, the first at element 17",
        thread=False,
    ),
    Fault(
        "uninitialised threadgroup memory",
        f"{I}threadgroup float seen[64];\nif (i < 63) seen[i] = x[i];\n{BARRIER}\n"
        "out[i] = seen[i];",
        "read of uninitialised memory: .* of threadgroup array `seen`",
        "out[i] = seen[i]",
    ),
    Fault(
        "uninitialised output",
        f"{I}out[i] += x[i];",
        "read of uninitialised memory: .* of device buffer `out`",
        "out[i] +=",
    ),
    Fault(
        "memory of the last threadgroup",
        f"{I}threadgroup float seen[32];\nif (i < 32) seen[i] = x[i];\n{BARRIER}\n"
        "out[i] = seen[i % 32];",
        "read of uninitialised memory: .* of threadgroup array `seen`",
        "seen[i % 32]",
        options={"threadgroup": 32},
    ),
    Fault(
        "race between threadgroups",
        f"{I}if (i % 32 == 0) out[0] = x[i];",
        "data race .write after write.*device buffer `out`",
        "out[0]",
        options={"threadgroup": 32, "shape": (1,)},
    ),
    Fault(
        "race within a simdgroup",
        f"{I}threadgroup float seen[64];\nseen[i] = x[i];\nout[i] = seen[i ^ 1];",
        "data race|uninitialised",
        "seen[i ^ 1]",
    ),
    Fault(
        "bytes of one word",  # neighbours are no race; the same byte is
        f"{I}threadgroup uchar seen[64];\nseen[i / 2] = uchar(x[i]);\n{BARRIER}\n"
        "out[i] = seen[i / 2];",
        "data race .write after write.*of threadgroup array `seen`",
        "seen[i / 2] = ",
    ),
    Fault(
        "atomic and not",
        f"{I}threadgroup atomic_uint n;\n"
        "if (i == 0) atomic_store_explicit(&n, 0u, memory_order_relaxed);\n"
        f"{BARRIER}\natomic_fetch_add_explicit(&n, 1u, memory_order_relaxed);\n"
        "out[i] = *(threadgroup uint*)&n;",
        "data race .(read after write|write after read).*of threadgroup array `n`",
        "&n",
    ),
    Fault(
        "different simdgroup operations",
        f"{LANE}out[lane] = lane < 16 ? simd_sum(x[lane])\n : simd_max(x[lane]);",
        "lanes of one simdgroup are in different simdgroup operations",
        "simd_max",
        options={"threads": 32, "shape": (32,)},
    ),
    Fault(
        "simdgroup operation of some lanes",
        f"{LANE}float s = 0;\nif (lane < 16) s = simd_sum(x[lane]);\n{BARRIER}\nout[lane] = s;",
        r"not reached by every(.|\n)*simd_sum",
        "simd_sum",
        thread=False,
        options={"threads": 32, "shape": (32,)},
    ),
    Fault(
        "shuffle from a lane that is gone",
        f"{LANE}if (lane >= 20) return;\nout[lane] = simd_shuffle_down(x[lane], ushort(4));",
        "simd_shuffle_down reads a lane that is not active",
        "simd_shuffle_down",
        options={"threads": 32, "shape": (20,)},
    ),
    Fault(
        "matrix at two addresses",
        f"{LANE}simdgroup_float8x8 m;\nsimdgroup_load(m, x + lane);\nsimdgroup_store(m, out);",
        "with 32 lanes at one address",
        "simdgroup_load",
        options={"threads": 32},
    ),
    Fault(
        "misaligned vector",
        f"{I}float4 v = *reinterpret_cast<const device float4*>(x + 1 + i);\nout[i] = v.x;",
        "misaligned",
        "float4 v",
    ),
    Fault(
        "shift too far",
        f"{I}out[i] = 1 << (int(x[i]) + 40);",
        "shift by a negative or too large amount",
        "<<",
    ),
    Fault(
        "division by zero",
        f"{I}out[i] = int(i) / int(x[i]);",
        "integer division by zero",
        "int(x[i])",
    ),
    Fault(
        "wild pointer",
        f"{I}out[i] = *(const device float*)(uintptr_t(16) + i * 0);",
        "wild read of 4 bytes at 0x10",
        "uintptr_t",
    ),
    Fault(
        "no end",
        f"{I}while (x[i] == 0) ;\nout[i] = 1;",
        "the launch takes too long",
    ),
    Fault(
        "too much threadgroup memory",
        f"{I}threadgroup float big[8193];\nbig[i] = x[i];\nout[i] = big[i];",
        "threadgroup memory: expected up to 32768 bytes, got 32772 with `big`",
        "big[8193]",
    ),
    Fault(
        "too many threads",
        f"{I}out[i] = x[0];",
        r"threadgroup: expected 1 to 1024 threads, got 1056 \(1056, 1, 1\)",
        thread=False,
        options={"threads": 2112, "threadgroup": 1056, "shape": (2112,)},
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_is_found(fault: Fault) -> None:
    options = {"shape": (64,), **fault.options}
    with simulate("check", seconds=1), pytest.raises(MetalError) as caught:
        compute(fault.source, {"x": mx.zeros((fault.n,))}, header=fault.header, **options)
    assert not isinstance(caught.value, CompileError), caught.value
    assert caught.match(fault.says)
    if fault.thread:
        assert caught.match(WHO)
    if fault.quotes:
        numbers = [i for i, x in enumerate(fault.source.split("\n")) if fault.quotes in x]
        assert caught.match(r"test\.metal:\d+")
        assert any(fault.source.split("\n")[i].strip() in str(caught.value) for i in numbers)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled", "random"])
def test_kernel_without_fault_passes_in_every_order(order: str) -> None:
    x = mx.arange(256).astype(mx.float32)
    with simulate("check", order=order, seed=7):
        out = compute(TILES, {"x": x}, (64,))
    assert mx.array_equal(out, x.reshape(4, 64).sum(0)[::-1])


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled", "random"])
@pytest.mark.parametrize("barrier", [FIRST, SECOND])
def test_missing_barrier_is_found_in_every_order(order: str, barrier: str) -> None:
    with simulate("check", order=order, seed=7), pytest.raises(MetalError, match=r"race|uninit"):
        compute(tiles(barrier, ""), {"x": mx.zeros((256,))}, (64,))


def test_too_many_buffers_are_refused() -> None:
    inputs = {f"x{i:02}": mx.zeros((8,)) for i in range(31)}
    total = " + ".join(f"{name}[i]" for name in inputs)
    with simulate("check"), pytest.raises(MetalError, match="buffers: expected up to 31, got 32"):
        compute(f"{I}out[i] = {total};", inputs, (8,), threads=8)


def test_wild_pointer_and_full_stack_do_not_end_the_process_in_the_fast_pass() -> None:
    wild = f"{I}out[i] = *(const device float*)(uintptr_t(16) + i * uint(x[0]));"
    deep = """
    inline int f(int n, thread int* a) {
      int b[900];
      b[n % 900] = n;
      return n < 0 ? 0 : f(n + 1, b) + b[a[0] % 900];
    }
    """
    for source, header in (
        (wild, ""),
        (f"{I}int a[1] = {{int(x[i])}};\nout[i] = f(int(x[i]), a);", deep),
    ):
        with simulate("fast"), pytest.raises(MetalError, match=r"memory fault .* test\.metal:\d+"):
            compute(source, {"x": mx.zeros((64,))}, (64,), header=header)
    with simulate("fast"):
        assert compute(f"{I}out[i] = x[i];", {"x": mx.ones((64,))}, (64,)).sum() == 64
