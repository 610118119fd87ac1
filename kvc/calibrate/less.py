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

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
    """One layer's queries after the first eviction, and what they are answered. P >= N = T - 1 - c.

    Behind N there are zeros, whose features are zero and whose error is none.
    """

    q: Halves  # [n, Hq, P, D]
    k: Halves  # [n, H, P, D], in the order of eviction
    v: Halves
    out: Halves  # [n, Hq, P, D], of the kept tokens
    lse: NDArray[np.float32]  # [n, Hq, P]
    exact: Halves  # [n, Hq, P, D], of all tokens


def prepare(
    captured: Captured, owner: Captured, less: Less, folder: Path, like: Array
) -> tuple[Data, NDArray[np.float64]]:
    """Runs the policy over all rows of a layer.

    Args:
        captured: The layer.
        owner: The layer whose queries decide what goes: itself, unless it shares a cache.
        less: The policy, its budgets in tokens.
        folder: Where the files go.
        like: An array on the device that computes.

    Returns:
        The layer's data, and the log of the evicted tokens' mass [n, Hq, N].
    """
    n, Hq, T, D = captured.q.shape
    c, H = int(less.heavy + less.recent), captured.k.shape[1]
    N = T - 1 - c
    heads = {"q": Hq, "k": H, "v": H, "out": Hq, "exact": Hq}
    files = {
        name: open_memmap(folder / f"{name}.npy", "w+", np.float16, (n, h, _padded(N), D))
        for name, h in heads.items()
    }
    lse, mass = np.zeros((n, Hq, _padded(N)), np.float32), np.zeros((n, Hq, N))
    for start in range(0, n, ROWS):
        rows = slice(start, start + ROWS)
        run = run_of(captured, owner, less, rows, like)
        exact, log_total = exact_of(captured, rows, c, like)
        order = run.order[..., None]
        files["q"][rows, :, :N] = captured.q[rows, :, c + 1 :]
        files["k"][rows, :, :N] = np.take_along_axis(captured.k[rows], order, 2)
        files["v"][rows, :, :N] = np.take_along_axis(captured.v[rows], order, 2)
        files["out"][rows, :, :N], files["exact"][rows, :, :N] = run.out, exact
        lse[rows, :, :N] = run.lse
        mass[rows] = log_total + np.log(-np.expm1(np.minimum(run.lse - log_total, -1e-6)))
    return Data(**files, lse=lse), mass


def _padded(n: int) -> int:
    return -(-n // CHUNK) * CHUNK


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
    (_, Hq, _, D), H = data.q.shape, data.k.shape[1]
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
    q, k = (xp.from_numpy(x[:ROWS, :, :N], like) for x in (data.q, data.k))
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

    Shapes: as in `Data`; project [Hq D, width]; drop [B, Hq, 1, M] and [B, H, 1, M].
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
