"""Which function computes an op: its kernel for the array's backend, or its definition."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

from kvc.backends.base import library_of
from kvc.errors import ConfigError, KernelUnavailable

F = TypeVar("F", bound=Callable[..., Any])
Mode = Literal["auto", "fused", "reference"]
KERNELS = {"mlx": "kvc.metal_kernels", "torch": "kvc.cuda_kernels"}

_mode: Mode = "auto"
_ops: dict[str, Callable[..., Any]] = {}


def registered() -> dict[str, Callable[..., Any]]:
    """Every op by its name."""
    return dict(_ops)


@contextmanager
def mode(name: Mode) -> Iterator[None]:
    """Within the block: `auto` a kernel if it can, `fused` a kernel or an error, `reference` none.

    Raises:
        ConfigError: if the name is none of the three.
    """
    global _mode
    if name not in get_args(Mode):
        raise ConfigError(f"mode: expected one of {', '.join(get_args(Mode))}, got {name!r}")
    before, _mode = _mode, name
    try:
        yield
    finally:
        _mode = before


def why_no_kernel(op_name: str, library: str, *args: Any, **kwargs: Any) -> str | None:
    """Why no kernel of `library` can take these arguments, or None if one can."""
    if library not in KERNELS:
        return f"{library} has no kernels"
    kernel = importlib.import_module(KERNELS[library]).FUSED.get(op_name)
    if kernel is None:
        return f"{KERNELS[library]} has no kernel for {op_name}"
    reason: str | None = kernel.why_not(*args, **kwargs)
    return reason


def op(define: F) -> F:
    """Marks a function whose body is its definition; kernels are looked up by its name."""
    name = define.__name__

    @functools.wraps(define)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _mode == "reference":
            return define(*args, **kwargs)
        library = library_of(args[0])
        reason = why_no_kernel(name, library, *args, **kwargs)
        if reason is None:
            kernel = importlib.import_module(KERNELS[library]).FUSED[name]
            return kernel.run(*args, **kwargs)
        if _mode == "fused":
            raise KernelUnavailable(f"{name}: {reason}")
        return define(*args, **kwargs)

    run.define = define  # type: ignore[attr-defined]
    _ops[name] = run
    return run  # type: ignore[return-value]
