"""Stores that share a model's heads, in threads that meet, hold to the bit what one store does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from kvc.backends.base import ALONE, Shard
from kvc.methods import parse
from kvc.ops.residual import Outliers, add_rows, of_channels
from kvc.store.store import KVStore

LAYERS, H, D, B = 4, 4, 8, 2
BLOCKS = {"gear.group_size": 8, "gear.buffer": 8}
SOME = {**BLOCKS, "gear.outliers": 0.1}
MEETING: dict[str, tuple[str, dict[str, Any]]] = {
    "outliers": ("gear", SOME),
    "dual": ("gear2", {**SOME, "gear.sink": 4, "gear.window": 4}),
    "kcvt": ("kcvt", BLOCKS),
    "kcvt and outliers": ("kcvt", SOME),
    **{
        rule: ("minicache", {"retention": rule, "gamma": 0.2})
        for rule in ("angle", "cosine", "ratio", "literal")
    },
    "merged and coded": ("minicache+gear", SOME),
    "tova": ("tova", {"less.heavy": 10}),
}
APART: dict[str, tuple[str, dict[str, Any]]] = {
    "kivi": ("kivi", BLOCKS),
    "fit": ("gear-l", BLOCKS),
    "fewer outliers than one": ("gear", {**BLOCKS, "gear.outliers": 0.01}),
    "dual": ("gear2", {**BLOCKS, "gear.backbone": "kcvt"}),
    "antipodal": ("minicache", {"retention": "none"}),
    "h2o": ("h2o", {"less.heavy": 6, "less.recent": 6}),
}


def tokens(n: int, seed: int) -> Any:
    """q [B, 2 H, n, D], k and v [B, H, n, D] of every layer."""
    rng = np.random.default_rng(seed)
    heads = (2 * H, H, H)
    return [[rng.standard_normal((B, h, n, D)).astype("f4") for h in heads] for _ in range(LAYERS)]


STEPS = [tokens(26, 0), *(tokens(1, seed) for seed in range(1, 20))]


def answers(case: tuple[str, dict[str, Any]], shard: Shard) -> list[Any]:
    """Of every layer after every step, for a process's heads."""
    name, settings = case
    method = replace(parse(name, settings), shard=shard)
    store, found = KVStore(method, LAYERS), []
    for step in STEPS:
        for layer, whole in enumerate(step):
            q, k, v = (shard.own(x) for x in whole)
            store.append(layer, k, v)
            found.append(store.attend(layer, q, D**-0.5))
    return found


def together(case: tuple[str, dict[str, Any]], meet: bool = True) -> list[Any]:
    """The same of two stores with half of the heads each, side by side."""
    barrier, given = Barrier(2, timeout=30), [None, None]

    def gathers(index: int) -> Callable[[Any], Any]:
        def gather(x: Any) -> Any:
            assert meet, "nothing should be gathered"
            given[index] = x
            barrier.wait()
            whole = np.concatenate(given, 1)
            barrier.wait()
            return whole

        return gather

    with ThreadPoolExecutor(2) as pool:
        shards = [Shard(index, 2, gathers(index)) for index in range(2)]
        halves = [pool.submit(answers, case, shard) for shard in shards]
        return [np.concatenate(both, 1) for both in zip(*(x.result() for x in halves), strict=True)]


@pytest.mark.parametrize("name", MEETING)
def test_halves_are_the_whole(name: str) -> None:
    want, got = answers(MEETING[name], ALONE), together(MEETING[name])
    assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("name", APART)
def test_nothing_is_gathered_where_heads_are_coded_alone(name: str) -> None:
    want, got = answers(APART[name], ALONE), together(APART[name], meet=False)
    assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("width", [8, 2**15])
def test_outliers_of_some_channels(width: int) -> None:
    """Added up they are those of all; who takes the last of a place alone gets the same."""
    rng, parts, n, m = np.random.default_rng(0), 4, 5, 6
    chosen = [np.sort(rng.permutation(parts * width)[:m]) for _ in range(n)]
    edges = np.arange(0, parts * width, width)
    chosen[0][:] = np.sort([*edges[1:], *(edges[1:] - 1)])  # first and last channels
    kind = np.int16 if parts * width <= 2**16 else np.int32
    whole = Outliers(
        np.array(chosen)[None].astype(kind), rng.standard_normal((1, n, m)).astype("f4")
    )
    nothing = np.zeros((1, parts, n, width), "f4")
    want = add_rows(nothing, whole, "v")
    for part in range(parts):
        own = of_channels(whole, part * width, width)
        assert own.index.dtype == np.int16
        places = own.index.astype(int) & 0xFFFF
        assert (np.diff(places, axis=-1) >= 0).all()
        assert places.max() < width
        mine = nothing[:, :1]
        assert np.array_equal(add_rows(mine, own, "v"), want[:, part : part + 1])
        last = np.zeros((n, width), "f4")
        for row in range(n):
            for place, delta in zip(places[0, row], own.delta[0, row], strict=True):
                last[row, place] = delta
        assert np.array_equal(last[None, None], want[:, part : part + 1])
