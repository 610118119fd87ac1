"""LESS's kernels of one layer, learned from what the exact attention of that layer answers.

Dong et al. 2024, arXiv:2402.09398. Under a policy that evicts one token a step, query c + 1 + n
sees the first n + 1 evicted tokens, in the order in which they went. So the state's answers to all
queries are causal linear attention over the tokens in that order, which takes a time linear in
their number; what the kept tokens answer does not change while the kernels learn.

Departures: dropout takes hidden features from a whole sequence, not from each token alone, so that
every backend draws the same; s1 begins where the state has about the mass that the evicted tokens
have (the authors' 1e-4 takes thousands of steps to get there); the error's size is measured behind
the output projection, but its target is recomputed from queries and keys in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from kvc.backends.base import Array, ops_of
from kvc.calibrate.capture import Captured, Halves
from kvc.calibrate.policy import Run, simulate
from kvc.methods.less import Less
from kvc.ops.attention import attend_dense, causal_mask
from kvc.ops.evict import Kernels, phi, psi

CHUNK = 128  # tokens whose products with their own queries are made at once
ROWS = 8  # sequences that a policy runs over side by side
LIMIT = 60.0  # of a log-sum-exp, whose exponential float32 still holds
SCALES = (-9.0, 30.0)  # of log s1 at the start


@dataclass(frozen=True, slots=True)
class Recipe:
    """How kernels are trained; the defaults are the paper's, but for the amount of text."""

    rank: int = 8  # R, of the state
    hidden: int = 512  # M, of the feature maps
    epochs: int = 40
    rate: float = 1e-3  # of Adam; halved after each quarter of the epochs
    batch: int = 2  # sequences
    dropout: float = 0.3
    seed: int = 0


class Data(NamedTuple):
    """One layer's rows under a policy: N = T - 1 - c queries after the first eviction."""

    captured: Captured
    order: NDArray[np.int32]  # [n, H, N], tokens as they go
    out: Halves  # [n, Hq, N, D], what the kept tokens answer
    lse: NDArray[np.float32]  # [n, Hq, N]
    exact: Halves  # [n, Hq, N, D], what all tokens answer

    def batch(self, rows: Sequence[int]) -> list[NDArray[Any]]:
        """Queries, keys and values by eviction, answers: what `error_of` takes of some rows.

        Behind N there are zeros up to a multiple of CHUNK, whose features and errors are zero.
        """
        some, N = list(rows), self.order.shape[2]
        order = self.order[some][..., None]
        q = self.captured.q[some, :, -N:]
        k, v = (np.take_along_axis(x[some], order, 2) for x in self.captured[1:3])
        end = -N % CHUNK
        return [
            np.pad(x, [(0, 0), (0, 0), (0, end), *[(0, 0)] * (x.ndim - 3)])
            for x in (q, k, v, self.out[some], self.lse[some], self.exact[some])
        ]


def prepare(
    captured: Captured, owner: Captured, less: Less, folder: Path, like: Array
) -> tuple[Data, NDArray[np.float64]]:
    """Runs the policy over all rows of a layer.

    Args:
        captured: The layer.
        owner: The layer whose queries decide what goes: itself, unless it shares a cache.
        less: The policy, its budgets in tokens.
        folder: Where the answers go.
        like: An array on the device that computes.

    Returns:
        The layer's data, and the log of the evicted tokens' mass [n, Hq, N].
    """
    n, Hq, T, D = captured.q.shape
    c = int(less.heavy + less.recent)
    N = T - 1 - c
    out, exact = (
        open_memmap(folder / f"{name}.npy", "w+", np.float16, (n, Hq, N, D))
        for name in ("out", "exact")
    )
    lse, mass = np.zeros((n, Hq, N), np.float32), np.zeros((n, Hq, N))
    order = np.zeros((n, captured.k.shape[1], N), np.int32)
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        run = run_of(captured, owner, less, rows, like)
        order[rows], out[rows], lse[rows] = run
        exact[rows], total = exact_of(captured, rows, c, like)
        mass[rows] = total + np.log(-np.expm1(np.minimum(run.lse - total, -1e-6)))
    return Data(captured, order, out, lse, exact), mass


def run_of(captured: Captured, owner: Captured, less: Less, rows: slice, like: Array) -> Run:
    """A policy's run over some rows of a layer; arguments as in `prepare`."""
    xp = ops_of(like)
    k, v, q, asks = (
        xp.from_numpy(x[rows], like) for x in (captured.k, captured.v, owner.q, captured.q)
    )
    reader = None if captured is owner else asks
    return simulate(less, captured.query._replace(q=q), k, v, reader)


def exact_of(
    captured: Captured, rows: slice, c: int, like: Array
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """All tokens' answers to the queries after the first eviction, and their log-sum-exp."""
    xp, query = ops_of(like), captured.query
    q, k, v = (xp.from_numpy(x[rows], like) for x in captured[:3])
    full = attend_dense(q, k, v, query.scale, causal=True, softcap=query.softcap)
    out, lse = xp.to_numpy(full.out), xp.to_numpy(full.lse).astype(np.float64)
    if query.sinks is not None:  # logits with no value behind them
        total = np.logaddexp(lse, xp.to_numpy(query.sinks).reshape(1, -1, 1))
        out, lse = out * np.exp(lse - total)[..., None].astype(np.float32), total
    return out[:, :, c + 1 :], lse[:, :, c + 1 :]


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
    drop: tuple[Array, Array] | None = None,
) -> Array:
    """Sum over queries of the squared error of the layer's output, with the state's answers joined.

    o = (out + e (phi H_n)) / (1 + e (phi z_n)), e = exp(-lse), H_n and z_n of the first n + 1.

    Shapes: q, out, exact [B, Hq, P, D]; k, v [B, H, P, D]; lse [B, Hq, P]; project [Hq D, width]; drop [B, Hq, 1, M] and [B, H, 1, M].
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
