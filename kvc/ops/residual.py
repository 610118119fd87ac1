"""What quantization leaves: outliers kept exactly, and a low-rank fit of the error.

GEAR (Kang et al. 2024, arXiv:2403.05527): X is about D + L + S.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from kvc.backends.base import Array, ops_of
from kvc.ops.quant import Role

Numbers: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class LowRank(NamedTuple):
    """A C^T for each head."""

    a: Array  # [B, H, n, r]
    c: Array  # [B, H, D, r]


class Outliers(NamedTuple):
    """Entries that are exact: their places, and what must be added to D + L there."""

    index: Array  # keys [B, H, D, 2k] tokens of the block; values [B, n, 2k] channels of all heads
    delta: Array  # the same shape


def outlier_count(fraction: float, n: int) -> int:
    """Entries kept on each side of a row of `n`; floor of fraction * n / 2, in decimal."""
    return int(Decimal(str(fraction)) * n / 2)


def rows(x: Array, role: Role) -> Array:
    """The rows outliers are chosen in: keys [B, H, D, n]; values [B, n, H * D]."""
    B, H, n, D = x.shape
    return x.swapaxes(-1, -2) if role == "k" else x.swapaxes(1, 2).reshape(B, n, H * D)


def unrows(x: Array, shape: tuple[int, ...], role: Role) -> Array:
    """Back to [B, H, n, D] from the shape of `rows`."""
    B, H, n, D = shape
    return x.swapaxes(-1, -2) if role == "k" else x.reshape(B, n, H, D).swapaxes(1, 2)


def find_outliers(x: Array, role: Role, fraction: float) -> Array | None:
    """Places of the k smallest and the k largest entries of each row; None where k is 0.

    They are in ascending order, so that kernels find those of a few tokens, or of one head, without
    reading the others.
    """
    xp = ops_of(x)
    r = rows(x, role)
    k = outlier_count(fraction, r.shape[-1])
    if k == 0:
        return None
    low = xp.top_k(-r, k)
    # the largest are sought among the rest, else a constant row would list a place twice
    taken = xp.put_along_axis(r, low, xp.take_along_axis(r, low, -1) * 0 - np.inf, -1)
    places = xp.concat([low, xp.top_k(taken, k)], -1)
    return xp.take_along_axis(places, xp.argsort(places, -1), -1)


def fill(x: Array, index: Array, role: Role) -> Array:
    """`x` with its outliers replaced by the mean of their row."""
    xp = ops_of(x)
    r = rows(x, role)
    mean = xp.mean(r, -1, keepdims=True)
    filled = xp.put_along_axis(r, index, xp.broadcast_to(mean, index.shape) * 1, -1)
    return unrows(filled, x.shape, role)


def clear(x: Array, index: Array, role: Role) -> Array:
    """`x` with its outliers set to zero."""
    xp = ops_of(x)
    r = rows(x, role)
    cleared = xp.put_along_axis(r, index, xp.take_along_axis(r, index, -1) * 0, -1)
    return unrows(cleared, x.shape, role)


def take_rows(x: Array, index: Array, role: Role, dtype: Any) -> Outliers:
    """What `x` has at the places `index`, to be stored in `dtype`.

    Places are stored as the low 16 bits where a row has no more than 65536 of them.
    """
    xp = ops_of(x)
    r = rows(x, role)
    places = xp.astype(index, xp.dtype("int16" if r.shape[-1] <= 2**16 else "int32"))
    return Outliers(places, xp.astype(xp.take_along_axis(r, index, -1), dtype))


def add_rows(x: Array, outliers: Outliers, role: Role, start: int = 0) -> Array:
    """`x`, the tokens of a block from `start` on, with the deltas added that lie on them."""
    xp = ops_of(x)
    stop = start + x.shape[2]
    index, delta = xp.astype(outliers.index, xp.dtype("int32")), outliers.delta
    if xp.itemsize(outliers.index) == 2:
        index = index & 0xFFFF
    delta = xp.astype(delta, x.dtype)
    if role == "k":
        inside = (index >= start) & (index < stop)
        index, delta = xp.where(inside, index - start, 0), xp.where(inside, delta, 0)
    else:
        index, delta = index[:, start:stop], delta[:, start:stop]
    return unrows(xp.add_along_axis(rows(x, role), index, delta, -1), x.shape, role)


def of_channels(outliers: Outliers, first: int, count: int) -> Outliers:
    """Outliers of values for `count` of the channels, from `first` on.

    Rows keep their length, as how many lie there differs: the others add zero to the first or last
    channel. Those come before one that is kept there, since a reader may take the last of a place.
    """
    xp = ops_of(outliers.index)
    index = xp.astype(outliers.index, xp.dtype("int32"))
    if xp.itemsize(outliers.index) == 2:
        index = index & 0xFFFF
    inside = (index >= first) & (index < first + count)
    delta = xp.where(inside, outliers.delta, 0)
    index = xp.minimum(xp.maximum(index - first, 0), count - 1)
    order = xp.argsort(2 * index + xp.astype(inside, index.dtype), -1)
    index = xp.take_along_axis(index, order, -1)
    places = xp.astype(index, xp.dtype("int16" if count <= 2**16 else "int32"))
    return Outliers(places, xp.take_along_axis(delta, order, -1))


class Seed(NamedTuple):
    """What the start of a block's power iteration depends on."""

    seed: int
    layer: int
    chunk: int  # number of the block
    # Which of how many processes has these heads, where a model is split by them: what a head is
    # fitted from is what it would be in one process.
    shard: tuple[int, int] = (0, 1)


def start(seed: Seed, role: Role, heads: int, head_dim: int, rank: int) -> Numbers:
    """The seeded start of the power iteration, [H, D, r], equal on every backend.

    A thread draws the next chunk's meanwhile, since that takes longer than all else that the host
    does to code a block of decoding.
    """
    chunk, (shard, shards) = seed.chunk, seed.shard
    of, shape = (seed.seed, seed.layer, role), (heads * shards, head_dim, max(16, rank))
    early = _early.pop(of, None)
    if early and early[:2] == (chunk, shape) and early.rank >= rank and early.numbers.done():
        found = early.numbers.result()
    else:
        found = _draw(*of, chunk, shape, rank)
    later = _thread().submit(_draw, *of, chunk + 1, shape, rank)
    _early[of] = Early(chunk + 1, shape, rank, later)
    return found[heads * shard : heads * (shard + 1), :, :rank]


def _draw(
    seed: int, layer: int, role: Role, chunk: int, shape: tuple[int, int, int], rank: int
) -> Numbers:
    """The first `rank` columns of a draw of this shape."""
    rng = np.random.default_rng([seed, layer, 0 if role == "k" else 1, chunk])
    return rng.standard_normal(shape)[..., :rank].copy()


class Early(NamedTuple):
    """A start that is drawn before it is asked for."""

    chunk: int
    shape: tuple[int, int, int]
    rank: int
    numbers: Future[Numbers]


_early: dict[tuple[int, int, Role], Early] = {}  # by seed, layer and role


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "kvc-start")


def power_iteration(e: Array, c0: Array, n_iter: int) -> LowRank:
    """E is about A C^T with A orthonormal, so A C^T = A A^T E is a projection of E.

    Shapes: e [B, H, n, D]; c0 [H, D, r] with r at most min(n, D).
    """
    xp = ops_of(e)
    c = xp.broadcast_to(c0, (*e.shape[:2], *c0.shape[1:]))
    a = e @ c
    for i in range(n_iter):
        a = xp.orthonormal(e @ (xp.orthonormal(c) if i else c))
        c = e.swapaxes(-1, -2) @ a
    return LowRank(a, c)
