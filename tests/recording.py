"""A device that records what is launched and replays it: a CUDA graph's rules on a CPU.

What runs is noted, operations of PyTorch and launches of Triton's interpreter, with the tensors
themselves. A replay does the same on the same memory again, whatever Python has come to think in
between. As a graph does, it refuses what waits for the device or brings numbers from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

WAITS = {  # the host asks for a number, or a size depends on one
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim",
        "_unique2",
    )
}  # fmt: skip
SENDS = {"aten::lift_fresh"}  # what torch.tensor makes of numbers


class Waits(TorchDispatchMode):
    """Refuses what a graph cannot have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITS | SENDS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class Launches(Waits):
    """Notes operations and launches, and undoes what they have written."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        for given, x in zip(func._schema.arguments, args, strict=False):
            if given.alias_info is not None and given.alias_info.is_write:
                self.written.append((x, x.clone()))
        found = func(*args, **kwargs)
        self.noted.append((func, args, kwargs, tree_leaves(found)))
        return found

    def launch(self, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        with _disable_current_modes():
            run(*args, **kwargs)
        self.noted.append((run, args, kwargs, []))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block everything is noted; at its end nothing has been written."""
        with pytest.MonkeyPatch.context() as patch, self:
            try:
                from triton.runtime.interpreter import GridExecutor
            except ImportError:
                pass
            else:
                run = GridExecutor.__call__
                patch.setattr(
                    GridExecutor,
                    "__call__",
                    lambda grid, *args, **kwargs: self.launch(run, (grid, *args), kwargs),
                )
            yield
        for x, before in reversed(self.written):
            x.copy_(before)
        self.written.clear()

    def replay(self) -> None:
        """Does all of it again, into the same tensors."""
        for func, args, kwargs, old in self.noted:
            new = func(*args, **kwargs)
            for a, b in zip(old, tree_leaves(new), strict=bool(old)):
                if isinstance(a, torch.Tensor) and a.data_ptr() != b.data_ptr():
                    a.copy_(b)


class Recorder:
    """Stands in for `kvc.backends.torch.graph.record`."""

    def __init__(self) -> None:
        self.recorded: list[Launches] = []
        self.replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        launches = Launches()
        with launches.recording():
            run()
        self.recorded.append(launches)

        def replay() -> None:
            self.replayed += 1
            launches.replay()

        return replay
