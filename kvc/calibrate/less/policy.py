"""An eviction policy over whole sequences: which token goes when, and what the kept ones answer.

Token by token, as in decoding, for all sequences and heads side by side. A step looks at the c + 1
slots alone: T tokens cost T steps of O(c), and nothing of size T^2 is made. A sequence of 2048
tokens takes 0.10 s a layer with c = 102, eight of them side by side in PyTorch on one CPU core (4
query heads of 64), 1024 tokens half of that, 4096 twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, ops_of
from kvc.methods.less import Less
from kvc.ops.attention import scores_of
from kvc.ops.mass import attention_mass
from kvc.store.unit import Query

STEPS = 64  # whose answers go to the host together


class Run(NamedTuple):
    """What became of T tokens under a budget of c, from the first eviction on: N = T - 1 - c."""

    order: NDArray[np.int32]  # [B, H, N], the token that goes before query c + 1 + n
    out: NDArray[np.float32]  # [B, Hq, N, D], what the kept tokens answer that query
    lse: NDArray[np.float32]  # [B, Hq, N]


class _Step(NamedTuple):
    """One query's answer from the slots, and what a policy asks of it."""

    out: Array  # [B, Hq, D]
    lse: Array  # [B, Hq]
    mass: Array  # [B, H, c + 1], of H2O: probabilities, summed over the heads of a group
    least: Array  # [B, 1, c + 1], of TOVA: log of the probability, summed over all heads


def simulate(less: Less, query: Query, k: Array, v: Array, reader: Array | None = None) -> Run:
    """Drops one token after every query that has seen c + 1 or more.

    H2O drops the one with the least mass of attention over what was kept, TOVA the least probable
    one for the query, sink + recent the oldest behind the sinks; of equals the newer. The newest
    `recent` always stay.

    Args:
        less: The policy, its budgets in tokens.
        query: The queries [B, Hq, T, D] of the layer whose tokens these are.
        k: Keys [B, H, T, D], T > c + 1.
        v: Values.
        reader: The queries [B, Hq, T, D] to answer, where another layer reads these tokens.
    """
    xp, (B, H, T, _) = ops_of(k), k.shape
    c = int(less.heavy) + int(less.recent)
    k, v, q = xp.promote(k), xp.promote(v), xp.promote(query.q)
    asks = q if reader is None else xp.promote(reader)
    slots_k, slots_v = k[:, :, : c + 1], v[:, :, : c + 1]
    pos = xp.broadcast_to(xp.arange(c + 1, k), (B, H, c + 1))
    score = attention_mass(
        q[:, :, : c + 1], slots_k, query.scale, softcap=query.softcap, sinks=query.sinks
    )
    step = _step(query._replace(q=q[:, :, c : c + 1]), slots_k, slots_v)
    gone, answers, found = [], [], []
    for t in range(c, T - 1):
        rank = {"h2o": score, "tova": step.least, "sink": -pos}[less.policy]
        if less.policy == "h2o" and less.normalize:
            rank = rank / xp.astype(t + 1 - pos, rank.dtype)
        rank = xp.where(pos <= t - int(less.recent), xp.promote(rank), np.inf)
        lowest = xp.where(rank <= xp.min(rank, -1, keepdims=True), pos, -1)
        gone.append(xp.max(lowest, -1))
        free = pos == gone[-1][..., None]
        pos, score = xp.where(free, t + 1, pos), xp.where(free, 0.0, score)
        slots_k = xp.where(free[..., None], k[:, :, t + 1 : t + 2], slots_k)
        slots_v = xp.where(free[..., None], v[:, :, t + 1 : t + 2], slots_v)
        step = _step(query._replace(q=q[:, :, t + 1 : t + 2]), slots_k, slots_v)
        score = score + step.mass
        told = step
        if reader is not None:
            told = _step(query._replace(q=asks[:, :, t + 1 : t + 2]), slots_k, slots_v)
        answers.append((told.out, told.lse))
        if len(gone) == STEPS or t == T - 2:
            columns = (gone, *zip(*answers, strict=True))
            found.append([xp.to_numpy(xp.stack(list(x), 2)) for x in columns])
            gone, answers = [], []
    order, out, lse = (np.concatenate(pieces, 2) for pieces in zip(*found, strict=True))
    return Run(order, out, lse)


def _step(query: Query, k: Array, v: Array) -> _Step:
    """Shapes: query.q [B, Hq, 1, D]; k, v [B, H, c + 1, D]."""
    xp, q = ops_of(k), query.q
    (B, Hq, _, D), H = q.shape, k.shape[1]
    scores = scores_of(q, k, query.scale, query.softcap)[:, :, :, 0]  # [B, H, G, c + 1]
    top = xp.max(scores, -1, keepdims=True)
    if query.sinks is not None:
        sinks = xp.astype(query.sinks, scores.dtype).reshape(1, H, Hq // H, 1)
        top = xp.maximum(top, sinks)
    p = xp.exp(scores - top)
    total = xp.sum(p, -1, keepdims=True)
    if query.sinks is not None:
        total = total + xp.exp(sinks - top)
    lse = top + xp.log(total)
    logs = (scores - lse).reshape(B, 1, Hq, -1)
    best = xp.max(logs, 2, keepdims=True)
    least = xp.log(xp.sum(xp.exp(logs - best), 2)) + best[:, :, 0]
    p = p / total
    return _Step((p @ v).reshape(B, Hq, D), lse.reshape(B, Hq), xp.sum(p, 2), least)
