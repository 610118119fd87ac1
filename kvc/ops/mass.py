"""What queries look at: each key's share of their attention, which policies of eviction ask for."""

from __future__ import annotations

import numpy as np

from kvc.backends.base import ALONE, Array, Shard, ops_of
from kvc.ops.attention import SCORES, causal_mask, scores_of
from kvc.ops.dispatch import op


@op
def attention_mass(
    q: Array,
    k: Array,
    scale: float,
    *,
    valid: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    lse: Array | None = None,
) -> Array:
    """Each key's probability, summed over the queries and the query heads of its head.

    Causal as in `attend_dense`. A query whose own token is not valid adds nothing. The queries are
    taken a few at a time, so that memory grows with T alone.

    Shapes: q [B, Hq, L, D]; k [B, H, T, D]; valid bool [B, H or 1, T]; sinks [Hq], logits that
    only take part in the denominator; lse [B, Hq, L], the log of the denominator where attention
    over these very keys, and sinks, has found it; returns [B, H, T] in the type that sums are
    taken in.
    """
    xp = ops_of(q)
    B, Hq, L, _ = q.shape
    H, T = k.shape[1], k.shape[2]
    step = max(16, SCORES // (B * Hq * T))
    total = xp.zeros((B, H, T), xp.promote(q).dtype, q)
    for start in range(0, L, step):
        stop = min(start + step, L)
        scores = scores_of(q[:, :, start:stop], k, scale, softcap, valid)
        scores = xp.where(causal_mask(L, T, q)[start:stop], scores, -np.inf)
        if lse is None:
            below = _log_sum_exp(_with_sinks(scores, sinks), -1)
        else:
            below = lse[:, :, start:stop].reshape(B, H, Hq // H, stop - start, 1)
        p = xp.exp(scores - xp.where(below > -np.inf, below, np.inf))  # 0 where nothing is seen
        if valid is not None:
            own = valid[:, :, None, T - L + start : T - L + stop, None]
            p = xp.where(own, p, 0.0)
        total = total + xp.sum(xp.sum(p, 3), 2)
    return total


def log_probs(
    q: Array,
    k: Array,
    scale: float,
    *,
    valid: Array | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    shard: Shard = ALONE,
) -> Array:
    """Log of each key's probability for one query, summed over all heads, of all processes.

    In logs, because the least probabilities, which a ranking asks for, are no float32 numbers.

    Shapes: q [B, Hq, 1, D]; k, valid, sinks as in `attention_mass`; returns [B, T].
    """
    (B, Hq, _, _), T = q.shape, k.shape[2]
    scores = scores_of(q, k, scale, softcap, valid)
    logs = (scores - _log_sum_exp(_with_sinks(scores, sinks), -1)).reshape(B, Hq, T)
    return _log_sum_exp(shard.whole(logs), 1)[:, 0]


def _with_sinks(scores: Array, sinks: Array | None) -> Array:
    """Scores [B, H, Hq / H, L, T] and behind them the logit of each head's sink."""
    if sinks is None:
        return scores
    xp = ops_of(scores)
    _, H, G, _, _ = scores.shape
    logits = xp.astype(sinks, scores.dtype).reshape(1, H, G, 1, 1)
    return xp.concat([scores, xp.broadcast_to(logits, (*scores.shape[:-1], 1))], -1)


def _log_sum_exp(x: Array, axis: int) -> Array:
    """Log of the sum of exponentials, the axis kept; -inf where there is nothing."""
    xp = ops_of(x)
    top = xp.maximum(xp.max(x, axis, keepdims=True), -1e30)
    total = xp.sum(xp.exp(x - top), axis, keepdims=True)
    return xp.where(total > 0, top + xp.log(xp.where(total > 0, total, 1.0)), -np.inf)
