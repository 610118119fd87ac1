"""A model with one method: what the worker needs of it, and how engines give it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kvc.backends.base import Engine
    from kvc.backends.sequences import Batch
    from kvc.methods import Method
    from kvc.serve.prefixes import Prefixes
    from kvc.store.report import Report


class Model(Protocol):
    """What the worker needs of a model with a method."""

    engine: Engine
    prefixes: Prefixes | None

    def batch(self) -> Batch:
        """A new batch of sequences."""

    def cache(self) -> Any:
        """A new cache."""

    def settle(self, cache: Any) -> None:
        """Compresses what a prompt has left dense, in place."""

    def report(self, cache: Any) -> Report:
        """The bytes of a cache."""

    def rest(self) -> None:
        """Gives back what memory it can: nothing is to be done for a while."""

    def close(self) -> None:
        """Ends what the library keeps for this thread, which is the last that it hears of it."""


class Served:
    """An engine whose caches all have one method.

    Args:
        engine: Loaded in the thread that calls this.
        method: Of the caches.
        prefill: `exact` or `stream`.
        prefill_step: Tokens of a prompt in one piece.
        max_batch: Sequences that are generated together, at most.
    """

    prefixes: Prefixes | None = None

    def __init__(
        self, engine: Engine, method: Method, prefill: str, prefill_step: int, max_batch: int
    ) -> None:
        self.engine, self.method, self.prefill = engine, method, prefill
        self.prefill_step, self.max_batch = prefill_step, max_batch
        self.cache()  # what the method and the model have against each other is said at once

    def batch(self) -> Batch:
        """A new batch of sequences."""
        return self.engine.batch(limit=self.max_batch, prefill_step=self.prefill_step)

    def cache(self) -> Any:
        """A new cache."""
        return self.engine.make_cache(self.method, self.prefill, free=True)

    def settle(self, cache: Any) -> None:
        """Compresses what a prompt has left dense, in place."""
        store = self.engine.store(cache)
        if store.length():
            store.trim(0)  # the prompt is over
            store.settle()
        if self.engine.name == "mlx":
            import mlx.core as mx

            mx.eval([entry.state for entry in cache])

    def rest(self) -> None:
        """Gives memory that the libraries keep for later back to the system."""
        if self.engine.name == "mlx":
            import mlx.core as mx

            mx.clear_cache()
        elif self.engine.name == "cuda":
            import torch

            torch.cuda.empty_cache()
        # glibc keeps what many small arrays have left, and returns it when it is asked.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def close(self) -> None:
        """Ends what the library keeps for this thread, the last thing done in it.

        MLX has compiled functions of each thread. The end of the thread would drop them too, but
        `Thread.join` does not wait for that: Python may be gone by then, and the process aborts.
        """
        if self.engine.name == "mlx":
            import mlx.core as mx

            mx.clear_streams()

    def report(self, cache: Any) -> Report:
        """The bytes of a cache."""
        return self.engine.store(cache).report()

    def size(self, cache: Any) -> int:
        """Bytes of all that a cache holds, the library's own layers too."""
        if isinstance(cache, list):
            return sum(int(entry.nbytes) for entry in cache)
        others = (x for layer in cache.others for x in vars(layer).values())
        return self.engine.store(cache).nbytes + sum(getattr(x, "nbytes", 0) for x in others)
