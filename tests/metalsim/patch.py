"""`mx.fast.metal_kernel` on the simulator: library code runs its kernels unchanged."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from tests.metalsim.build import build
from tests.metalsim.launch import Buffer, launch
from tests.metalsim.source import Definition, generate


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel. Bytes are those of device buffers, counted in the check pass only.

    A byte that lanes of a simdgroup load with one instruction is loaded once, as on a GPU.
    """

    name: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    threadgroup_bytes: int  # of threadgroup memory
    inputs_bytes: int  # of all elements of the device inputs
    outputs_bytes: int
    loaded_by: dict[str, int]  # bytes by buffer, outputs included
    stored_by: dict[str, int]
    requested_by: dict[str, int]  # what each thread loads and stores for itself, added up

    @property
    def loaded(self) -> int:
        """Bytes loaded from all device buffers."""
        return sum(self.loaded_by.values())

    @property
    def stored(self) -> int:
        """Bytes stored to all outputs."""
        return sum(self.stored_by.values())


@dataclass
class Simulation:
    """How kernels run, and what they did."""

    mode: str = "check"
    order: str = "shuffled"
    seed: int = 1
    seconds: float = 60
    launches: list[Launch] = field(default_factory=list)


_running: list[Simulation] = []


@contextmanager
def simulate(
    mode: str = "check", *, order: str = "shuffled", seed: int = 1, seconds: float = 60
) -> Iterator[Simulation]:
    """Runs every Metal kernel of MLX, and of kvc, in the simulator.

    Args:
        mode: "check" finds faults and counts traffic; "fast" only computes.
        order: In which order threads run: "forward", "reverse", "shuffled" or "random".
        seed: Of the orders that are drawn.
        seconds: After which a launch is stopped, as one that never ends.
    """
    if mode not in ("check", "fast"):
        raise ValueError(f"simulate: mode must be check or fast, got {mode}")
    import kvc.metal_kernels

    simulation = Simulation(mode, order, seed, seconds)
    _running.append(simulation)
    try:
        with (
            patch.object(mx.fast, "metal_kernel", metal_kernel),
            patch.object(kvc.metal_kernels, "unavailable", lambda: None),
        ):
            yield simulation
    finally:
        _running.remove(simulation)


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
) -> Any:
    """As `mx.fast.metal_kernel`; the kernel runs on the simulation that is on when it is called."""
    definition = Definition(
        name,
        tuple(input_names),
        tuple(output_names),
        source,
        header,
        ensure_row_contiguous,
        atomic_outputs,
    )

    def call(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        outputs = [*zip(output_shapes, output_dtypes, strict=True)]
        return _run(definition, arrays, outputs, grid, threadgroup, template or (), init_value)

    return call


def _run(
    definition: Definition,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Sequence[tuple[str, Any]],
    init_value: float | None,
) -> list[mx.array]:
    simulation = _running[-1]
    check = simulation.mode == "check"
    source = generate(definition, inputs, template, [dtype for _, dtype in outputs])
    binary = build(source, simulation.mode)
    given = dict(zip(definition.input_names, inputs, strict=True))
    results = dict(zip(definition.output_names, outputs, strict=True))
    buffers = [
        _output(p.name, *results[p.name], init_value)
        if p.name in results
        else _input(p.name, given, definition.ensure_row_contiguous)
        for p in binary.parameters
        if p.kind != "attribute"
    ]
    run = launch(
        binary,
        buffers,
        grid,
        threadgroup,
        check=check,
        order=simulation.order,
        seed=simulation.seed,
        seconds=simulation.seconds,
    )
    moved = {b.name: t for b, t in zip(buffers, run.traffic, strict=True) if b.space == "device"}
    simulation.launches.append(
        Launch(
            name=definition.name,
            grid=tuple(grid),
            threadgroup=tuple(threadgroup),
            threadgroup_bytes=run.threadgroup_bytes,
            inputs_bytes=sum(x.nbytes for name, x in given.items() if name in moved),
            outputs_bytes=sum(b.size for b in buffers if b.output),
            loaded_by={name: t.loaded for name, t in moved.items()},
            stored_by={name: t.stored for name, t in moved.items() if name in results},
            requested_by={name: t.requested for name, t in moved.items()},
        )
    )
    return [
        mx.array(data).view(dtype).reshape(shape)
        for data, (shape, dtype) in zip(run.outputs, outputs, strict=True)
    ]


def _output(name: str, shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Buffer:
    size = math.prod(shape) * dtype.size
    start = None if init_value is None else view(mx.full(shape, init_value, dtype))
    data = None if start is None else np.frombuffer(start.tobytes(), np.uint8)
    return Buffer(name, data, size, element=dtype.size, output=True)


def _input(name: str, given: dict[str, mx.array], contiguous: bool) -> Buffer:
    """An array as it lies in memory, or its shape, strides or number of axes."""
    if name in given:
        x = given[name]
        own = view(x, contiguous)
        steps = [(n - 1) * step for n, step in zip(own.shape, own.strides, strict=True)]
        before = -sum(min(0, step) for step in steps) if x.size else 0
        span = sum(map(abs, steps)) + x.itemsize if x.size else 0
        first = own.ctypes.data
        return Buffer(
            name,
            np.frombuffer(ctypes.string_at(first - before, span), np.uint8),
            element=x.itemsize,
            space="constant" if x.size < 8 else "device",
            offset=before,
            phase=(first - before - _origin()) % 16,
        )
    name, _, what = name.rpartition("_")
    x = given[name]
    if what == "shape":
        facts = np.array(x.shape, np.int32)
    elif what == "strides":
        facts = np.array(view(x, contiguous).strides, np.int64) // x.itemsize
    else:
        facts = np.array([x.ndim], np.int32)
    data = facts.view(np.uint8)
    return Buffer(f"{name}_{what}", data, element=facts.itemsize, space="constant")


def view(x: mx.array, contiguous: bool = False) -> np.ndarray:
    """The array's own memory, with its true strides; or a copy in order, as MLX would make.

    Numpy has no bfloat16: its bits come as uint16.
    """
    mx.eval(x)
    bits = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
    memory = np.array(bits, copy=False)
    if not contiguous or memory.flags.c_contiguous:
        return memory
    return view(mx.contiguous(x))


@cache
def _origin() -> int:
    """Where MLX's buffers begin here, past a multiple of 16. On a Mac they begin at one."""
    return view(mx.zeros((64,))).ctypes.data % 16
