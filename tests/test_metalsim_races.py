"""Missing and wrong barriers, races, and threads that do not meet: each is found."""

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core", reason="the simulator needs mlx")

# ruff: noqa: E402
from tests.metalsim import MetalError, need, simulate
from tests.metalsim.compute import compute
from tests.metalsim.planted import BARRIER, FIRST, SECOND, TILES, Fault, I, tiles

LANE = "const uint lane = thread_index_in_simdgroup;\n"


@pytest.fixture(autouse=True, scope="module")
def _clang() -> None:
    need()


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
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_is_found(fault: Fault) -> None:
    fault.expect_found()


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
