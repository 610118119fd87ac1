"""LESS's kernels of one layer: how they begin, and the error that they are to make small.

Dong et al. 2024, arXiv:2402.09398.

Departures: dropout takes hidden features from a whole sequence, not from each token alone, so that
every backend draws the same; s1 begins where the state has about the mass that the evicted tokens
have (the authors' 1e-4 takes thousands of steps to get there); the error's size is measured behind
the output projection, but its target is recomputed from queries and keys in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, ops_of
from kvc.calibrate.less.data import CHUNK, ROWS, Data
from kvc.ops.attention import causal_mask
from kvc.ops.evict import Kernels, phi, psi

LIMIT = 60.0  # of a log-sum-exp, whose exponential float32 still holds
SCALES = (-9.0, 30.0)  # of log s1 at the start


@dataclass(frozen=True, slots=True)
class Recipe:
    """How kernels are trained, in float32; the numbers are the paper's."""

    rank: int = 8  # R, of the state
    hidden: int = 512  # M, of the feature maps
    epochs: int = 40
    rate: float = 1e-3  # of Adam; halved after each quarter of the epochs
    batch: int = 2  # sequences
    dropout: float = 0.3
    seed: int = 0


def begin(
    data: Data, mass: NDArray[np.float64], recipe: Recipe, layer: int, like: Array
) -> Kernels:
    """The kernels that training begins with, as NumPy arrays; `mass` as `prepare` returns it."""
    (_, Hq, _, D), H = data.captured.q.shape, data.captured.k.shape[1]
    M, R = recipe.hidden, recipe.rank
    rng = np.random.default_rng([recipe.seed, layer])

    def uniform(*shape: int, fans: int) -> NDArray[np.float32]:
        edge = np.sqrt(6 / fans)
        return rng.uniform(-edge, edge, shape).astype(np.float32)

    start = Kernels(
        uniform(Hq, D, M, fans=D + M),
        uniform(Hq, M, R, fans=M + R),
        uniform(H, D, M, fans=D + M),
        uniform(H, M, R, fans=M + R),
        uniform(H, R, R, fans=2 * R),
        np.ones((H, R), np.float32),
        np.full((H, R), 1e-4, np.float32),
    )
    xp, N = ops_of(like), mass.shape[2]
    q, k = (xp.from_numpy(x[:, :, :N], like) for x in data.batch(range(len(mass[:ROWS])))[:2])
    maps = Kernels(*(xp.from_numpy(x, like) for x in start))
    f, g = (xp.to_numpy(x).astype(np.float64) for x in (phi(q, maps), psi(k, maps)))
    rho = (f * np.repeat(g.cumsum(2), Hq // H, 1)).sum(-1)
    ratio = np.median(mass[:ROWS] - np.log(np.maximum(rho, 1e-30)), (0, 2))
    scale = np.exp(np.clip(ratio.reshape(H, -1).mean(1), *SCALES))
    return start._replace(s1=np.repeat(scale[:, None], R, 1).astype(np.float32))


def error_of(
    kernels: Kernels,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    exact: Array,
    project: Array,
    drop: tuple[Array, Array | None] | None = None,
) -> Array:
    """Sum over queries of the squared error of the layer's output, with the state's answers joined.

    o = (out + e (phi H_n)) / (1 + e (phi z_n)), e = exp(-lse), H_n and z_n of the first n + 1.

    Shapes: q, out, exact [B, Hq, P, D]; k, v [B, H, P, D]; lse [B, Hq, P]; project
    [Hq D, width]; drop [B, Hq, 1, M] and [B, H, 1, M].
    """
    xp, (B, Hq, P, D), H = ops_of(q), q.shape, k.shape[1]
    n = P // CHUNK
    f = phi(q, kernels, drop and drop[0]).reshape(B, H, Hq // H, n, CHUNK, -1)
    g = psi(k, kernels, drop and drop[1]).reshape(B, H, 1, n, CHUNK, -1)
    v = xp.promote(v)
    v = xp.concat([v, v[..., :1] * 0 + 1], -1).reshape(B, H, 1, n, CHUNK, D + 1)  # for z
    own = xp.where(causal_mask(CHUNK, CHUNK, q), f @ g.swapaxes(-1, -2), 0.0)
    states = g.swapaxes(-1, -2) @ v
    before = xp.cumsum(states, 3) - states
    answer = (own @ v + f @ before).reshape(B, Hq, P, D + 1)
    e = xp.exp(xp.minimum(xp.maximum(-lse, -LIMIT), LIMIT))[..., None]
    got = (xp.promote(out) + e * answer[..., :D]) / (1 + e * answer[..., D:])
    return squared(got - xp.promote(exact), project)


def squared(error: Array, project: Array) -> Array:
    """Sum of squares behind the output projection. Shapes: error [B, Hq, N, D]."""
    B, Hq, N, D = error.shape
    behind = error.swapaxes(1, 2).reshape(B * N, Hq * D) @ project
    return ops_of(error).sum(ops_of(error).sum(behind * behind, -1), 0)
