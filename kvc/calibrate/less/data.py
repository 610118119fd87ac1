"""What a layer's kernels learn from: a policy's run over its rows, and the exact answers.

Dong et al. 2024, arXiv:2402.09398. Under a policy that evicts one token a step, query c + 1 + n
sees the first n + 1 evicted tokens, in the order in which they went. So the state's answers to all
queries are causal linear attention over the tokens in that order, which takes a time linear in
their number; what the kept tokens answer does not change while the kernels learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, ops_of
from kvc.calibrate.less.capture import Captured, Halves, half_file
from kvc.calibrate.less.policy import Run, simulate
from kvc.methods.less import Less
from kvc.ops.attention import attend_dense

CHUNK = 128  # tokens whose products with their own queries are made at once
ROWS = 8  # sequences that a policy runs over side by side


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
    out, exact = (half_file(folder / f"{name}.npy", (n, Hq, N, D)) for name in ("out", "exact"))
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
    full = attend_dense(q, k, v, query.scale, causal=True, softcap=query.softcap, sinks=query.sinks)
    late = slice(c + 1, None)
    return xp.to_numpy(full.out[:, :, late]), xp.to_numpy(full.lse[:, :, late]).astype(np.float64)
