"""Shaders of this folder as MLX kernels: source read once, compiled by MLX on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any
from zlib import crc32

import mlx.core as mx

DTYPES = (mx.float16, mx.bfloat16, mx.float32)  # of tokens
BODY = "// === kernel\n"  # between the functions of a shader and the body of its kernel


@lru_cache
def text(name: str) -> str:
    """A shader; a file that is only included has no body."""
    return (files(__package__) / f"{name}.metal").read_text("utf-8")


@lru_cache
def _kernel(
    make: Callable[..., Any], op: str, include: tuple[str, ...], ins: tuple[str, ...], outs: Any
) -> Callable[..., Any]:
    functions, _, body = text(op).partition(BODY)
    given = "".join(f"#define HAS_{name.upper()} 1\n" for name in ins)
    header = given + "".join(text(name) for name in include) + functions
    return make(
        # MLX tells kernels apart by name, and the inputs that are given change the text
        name=f"kvc_{op}_{crc32((header + body).encode()):08x}",
        input_names=list(ins),
        output_names=list(outs),
        source=body,
        header=header,
        ensure_row_contiguous=False,  # a slice of a buffer is read where it lies
    )


def launch(
    op: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, tuple[Sequence[int], Any]],
    *,
    template: Mapping[str, Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    include: tuple[str, ...] = (),
) -> list[mx.array]:
    """Runs the kernel of `<op>.metal`, with the functions of the files that it includes.

    Inputs are arrays, or numbers for 0-d inputs; those that are None are left out, and for every
    other one the shader sees `HAS_<NAME>`. Outputs are shapes and dtypes. The grid is in threads.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    kernel = _kernel(mx.fast.metal_kernel, op, include, tuple(given), tuple(outputs))
    return kernel(
        inputs=list(given.values()),
        template=list(template.items()),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[tuple(shape) for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
