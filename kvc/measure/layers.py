"""What compression does to each layer alone: the error of its keys, values and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, Engine, ops_of
from kvc.errors import ConfigError
from kvc.measure.divergence import CHUNK
from kvc.measure.perplexity import batch_size, check_ranges, check_rows, feed
from kvc.methods import Method, parse
from kvc.ops.attention import attend_dense
from kvc.store.store import KVStore
from kvc.store.unit import Query


class LayerErrors(NamedTuple):
    """Of each layer of the store: |x' - x| / |x| over all rows, heads and tokens."""

    attention: list[float]  # of the answers to the full model's queries
    k: list[float] | None  # of the keys as attention sees them; None where tokens are evicted
    v: list[float] | None


class _Errors:
    """Squares of differences, and of what they are differences from, by layer."""

    def __init__(self, n_layers: int) -> None:
        self.off, self.all = np.zeros(n_layers), np.zeros(n_layers)

    def add(self, layer: int, got: Array, expected: Array) -> None:
        xp = ops_of(expected)
        a, b = xp.promote(got), xp.promote(expected)
        for into, x in ((self.off, a - b), (self.all, b)):
            into[layer] += float(xp.sum((x * x).reshape(-1), 0))

    def ratios(self) -> list[float]:
        return [float(x) for x in np.sqrt(self.off / self.all)]


def layer_errors(
    engine: Engine,
    ids: NDArray[Any],
    method: Method,
    prompt: int,
    *,
    prefill: str = "exact",
    on_step: Callable[[int, int], None] | None = None,
) -> LayerErrors:
    """Asks a compressed cache what the full one was asked, layer by layer.

    The full model reads rows [n, T] and lays open the queries, keys and values of all tokens behind
    the prompt. The compressed cache is given the same prompt, then the same keys, values and
    queries, token by token: errors do not add up from layer to layer, but for methods that change
    how the prompt is read.

    Args:
        engine: The model.
        ids: Tokens of rows of one length. [n, T].
        method: How the cache is compressed.
        prompt: Tokens of the prompt.
        prefill: How it is compressed, `exact` or `stream`; see `feed`.
        on_step: Called with the tokens fed so far, and how many there are in all rows.

    Raises:
        ConfigError: If rows are too short or too long for the model, an argument is out of range,
            or the model's attention does not come to the cache.
    """
    ids = np.asarray(ids)
    check_rows(engine, ids, "layers")
    n, T = ids.shape
    check_ranges("layers", {"prompt": (prompt, 1, T - 1)})
    batch, size = batch_size(engine, T, min(CHUNK, prompt)), len(engine.shape.full_layers)
    errors = {name: _Errors(size) for name in ("attention", "k", "v")}
    for first in range(0, n, batch):
        some = ids[first : first + batch]
        full, queries = _asked(engine, some, prompt)
        answers = [_answer(full, layer, query) for layer, query in enumerate(queries)]
        cache = engine.make_cache(method, prefill)
        for _ in feed(engine, cache, some[:, :prompt], prompt, 1, CHUNK):
            pass
        store = engine.store(cache)
        for place in range(prompt, T):
            start = place - prompt
            for layer, query in enumerate(queries):
                k, v = (x[:, :, place : place + 1] for x in _dense(full, layer))
                now = query.part(start, start + 1)
                store.append(layer, k, v)
                got = store.attend(layer, now.q, now.scale, now.softcap, now.sinks)
                errors["attention"].add(layer, got, answers[layer][:, :, start : start + 1])
            if on_step is not None:
                on_step(first * T + len(some) * (place + 1), n * T)
        for layer in () if method.evicts else range(size):
            pairs = zip(("k", "v"), store.read(layer), _dense(full, layer), strict=True)
            for name, got, expected in pairs:
                errors[name].add(layer, got, expected)
    k, v = (None if method.evicts else errors[name].ratios() for name in ("k", "v"))
    return LayerErrors(errors["attention"].ratios(), k, v)


def check_layers(engine: Engine, ids: NDArray[Any]) -> None:
    """That layers can be asked one by one.

    Raises:
        ConfigError: If the model's attention does not come to the cache.
    """
    _asked(engine, ids[:1, :4], 2)


def _asked(engine: Engine, ids: NDArray[Any], prompt: int) -> tuple[KVStore, list[Query]]:
    """The full model's store of rows, and every layer's queries behind the prompt.

    Raises:
        ConfigError: If the model's attention does not come to the cache.
    """
    cache = engine.make_cache(parse("none"))
    store, heard = engine.store(cache), dict[int, Query]()
    for _ in feed(engine, cache, ids[:, :prompt], prompt, 1, CHUNK):
        pass
    store.listener = lambda query: heard.update({query.reader: query})
    engine.logits(ids[:, prompt:], cache)
    store.listener = None  # cache, store and listener know each other
    size = len(engine.shape.full_layers)
    if sorted(heard) != list(range(size)):
        raise ConfigError(
            f"layers: expected a model whose attention asks the cache, got "
            f"{engine.shape.family}, which is given dense tensors; leave out this task"
        )
    return store, [heard[layer] for layer in range(size)]


def _dense(store: KVStore, layer: int) -> tuple[Array, Array]:
    """K and V [B, H, T, D] of a store that compresses nothing."""
    found = store.dense(layer)
    assert found is not None
    return found


def _answer(store: KVStore, layer: int, query: Query) -> Array:
    """The full cache's answer to the newest queries. [B, Hq, L, D]."""
    k, v = _dense(store, layer)
    return attend_dense(
        query.q, k, v, query.scale, causal=True, softcap=query.softcap, sinks=query.sinks
    ).out
