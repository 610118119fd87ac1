"""Peak memory above the weights while a long prompt is taken in pieces and compressed at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.races.inputs import store_error
from benchmarks.races.lab import Lab, shape_fields
from benchmarks.races.rows import Row, Task
from benchmarks.races.sizes import ARMS, LLAMA3_8B
from kvc.methods import Method, parse

STREAMED = ("gear-l 2 bits", "gear-l 4 bits", "dense", "kivi 2 bits", "gear2")
MARGIN = 10  # seconds before the race's end at which a prompt is cut


def activations(lab: Lab, piece: int) -> int:
    """Bytes that one piece takes beside the weights and its own keys and values."""
    model = lab.model(LLAMA3_8B)
    cache = lab.cache(model, Method())
    lab.device.tidy()
    lab.device.forget_peak()
    before = lab.device.held()
    feed(lab, cache, piece, piece)
    return max(0, lab.device.peak() - before - cache.store.nbytes)


@torch.no_grad()
def feed(lab: Lab, cache: object, n: int, piece: int) -> int:
    """A prompt in pieces, as many as there is time for; the tokens that were taken."""
    model = lab.model(LLAMA3_8B)
    for start in range(0, n, piece):
        if start and lab.left() < MARGIN:
            return start
        ids = torch.full((1, min(piece, n - start)), 7, device=model.device)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return n


def row(lab: Lab, arm: str) -> Row:
    """The peak of one method; a row that was cut says so by its tokens."""
    n, piece = lab.sizes.stream
    model = lab.model(LLAMA3_8B)
    own = activations(lab, piece)
    cache = lab.cache(model, parse(*ARMS[arm]), "stream")
    device = lab.device
    device.tidy()
    device.forget_peak()
    before = device.held()
    with lab.listed() as how:
        seconds: list[int] = []
        taken = device.wall(lambda: seconds.append(feed(lab, cache, n, piece))) / 1e3
        done = seconds[0]
        feed(lab, cache, 1, 1)  # a step: the last piece is compressed
        device.sync()
        peak, report = device.peak() - before, cache.store.report()
        of = shape_fields(lab, LLAMA3_8B, 1, done)
        off = store_error(lab, cache.store, of["heads"])
    return {
        **of,
        **how,
        "piece": piece,
        "wanted_tokens": n,
        "prefill_s": taken,
        "peak_bytes": peak,
        "piece_bytes": own,
        "cache_bytes": report.nbytes,
        "dense_bytes": report.dense_bytes,
        "over_cache": (peak - own) / report.nbytes,
        "error": off,
    }


def race(lab: Lab) -> Iterator[Task]:
    """A row for each method."""
    for arm in STREAMED:
        yield Task(f"stream {arm}", partial(row, lab, arm))
