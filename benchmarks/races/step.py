"""Race of whole decode steps through transformers, behind caches that are filled directly.

`dense` is the store that compresses nothing: it writes new tokens in place and lets PyTorch's SDPA
attend without a mask, which makes it the strongest dense cache that transformers takes.
`transformers dynamic` is the library's default, which copies the cache at every step, and the
others of the library are its quantized ones. Steps are timed as they come (eager), where it can be
captured as one CUDA graph (the same step again and again, behind the same tokens), and where kvc
records them as users have them with `graph=True`: replayed while the cache grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, QuantizedCache

from benchmarks.races.inputs import fill, sdpa_error, store_error
from benchmarks.races.lab import Lab, shape_fields
from benchmarks.races.rows import Row, Task
from benchmarks.races.sizes import ARMS, Steps
from kvc.backends.torch import graph
from kvc.backends.torch.attention import uninstall
from kvc.measure.speed.clock import NotRaced
from kvc.methods import Method, parse
from kvc.ops.dispatch import Mode, mode

MOST = 12  # timed steps; with all others they end before the next block is due
SPARE = 2 << 30  # bytes that a step takes beside the weights and the cache


class Step:
    """One decode step of all rows."""

    def __init__(self, model: PreTrainedModel, cache: Any, batch: int) -> None:
        self.model, self.cache = model, cache
        self.ids = torch.full((batch, 1), 7, device=model.device)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Logits of the step; the cache has grown."""
        out = self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits


def timed(lab: Lab, step: Step, cache_bytes: int, *, graphed: bool) -> Row:
    """Times of a step, and the least bytes that it moves: the weights and the cache, each once."""
    device, model = lab.device, step.model
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    found: Row = {"weight_bytes": weights, "cache_bytes": cache_bytes}
    eager = device.sample(step, seconds=1, least=3, most=MOST, cold=False)
    found |= {**eager.fields("eager_ms"), "host_ms": device.host(step)}
    best = eager
    if graphed:
        try:
            best = device.sample(device.graph(step), seconds=1, most=50, cold=False)
            found |= best.fields("graph_ms")
        except RuntimeError as why:  # what cannot be captured is still timed as it comes
            found["no_graph"] = str(why).splitlines()[0]
    bytes_ms = (weights + cache_bytes) / device.copy_rate * 1e3
    found |= {"ms": 1e3 * min(eager.median, best.median), "copy_rate": device.copy_rate}
    return found | {"floor_ms": bytes_ms, "bytes": weights + cache_bytes}


def replayed(lab: Lab, step: Step) -> Row:
    """Times of steps that kvc has recorded."""
    step.cache.steps = graph.Steps(step.cache, graph.record)
    graph.route(step.model)
    step()  # as it is recorded by the next one, which the sample's first is
    return lab.device.sample(step, seconds=1, least=3, most=MOST, cold=False).fields("replayed_ms")


def dense_bytes(lab: Lab, name: str, batch: int, n: int) -> int:
    """Bytes of n tokens' keys and values in all rows and layers, as they come."""
    of = shape_fields(lab, name, batch, n)
    numbers = 2 * of["layers"] * of["kv_heads"] * of["head_dim"] * batch * n
    return int(numbers * lab.device.dtype.itemsize)


def room_for_dense(lab: Lab, name: str, batch: int, n: int) -> int:
    """Bytes that the dense store takes: its buffers grow by an eighth."""
    return dense_bytes(lab, name, batch, n) * 9 // 8


def ours(lab: Lab, name: str, method: Method, batch: int, n: int) -> Row:
    """The row of a store."""
    of, model = shape_fields(lab, name, batch, n), lab.model(name)
    if not method.parts:
        lab.need(room_for_dense(lab, name, batch, n))

    def measure(how: Mode) -> Row:
        cache = lab.cache(model, method)
        with mode("reference"):
            fill(lab, cache.store, of["kv_heads"], of["head_dim"], batch, n)
        lab.device.tidy()
        report = cache.store.report()
        used = report.nbytes - report.parts.get("slack", 0)
        step = Step(model, cache, batch)
        found = timed(lab, step, used, graphed=how == "fused" or not method.parts)
        if how == "fused" and lab.records(method):
            found |= replayed(lab, step)
            found["ms"] = min(found["ms"], found["replayed_ms"])
        return found | {
            "dense_bytes": dense_bytes(lab, name, batch, n),
            "error": store_error(lab, cache.store, of["heads"]),
        }

    if method.parts:
        return of | lab.in_mode(measure)
    return of | {"mode": "library"} | measure("reference")


def quantized(backend: str, bits: int, model: PreTrainedModel) -> Any:
    """The library's quantized cache.

    Raises:
        NotRaced: if its backend is not installed.
    """
    try:
        return QuantizedCache(backend, model.config, nbits=bits)
    except ImportError as why:
        raise NotRaced(f"{backend}: {str(why).splitlines()[0]}") from None


PEERS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "transformers dynamic": lambda model: DynamicCache(config=model.config),
    "transformers quanto 4 bits": partial(quantized, "quanto", 4),
    "transformers quanto 2 bits": partial(quantized, "quanto", 2),
    "transformers hqq 4 bits": partial(quantized, "hqq", 4),
}


def peer(lab: Lab, name: str, arm: str, batch: int, n: int) -> Row:
    """The row of one of the library's own caches."""
    of, model = shape_fields(lab, name, batch, n), lab.model(name)
    uninstall(model)
    cache = PEERS[arm](model)
    dense = dense_bytes(lab, name, batch, n)
    lab.need(dense + 4 * dense // of["layers"])
    before = lab.device.held()
    for layer in range(of["layers"]):
        kv = lab.randn(2, 1, of["kv_heads"], n, of["head_dim"], seed=2 + layer)
        cache.update(*kv.expand(-1, batch, -1, -1, -1), layer)
    held = lab.device.held() - before
    found = timed(lab, Step(model, cache, batch), held, graphed=False)
    first = cache.layers[0]
    if type(first) is DynamicLayer:  # quantized ones decode to tensors that are not kept
        q = lab.randn(batch, of["heads"], 1, of["head_dim"], seed=9)
        found["error"] = sdpa_error(q, first.keys, first.values)
    return of | {"mode": "library", **found, "dense_bytes": dense}


def race(lab: Lab, cases: tuple[Steps, ...]) -> Iterator[Task]:
    """All sizes; where dense does not fit, all arms again with smaller batches until it does."""

    def row(case: Steps, batch: int, arm: str) -> Row:
        if arm in PEERS:
            return peer(lab, case.model, arm, batch, case.n)
        return ours(lab, case.model, parse(*ARMS[arm]), batch, case.n)

    for case in cases:
        for batch in case.batches:
            for arm in case.arms:
                key = f"{case.model} {batch} x {case.n} {arm}"
                yield Task(key, partial(row, case, batch, arm))
            weights = sum(p.nbytes for p in lab.model(case.model).parameters())
            room = room_for_dense(lab, case.model, batch, case.n)
            if weights + room + SPARE < lab.device.total:
                break
