"""The text that a Mac would compile, from MLX's own generator."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.metalsim.build import Source

make_kernel = mx.fast.metal_kernel  # MLX's own, whatever takes its place later


@dataclass(frozen=True)
class Definition:
    """What `mx.fast.metal_kernel` is called with."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False


def generate(
    definition: Definition,
    inputs: Sequence[mx.array],
    template: Sequence[tuple[str, Any]],
    output_dtypes: Sequence[mx.Dtype],
) -> Source:
    """The source of the kernel for inputs of these dtypes, of no axis, under 8 elements, or more.

    A call while a function is exported prints it, with no Metal device at hand.
    """
    kinds = tuple((x.dtype, 0 if x.ndim == 0 else 1 if x.size < 8 else 8) for x in inputs)
    return _generate(definition, kinds, tuple(template), tuple(output_dtypes))


@cache
def _generate(
    definition: Definition,
    kinds: tuple[tuple[mx.Dtype, int], ...],
    template: tuple[tuple[str, Any], ...],
    output_dtypes: tuple[mx.Dtype, ...],
) -> Source:
    kernel = make_kernel(
        name=definition.name,
        input_names=list(definition.input_names),
        output_names=list(definition.output_names),
        source=definition.source,
        header=definition.header,
        ensure_row_contiguous=definition.ensure_row_contiguous,
        atomic_outputs=definition.atomic_outputs,
    )

    def call(*inputs: mx.array) -> Any:
        return kernel(
            inputs=list(inputs),
            template=list(template),
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)] * len(output_dtypes),
            output_dtypes=list(output_dtypes),
            verbose=True,
            stream=mx.gpu,
        )

    examples = [mx.zeros((n,) if n else (), dtype) for dtype, n in kinds]
    printed = _exported(call, examples)
    text = printed.split("```\n", 1)[1].rsplit("\n```", 1)[0]
    instance = re.findall(r"\[\[kernel\]\] decltype\(([^;]*?)\) [^;]*;\s*$", text)
    name = re.findall(r"\[\[kernel\]\] void (custom_kernel_\w+)\(", text)[-1]
    return Source(definition.name, text, name, instance[0] if instance else name)


def _exported(call: Any, inputs: Sequence[mx.array]) -> str:
    """What MLX prints while it exports a function. It writes to the descriptor, past sys.stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(str(Path(folder) / "kernel.mlxfn"), call, *inputs)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        printed.seek(0)
        return printed.read().decode()
