"""One layer's kernels while they learn: epochs of Adam, and the errors they are held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, ModelShape, library_of, ops_of
from kvc.calibrate.less.capture import Captured
from kvc.calibrate.less.data import Data, exact_of, run_of
from kvc.calibrate.less.loss import Recipe, error_of, squared
from kvc.methods.less import Less
from kvc.ops.evict import Kernels

QUERY_MAPS = 2  # of the kernels; the rest are those of keys, which a sharing layer has from another


class Errors(NamedTuple):
    """Mean squared errors of a layer's output, over the queries behind the budget."""

    bare: float  # of the policy alone
    plus: float  # with the tokens that the state's bytes would buy, over the same queries
    less: float  # with the state


class Epoch(NamedTuple):
    """Where training stands: the errors in the rows held out, and the best kernels so far."""

    number: int
    best: int  # the epoch after which errors and kernels were these; 0 for the start
    errors: Errors
    kernels: Kernels


def more_tokens(less: Less, rank: int, shape: ModelShape) -> Less:
    """Baseline+: the policy with the tokens that the bytes of a state buy, rounded up.

    A head's state takes 4 R (D + 1) bytes, a kept token 2 D numbers, its position, and its score.
    """
    token = 2 * shape.head_dim * shape.dtype_bytes + 4 + 4 * (less.policy == "h2o")
    n = math.ceil(4 * rank * (shape.head_dim + 1) / token)
    if less.policy == "h2o":
        return replace(less, heavy=less.heavy + n // 2, recent=less.recent + n - n // 2)
    if less.policy == "sink":
        return replace(less, recent=less.recent + n)
    return replace(less, heavy=less.heavy + n)


def bare_error(data: Data, rows: range, project: Array) -> float:
    """Mean squared error of the policy alone, in some rows."""
    xp, total = ops_of(project), 0.0
    for row in rows:
        error = data.out[[row]].astype(np.float32) - data.exact[[row]]
        total += float(squared(xp.from_numpy(error, project), project))
    return total / (len(rows) * data.order.shape[2] * project.shape[1])


def plus_error(data: Data, owner: Captured, plus: Less, rows: range, project: Array) -> float:
    """The same of a policy that keeps more tokens, over the same queries."""
    xp, total = ops_of(project), 0.0
    c = int(plus.heavy + plus.recent)
    for row in rows:
        some = slice(row, row + 1)
        out = run_of(data.captured, owner, plus, some, project).out
        exact, _ = exact_of(data.captured, some, c, project)
        total += float(squared(xp.from_numpy(out - exact, project), project))
    return total / (len(rows) * data.order.shape[2] * project.shape[1])


def epochs(
    data: Data,
    start: Kernels,
    bare: float,
    plus: float,
    held_out: range,
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
        held_out: The rows at the end that errors are measured on.
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
        drop = (batch[6], None if shares else batch[7]) if batch[6:] else None
        kernels = Kernels(*[*params, *fixed])
        error = error_of(kernels, q, k, v, out, lse, exact, project, drop)
        return error / (per_row * q.shape[0])

    learn = import_module(f"kvc.backends.{library_of(project)}.learn")
    learner = learn.Learner(start[:QUERY_MAPS] if shares else start, loss, project)
    n_train = held_out.start

    def now() -> float:
        return float(np.mean([learner.loss(*data.batch([row])) for row in held_out]))

    best = Epoch(0, 0, Errors(bare, plus, now()), start)
    yield best
    for epoch in range(recipe.epochs):
        rate = recipe.rate * 0.5 ** (4 * epoch // recipe.epochs)
        order = rng.permutation(n_train)
        for i in range(0, n_train, recipe.batch):
            some = sorted(order[i : i + recipe.batch])
            learner.step(rate, *data.batch(some), *_dropout(rng, start, len(some), recipe.dropout))
        if (error := now()) < best.errors.less:
            kernels = Kernels(*learner.params, *(start[QUERY_MAPS:] if shares else ()))
            best = Epoch(epoch + 1, epoch + 1, Errors(bare, plus, error), kernels)
        yield best._replace(number=epoch + 1)


def _dropout(
    rng: np.random.Generator, kernels: Kernels, n: int, share: float
) -> list[NDArray[np.float32]]:
    """Factors of hidden features, the same for all tokens of a sequence. None without dropout."""
    if not share:
        return []
    shapes = [(n, maps.shape[0], 1, maps.shape[2]) for maps in (kernels.a1, kernels.b1)]
    return [(rng.random(s) >= share).astype(np.float32) / np.float32(1 - share) for s in shapes]
