"""Race of whole generations by the library's own loop; every arm is told the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.measure.choice import Choice
from kvc.measure.speed.bench import LIBRARY, Bench
from kvc.measure.speed.clock import Times
from kvc.measure.speed.library import Told
from kvc.ops.dispatch import mode

Result = dict[str, Any]
NEW = 32  # tokens


class Arm:
    """One cache of a model; each run fills a new one.

    Args:
        bench: The model.
        name: Of a cache of the library's own; empty for a store.
        choice: The method of a store.
        prefill: How it compresses prompts.
        size: Rows, tokens of their prompts, and tokens behind those.
    """

    def __init__(
        self,
        bench: Bench,
        name: str,
        choice: Choice | None,
        prefill: str,
        size: tuple[int, int, int],
    ) -> None:
        self.bench, self.name, self.prefill = bench, name, prefill
        batch, n, new = size
        self.batch, self.ids = batch, bench.tokens(batch, n, seed=11)
        self.forced = bench.tokens(batch, new, seed=12)
        self.method = bench.method(choice) if choice else None
        self.cache: Any = None
        self.how = LIBRARY
        self.log_probs: NDArray[np.float64] = np.empty(0)

    def warm_up(self) -> None:
        """A run, which finds out what computes it.

        Raises:
            NotRaced: If the cache cannot be had, or an op lacks the kernel asked for.
        """
        if self.method is None:
            self._tell()
        else:
            self.how, _ = self.bench.how(self.method, self._tell)

    def _tell(self) -> Told:
        bench, self.cache = self.bench, None
        if self.method is None:
            self.cache = bench.library.make_cache(bench.engine, self.name)
        else:
            with mode("reference"):  # the trial on the model runs the definitions
                self.cache = bench.engine.make_cache(self.method, self.prefill)
        return bench.library.tell(bench.engine, self.cache, self.name, self.ids, self.forced)

    def run(self) -> list[float]:
        """Seconds of the prompt with its first token, then of each other token."""
        with self.how.on():
            told = self._tell()
        self.log_probs = told.log_probs
        return told.times

    def held(self) -> Result:
        """Bytes of the newest run's cache, and the error of its first layer's attention."""
        bench, q = self.bench, self.bench.queries(self.batch)
        if self.method is None:
            layers = bench.library.layers(self.cache)
            nbytes = sum(layer.nbytes for layer in layers)
            return {"bytes": nbytes, "error": bench.rival_error(layers[0], q)}
        store = bench.engine.store(self.cache)
        return {"bytes": store.nbytes, "error": bench.store_error(self.how, store, q)}

    def result(self, runs: list[list[float]], full: NDArray[np.float64] | None) -> Result:
        """What a row says of it; `full` are the dense cache's log-probabilities, if it ran."""
        batch, n = self.ids.shape
        new = self.forced.shape[1]
        prefill, first = ([run[i] for run in runs] for i in (0, 1))
        steps = [step for run in runs for step in run[2:]]
        total = Times.of([sum(run) for run in runs]).median
        loss = {}
        if full is not None:
            loss["loss"] = float((np.exp(full) * (full - self.log_probs)).sum())
        return {
            **self.how.fields,
            **Times.of(steps).fields("ms"),
            **Times.of(prefill).fields("prefill_ms"),
            "first_step_ms": 1e3 * Times.of(first).median,  # in which the prompt is compressed
            "slowest_step_ms": 1e3 * max(steps),
            "prefill_tokens_per_s": batch * n / Times.of(prefill).median,
            "decode_tokens_per_s": batch / Times.of(steps).median,
            "tokens_per_s": batch * new / total,
            "new": new,
            "dense_bytes": self.dense_bytes,
            **loss,
            **self.held(),
        }

    @property
    def dense_bytes(self) -> int:
        """Of a run's tokens, as they come."""
        shape = self.bench.shape
        tokens = self.ids.shape[1] + self.forced.shape[1] - 1
        row = 2 * self.bench.n_layers * shape.n_kv_heads * shape.head_dim * shape.dtype_bytes
        return self.batch * tokens * row
