"""Accesses that are not allowed, and limits of Metal: each fault is found, with line and thread."""

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core", reason="the simulator needs mlx")

# ruff: noqa: E402
from tests.metalsim import MetalError, need, simulate
from tests.metalsim.compute import compute
from tests.metalsim.planted import Fault, I, tiles


@pytest.fixture(autouse=True, scope="module")
def _clang() -> None:
    need()


FAULTS = [
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
    fault.expect_found()


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
