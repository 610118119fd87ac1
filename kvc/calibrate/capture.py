"""Queries, keys and values of layers as attention gets them, on disk: they do not fit in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap

from kvc.backends.base import FULL, Array, Engine, ModelShape, ops_of
from kvc.errors import ConfigError, KVCError
from kvc.methods import Method
from kvc.store.store import KVStore
from kvc.store.unit import Query

Halves = np.ndarray[Any, np.dtype[np.float16]]  # on disk; sums are taken in float32
USABLE = 0.5  # of the free space that captured layers may take


class Captured(NamedTuple):
    """One layer's tokens in all rows, after RoPE."""

    q: Halves  # [n, Hq, T, D]
    k: Halves  # [n, H, T, D], of the layer whose cache this one reads
    v: Halves
    owner: int  # that layer, by the model's number
    query: Query  # the last row's, for its scale, softcap and sinks


def layers_of(shape: ModelShape, start: int = 0, stop: int | None = None) -> tuple[int, ...]:
    """The layers that keep all their tokens, by the model's numbers, from `start` up to `stop`."""
    full = [i for i, kind in enumerate(shape.layer_kinds) if kind == FULL]
    return tuple(i for i in full if i in range(shape.n_layers)[start:stop])


def fitting(folder: Path, n_layers: int, shape: ModelShape, n_tokens: int) -> int:
    """How many of `n_layers` layers can be on disk at a time.

    Each takes its queries, keys and values in half precision; besides, the one that learns takes
    two answers to every query.

    Raises:
        ConfigError: If there is no room for one.
    """
    captured = 2 * n_tokens * (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    answers = 4 * n_tokens * shape.n_heads * shape.head_dim
    free = int(USABLE * shutil.disk_usage(folder).free)
    if free < captured + answers:
        raise ConfigError(
            f"{folder}: expected {(captured + answers) / 2**30:.1f} GiB for the activations of one "
            f"layer, got {free / 2**30:.1f} GiB (half of what is free); take fewer --sequences"
        )
    return min(n_layers, (free - answers) // captured)


def capture(
    engine: Engine,
    method: Method,
    rows: np.ndarray[Any, Any],
    layers: Sequence[int],
    folder: Path,
    on_row: Callable[[], None] = lambda: None,
) -> dict[int, Captured]:
    """Runs rows through the model and writes what the attention of its layers gets.

    Args:
        engine: The model.
        method: `none`, or a sharing map: a layer that shares gets its owner's keys and values.
        rows: Token ids [n, T].
        layers: By the model's numbers; those whose cache they read are captured as well.
        folder: Where the files go.
        on_row: Called after each row.

    Returns:
        The captured layers by the model's numbers.

    Raises:
        KVCError: If activations do not fit half precision.
    """
    numbers = layers_of(engine.shape)
    store = engine.store(engine.make_cache(method))
    owner = {n: numbers[store.owner(place)] for place, n in enumerate(numbers)}
    needed = {*layers} | {owner[layer] for layer in layers}
    files: dict[str, Halves] = {}
    queries: dict[int, Query] = {}

    def write(name: str, row: int, x: Array) -> None:
        values = ops_of(x).to_numpy(x)[0]
        if not (peak := np.abs(values).max()) < np.finfo(np.float16).max:
            raise KVCError(
                f"{name}: expected activations that fit half precision, got {peak}; "
                "LESS cannot be trained on this model"
            )
        if name not in files:
            shape = (len(rows), *values.shape)
            files[name] = open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
        files[name][row] = values

    for row, ids in enumerate(rows):
        cache = engine.make_cache(method)
        store = engine.store(cache)
        left = set(needed)

        def hear(
            query: Query, row: int = row, store: KVStore = store, left: set[int] = left
        ) -> None:
            layer = numbers[query.reader]
            if layer not in left:  # a model that shares caches by its own design asks them again
                return
            left.remove(layer)
            queries[layer] = query
            write(f"q-{layer}", row, query.q)
            dense = store.dense(query.reader)
            if owner[layer] == layer and dense is not None:
                write(f"k-{layer}", row, dense[0])
                write(f"v-{layer}", row, dense[1])

        store.listener = hear
        engine.hidden(ids[None], cache)
        on_row()
    return {
        layer: Captured(
            files[f"q-{layer}"],
            files[f"k-{owner[layer]}"],
            files[f"v-{owner[layer]}"],
            owner[layer],
            queries[layer],
        )
        for layer in sorted(needed)
    }
