"""Runs a compiled kernel: buffers, limits, and errors with their source lines."""

from __future__ import annotations

import ctypes as C
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.metalsim.build import Binary, MetalError, runtime

ORDERS = ("forward", "reverse", "shuffled", "random")
MAX_THREADS, MAX_BUFFERS = 1024, 31


@dataclass
class Buffer:
    """Memory that a kernel is given: bytes to read, or room for an output."""

    name: str
    data: np.ndarray | None = None  # uint8 [size]; None: never written
    size: int = 0  # bytes, where there is no data
    element: int = 1  # bytes of an element
    space: str = "device"  # or "constant"
    output: bool = False
    offset: int = 0  # from the first byte to where the kernel's pointer points
    phase: int = 0  # bytes that the data lies behind a multiple of 16


class Traffic(NamedTuple):
    """Bytes of one buffer: moved by instructions of simdgroups, and asked for by threads."""

    loaded: int
    stored: int
    requested: int


class Run(NamedTuple):
    """What a launch left behind."""

    outputs: list[np.ndarray]  # uint8 [size]
    traffic: list[Traffic]  # one for each buffer
    threadgroup_bytes: int


@cache
def _runtime() -> C.CDLL:
    lib = C.CDLL(str(runtime()))
    size, text, pointer = C.c_size_t, C.c_char_p, C.c_void_p
    lib.msl_begin.argtypes = [C.c_int]
    lib.msl_buffer.argtypes = [text, pointer, size, size, C.c_int, C.c_int, C.c_uint]
    lib.msl_buffer.restype = pointer
    lib.msl_run.argtypes = [pointer, pointer, pointer, pointer, C.c_int, C.c_uint, C.c_double]
    lib.msl_error.restype = text
    lib.msl_threadgroup_bytes.restype = size
    lib.msl_unwritten.argtypes = [C.c_uint, pointer]
    lib.msl_unwritten.restype = size
    lib.msl_traffic.argtypes = [C.c_uint, pointer]
    return lib


@cache
def _entry(path: Path) -> C.c_void_p:
    return C.cast(C.CDLL(str(path)).msl_entry, C.c_void_p)


def launch(
    binary: Binary,
    buffers: Sequence[Buffer],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    *,
    check: bool = True,
    order: str = "forward",
    seed: int = 0,
    seconds: float = 60,
) -> Run:
    """Runs every thread of a grid.

    Args:
        binary: The kernel, compiled for the check pass if `check`.
        buffers: In the order of their indices.
        grid: Threads along each axis.
        threadgroup: Threads of a threadgroup along each axis.
        check: Whether the kernel is one of the check pass, so that faults are found.
        order: In which order threads run: one of `ORDERS`.
        seed: Of the orders "shuffled" and "random".
        seconds: After which a launch is stopped; it may never end.

    Raises:
        MetalError: A fault, a limit of Metal, or an output that is not written whole.
    """
    limits(buffers, grid, threadgroup)
    lib = _runtime()
    lib.msl_begin(check)
    pointers = (C.c_void_p * max(1, len(buffers)))()
    for i, b in enumerate(buffers):
        size = b.size if b.data is None else b.data.nbytes
        data = None if b.data is None else b.data.ctypes.data
        facts = b.space == "constant", not b.output, b.element
        begin = lib.msl_buffer(b.name.encode(), data, size, b.phase, *facts)
        pointers[i] = begin + b.offset
    actual = [min(pair) for pair in zip(threadgroup, grid, strict=True)]
    three = C.c_uint * 3
    how = ORDERS.index(order)
    sizes = three(*grid), three(*actual)
    if lib.msl_run(_entry(binary.path), pointers, *sizes, how, seed, seconds):
        raise MetalError(_explained(lib.msl_error().decode(), binary))
    if check:
        for i, b in enumerate(buffers):
            if b.output:
                _expect_written(lib, i, b)
    counts = (C.c_uint64 * 3)()
    outputs, traffic = [], []
    for i, b in enumerate(buffers):
        lib.msl_traffic(i, counts)
        traffic.append(Traffic(*counts))
        if b.output:
            size = b.size if b.data is None else b.data.nbytes
            outputs.append(np.frombuffer(C.string_at(pointers[i], size), np.uint8))
    return Run(outputs, traffic, lib.msl_threadgroup_bytes())


def limits(buffers: Sequence[Buffer], grid: Sequence[int], threadgroup: Sequence[int]) -> None:
    """Raises MetalError where a launch is larger than Metal allows."""
    threads = int(np.prod(threadgroup))
    if not 1 <= threads <= MAX_THREADS or min(threadgroup) < 1:
        raise MetalError(
            f"threadgroup: expected 1 to {MAX_THREADS} threads, got {threads} {tuple(threadgroup)}"
        )
    if len(grid) != 3 or len(threadgroup) != 3 or min(grid) < 1:
        raise MetalError(f"grid: expected three sizes of at least 1, got {tuple(grid)}")
    if len(buffers) > MAX_BUFFERS:
        raise MetalError(f"buffers: expected up to {MAX_BUFFERS}, got {len(buffers)}")


def _expect_written(lib: C.CDLL, i: int, b: Buffer) -> None:
    first = C.c_size_t()
    if count := lib.msl_unwritten(i, C.addressof(first)):
        raise MetalError(
            f"output `{b.name}`: {count} of {b.size} bytes are never written, the first at element"
            f" {first.value // b.element}"
        )


def _explained(message: str, binary: Binary) -> str:
    """The message with file and line for each code address, and the line itself."""

    def place(found: re.Match[str]) -> str:
        said = subprocess.run(
            ["addr2line", "-i", "-e", found[1], found[2]], capture_output=True, text=True
        ).stdout.split("\n")
        lines = [line.split(" (")[0].rsplit("/", 1)[-1] for line in said]
        return " <- ".join([line for line in lines if ".metal:" in line][:3]) or found[0]

    message = re.sub(r"@(.+?)\+(0x[0-9a-f]+)@", place, message)
    source = binary.source.text.split("\n")
    numbers = dict.fromkeys(int(n) for n in re.findall(r"\.metal:(\d+)", message))
    quoted = [f"  {n}: {source[n - 1].strip()}" for n in [*numbers][:4] if n <= len(source)]
    return "\n".join([message, *quoted])
