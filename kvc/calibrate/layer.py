"""One layer's kernels while they learn: epochs of Adam, and the errors they are held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, library_of, ops_of
from kvc.calibrate.capture import Captured
from kvc.calibrate.less import Data, Recipe, error_of, exact_of, run_of, squared
from kvc.methods.less import Less
from kvc.ops.evict import Kernels

QUERY_MAPS = 2  # of the kernels; the rest are those of keys, which a sharing layer has from another


class Errors(NamedTuple):
    """Mean squared errors of a layer's output, over the queries behind the budget."""

    bare: float  # of the policy alone
    plus: float  # with the tokens that the state's bytes would buy
    less: float  # with the state


class Epoch(NamedTuple):
    """Where training stands: the errors in the rows held out, and the best kernels so far."""

    number: int
    errors: Errors
    kernels: Kernels


def more_tokens(less: Less, rank: int) -> Less:
    """Baseline+: the policy with R / 2 more tokens, which take the bytes of a state of rank R."""
    n = rank // 2
    if less.policy == "h2o":
        return replace(less, heavy=less.heavy + n // 2, recent=less.recent + n - n // 2)
    if less.policy == "sink":
        return replace(less, recent=less.recent + n)
    return replace(less, heavy=less.heavy + n)


def policy_error(
    captured: Captured, owner: Captured, less: Less, rows: slice, project: Array
) -> float:
    """Mean squared error of the bare policy in some rows; arguments as in `prepare`."""
    xp, c = ops_of(project), int(less.heavy + less.recent)
    out = run_of(captured, owner, less, rows, project).out
    exact, _ = exact_of(captured, rows, c, project)
    error = xp.from_numpy(out - exact, project)
    n, _, N, _ = error.shape
    return float(squared(error, project)) / (n * N * project.shape[1])


def train_layer(
    data: Data,
    start: Kernels,
    bare: float,
    plus: float,
    n_val: int,
    recipe: Recipe,
    layer: int,
    project: Array,
    shares: bool,
) -> Iterator[Epoch]:
    """Epochs of training; the first is what it begins with. The last has the result.

    Args:
        data: From `prepare`.
        start: From `begin`; of a layer that shares a cache, with its owner's maps of keys.
        bare: The policy's error in the rows held out.
        plus: That of Baseline+.
        n_val: How many rows at the end are held out.
        recipe: How it learns.
        layer: The model's number, which seeds the order of the rows and dropout.
        project: The output projection [Hq D, width], on the device that computes.
        shares: Whether the maps of keys stay.
    """
    xp, rng = ops_of(project), np.random.default_rng([recipe.seed, layer, 1])
    fixed = [xp.from_numpy(x, project) for x in start[QUERY_MAPS:]] if shares else []
    per_row = data.order.shape[2] * project.shape[1]

    def loss(params: list[Array], *batch: Array) -> Array:
        q, k, v, out, lse, exact = batch[:6]
        drop = (batch[6], batch[7]) if batch[6:] else None
        kernels = Kernels(*[*params, *fixed])
        error = error_of(kernels, q, k, v, out, lse, exact, project, drop)
        return error / (per_row * q.shape[0])

    learn = import_module(f"kvc.backends.{library_of(project)}.learn")
    learner = learn.Learner(start[:QUERY_MAPS] if shares else start, loss, project)
    n_train = len(data.order) - n_val
    held_out = range(n_train, len(data.order))

    def now() -> float:
        return float(np.mean([learner.loss(*data.batch([row])) for row in held_out]))

    best = Epoch(0, Errors(bare, plus, now()), start)
    yield best
    for epoch in range(recipe.epochs):
        rate = recipe.rate * 0.5 ** (4 * epoch // recipe.epochs)
        order = rng.permutation(n_train)
        for i in range(0, n_train, recipe.batch):
            some = sorted(order[i : i + recipe.batch])
            learner.step(rate, *data.batch(some), *_dropout(rng, start, len(some), recipe.dropout))
        if (error := now()) < best.errors.less:
            kernels = Kernels(*learner.params, *(start[QUERY_MAPS:] if shares else ()))
            best = Epoch(epoch + 1, Errors(bare, plus, error), kernels)
        yield best._replace(number=epoch + 1)


def _dropout(
    rng: np.random.Generator, kernels: Kernels, n: int, share: float
) -> list[NDArray[np.float32]]:
    """Factors of hidden features, the same for all tokens of a sequence. None without dropout."""
    if not share:
        return []
    shapes = [(n, maps.shape[0], 1, maps.shape[2]) for maps in (kernels.a1, kernels.b1)]
    return [(rng.random(s) >= share).astype(np.float32) / np.float32(1 - share) for s in shapes]
