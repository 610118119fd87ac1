"""Which function computes an op: its kernel for the array's backend, or its definition.

The mode is that of `mode`, else of the environment variable KVC_MODE, else `auto`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

from kvc.backends.base import library_of
from kvc.errors import ConfigError, KernelUnavailable

F = TypeVar("F", bound=Callable[..., Any])
Mode = Literal["auto", "fused", "reference"]
KERNELS = {"mlx": "kvc.metal_kernels", "torch": "kvc.cuda_kernels"}

_ops: dict[str, Callable[..., Any]] = {}


def _checked(name: str, who: str) -> Mode:
    """`name`, if it is a mode.

    Raises:
        ConfigError: if it is none.
    """
    for known in get_args(Mode):
        if name == known:
            return known
    raise ConfigError(f"{who}: expected one of {', '.join(get_args(Mode))}, got {name!r}")


_mode: Mode = _checked(os.environ.get("KVC_MODE", "auto"), "KVC_MODE")


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
    before, _mode = _mode, _checked(name, "mode")
    try:
        yield
    finally:
        _mode = before


def why_no_kernel(op_name: str, library: str, *args: Any, **kwargs: Any) -> str | None:
    """Why no kernel of `library` can take these arguments, or None if one can."""
    if library not in KERNELS:
        return f"{library} has no kernels"
    package = importlib.import_module(KERNELS[library])
    if op_name not in package.FUSED:
        return f"{KERNELS[library]} has no kernel for {op_name}"
    reason: str | None = package.unavailable()
    if reason is None:
        reason = _kernel(op_name, library).why_not(*args, **kwargs)
    return reason


def _kernel(op_name: str, library: str) -> Any:
    """The module that computes an op with a kernel of `library`."""
    return importlib.import_module(f"{KERNELS[library]}.{op_name}")


def _array(x: Any) -> Any:
    """The first array in sequences of them."""
    while isinstance(x, (tuple, list)):
        x = x[0]
    return x


def op(define: F) -> F:
    """Marks a function whose body is its definition; kernels are looked up by its name."""
    name = define.__name__

    @functools.wraps(define)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _mode == "reference":
            return define(*args, **kwargs)
        library = library_of(_array(args[0]))
        reason = why_no_kernel(name, library, *args, **kwargs)
        if reason is None:
            return _kernel(name, library).run(*args, **kwargs)
        if _mode == "fused":
            raise KernelUnavailable(
                f"{name}: expected a kernel in mode fused, but {reason}; mode auto takes the "
                "definition where there is none"
            )
        return define(*args, **kwargs)

    run.define = define  # type: ignore[attr-defined]
    _ops[name] = run
    return run  # type: ignore[return-value]
