"""One sequence through the cache: the bytes that it holds, the time it takes, the peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Engine, ops_of
from kvc.measure.divergence import CHUNK
from kvc.measure.peak import Peak
from kvc.measure.perplexity import check_ranges, check_rows, feed
from kvc.methods import Method
from kvc.store.report import Report


@dataclass(frozen=True, slots=True)
class Held:
    """What a run took."""

    report: Report
    prefill: float  # seconds
    steps: NDArray[np.float64]  # seconds of each step of decoding
    peak: int | None  # bytes above those before; None where nobody asked


def hold(
    engine: Engine,
    ids: NDArray[Any],
    method: Method,
    prompt: int,
    *,
    prefill: str = "exact",
    peak: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Held:
    """Feeds one sequence [T] to a cache: a prompt, then single tokens, waiting for the device.

    The first step compresses the prompt and counts as a step.

    Args:
        engine: The model.
        ids: Tokens.
        method: How the cache is compressed.
        prompt: Tokens of the prompt.
        prefill: How it is compressed, `exact` or `stream`; see `feed`.
        peak: Whether to watch the peak of memory.
        on_step: Called with the tokens fed so far, and how many there are.

    Raises:
        ConfigError: If there are too few or too many tokens, or the peak cannot be watched.
    """
    rows = np.asarray(ids)[None]
    check_rows(engine, rows, "bytes")
    check_ranges("bytes", {"prompt": (prompt, 1, rows.shape[1] - 1)})
    watch = Peak(engine) if peak else None
    cache, steps, last = engine.make_cache(method, prefill), [], time.perf_counter()
    before = 0.0
    for _, stop, logits in feed(engine, cache, rows, prompt, 1, CHUNK):
        ops_of(logits).to_numpy(logits[:, -1, :1])
        now = time.perf_counter()
        if stop <= prompt:
            before += now - last
        else:
            steps.append(now - last)
        if on_step is not None:
            on_step(stop, rows.shape[1])
        last = time.perf_counter()
    report = engine.store(cache).report()
    return Held(report, before, np.asarray(steps), watch.above() if watch else None)
