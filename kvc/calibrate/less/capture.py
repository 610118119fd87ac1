"""Queries, keys and values of layers as attention gets them, on disk: they do not fit in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap

from kvc.backends.base import Array, Engine, ModelShape, ops_of
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
    query: Query  # one row's first, for its scale, softcap and sinks


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
    on_row: Callable[[int], None] = lambda row: None,
) -> dict[int, Captured]:
    """Runs rows through the model and writes what the attention of its layers gets.

    Args:
        engine: The model.
        method: `none`, or a sharing map: a layer that shares gets its owner's keys and values.
        rows: Token ids [n, T].
        layers: By the model's numbers; those whose cache they read are captured as well.
        folder: Where the files go.
        on_row: Told how many rows are done.

    Returns:
        The captured layers by the model's numbers.

    Raises:
        ConfigError: If there is no room on disk.
        KVCError: If activations do not fit half precision.
    """
    numbers = engine.shape.full_layers
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
            files[name] = half_file(folder / f"{name}.npy", (len(rows), *values.shape))
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
            queries[layer] = query._replace(q=ops_of(query.q).copy(query.q[:, :, :1]))
            write(f"q-{layer}", row, query.q)
            dense = store.dense(query.reader)
            if owner[layer] == layer and dense is not None:
                write(f"k-{layer}", row, dense[0])
                write(f"v-{layer}", row, dense[1])

        store.listener = hear
        engine.hidden(ids[None], cache)
        # Cache, store and listener know each other: without this their tensors would stay until
        # Python looks for such circles, which is seldom.
        store.listener = None
        store.reset()
        on_row(row + 1)
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


def half_file(path: Path, shape: tuple[int, ...]) -> Halves:
    """An array on disk whose room is taken now: where the disk is full, memory maps just die.

    Raises:
        ConfigError: If there is no room.
    """
    try:
        array: Halves = open_memmap(path, "w+", np.float16, shape)
        if hasattr(os, "posix_fallocate"):  # not on a Mac
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: cannot keep activations there: {error.strerror}; take fewer "
            "--sequences, or an --out on another disk"
        ) from None
    return array
