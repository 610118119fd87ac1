"""Where Triton's kernels are tested: on the GPU, or without one in Triton's interpreter.

`triton.jit` decides when it decorates whether a function is compiled or interpreted, and Triton's
own functions (tl.sum, tl.max) are decorated when it is imported. Other tests import it, and our
kernels, before: so `kernels` turns whatever is decorated into its interpreted form. Outside the
block nothing takes the kernels, as if this module had not been there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.cases import array
from tests.conftest import need

DECORATED = ("triton.language", "kvc.cuda_kernels")  # modules with functions of Triton


def on_gpu() -> bool:
    """Whether there is a GPU."""
    import torch

    return torch.cuda.is_available()


def marks() -> list[pytest.MarkDecorator]:
    """For `pytestmark`: `-m cuda` runs these tests where they run on a GPU."""
    return [pytest.mark.cuda] if on_gpu() else []


@contextmanager
def kernels() -> Iterator[str]:
    """The device whose tensors the kernels take within the block; the mode `fused` takes them."""
    need("torch")
    need("triton")
    if on_gpu():
        yield "cuda"
        return
    import triton

    import kvc.cuda_kernels

    with triton.knobs.runtime.scope(), pytest.MonkeyPatch.context() as patch:
        triton.knobs.runtime.interpret = True
        interpret_loaded()
        patch.setattr(kvc.cuda_kernels, "unavailable", lambda: None)
        yield "cpu"


def interpret_loaded() -> None:
    """Functions of Triton that were decorated to be compiled are interpreted from now on."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith(DECORATED):
            for key, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, key, InterpretedFunction(value.fn))


def tensor(x: np.ndarray[Any, Any], dtype: str, device: str) -> Any:
    """`x` as a tensor, rounded to `dtype`."""
    from kvc.backends.torch import ops

    return array(ops, x, dtype).to(device)


@dataclass
class Count:
    """Bytes that launches have loaded and stored."""

    loaded: int = 0
    stored: int = 0

    @property
    def touched(self) -> int:
        return self.loaded + self.stored


@contextmanager
def counted() -> Iterator[Count]:
    """Counts what the kernels load and store within the block, in the interpreter.

    An address counts once for each instruction of a program that touches it.
    """
    from triton.runtime.interpreter import interpreter_builder

    builder, count = type(interpreter_builder), Count()
    load, store = builder.create_masked_load, builder.create_masked_store

    def size(pointers: Any, mask: Any) -> int:
        seen = np.broadcast_to(mask.data, pointers.data.shape)
        elements = np.unique(pointers.data[seen]).size
        return elements * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count.loaded += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        yield count


@contextmanager
def launched() -> Iterator[list[str]]:
    """Names of the kernels that are launched within the block, in the interpreter."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    call = GridExecutor.__call__

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", noting)
        yield names
