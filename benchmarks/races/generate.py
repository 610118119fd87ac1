"""Race of whole generations by transformers' own loop, prompts included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.races.inputs import store_error
from benchmarks.races.lab import Lab, shape_fields
from benchmarks.races.rows import Row, Task
from benchmarks.races.sizes import ARMS, Texts
from benchmarks.races.step import PEERS, dense_bytes
from kvc.backends.torch.attention import uninstall
from kvc.methods import Method, parse


class Clock(BaseStreamer):
    """When each token came; the loop has waited for the device by then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then each step's tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left."""


def generated(lab: Lab, text: Texts, cache: Any, new: int) -> list[float]:
    """Seconds of the prefill and of every later token."""
    model = lab.model(text.model)
    ids = torch.arange(text.batch * text.n, device=model.device).reshape(text.batch, text.n)
    ids = (ids * 37 + 11) % model.config.vocab_size
    clock = Clock()
    lab.device.sync()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        streamer=clock,
    )
    return [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]


def row(lab: Lab, text: Texts, method: Method | None, peer: str = "") -> Row:
    """A generation with a method's cache, or with one of the library's own."""
    of, model = shape_fields(lab, text.model, text.batch, text.n), lab.model(text.model)
    if not peer and not (method and method.parts):
        lab.need(dense_bytes(lab, text.model, text.batch, text.n) * 5 // 4)

    def cache() -> Any:
        if method is not None:
            return lab.cache(model, method, graph=lab.records(method))
        uninstall(model)
        return PEERS[peer](model)

    short = Texts(text.model, text.batch, min(text.n, 128), 3, ())
    with lab.listed() as how:
        generated(lab, short, cache(), 3)  # compiles
        lab.device.tidy()
        lab.device.forget_peak()
        before, kept = lab.device.held(), cache()
        prefill, *steps = generated(lab, text, kept, text.new)
        peak = lab.device.peak() - before
        found: Row = {"peak_bytes": peak, "error": None}
        if method is not None:
            found["cache_bytes"] = kept.store.nbytes
            found["error"] = store_error(lab, kept.store, of["heads"])
    total = prefill + sum(steps)
    found |= {
        "graph": method is not None and lab.records(method),
        "new": text.new,
        "prefill_s": prefill,
        "first_step_s": steps[0],  # in which the prompt is compressed
        "ms": statistics.median(steps) * 1e3,
        "ms_spread": [q * 1e3 for q in statistics.quantiles(steps, n=4)[::2]],
        "seconds": total,
        "tokens_per_s": text.batch * text.new / total,
    }
    return of | how | found


def race(lab: Lab) -> Iterator[Task]:
    """All texts with all arms."""
    for text in lab.sizes.texts:
        for arm in text.arms:
            method = None if arm in PEERS else parse(*ARMS[arm])
            key = f"{text.model} {text.batch} x {text.n} + {text.new} {arm}"
            yield Task(key, partial(row, lab, text, method, arm if arm in PEERS else ""))
