"""Attention as a join of partial answers over disjoint sets of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvc.backends.base import Array, ops_of
from kvc.ops.dispatch import op


class Partial(NamedTuple):
    """Attention over some of the tokens: weighted values, and the log of the denominator."""

    out: Array  # [B, Hq, L, D], zero where nothing is seen
    lse: Array  # [B, Hq, L], -inf where nothing is seen


@op
def attend_dense(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
) -> Partial:
    """softmax(scale q K^T) V over the tokens, and its log-sum-exp.

    With `causal` the newest L tokens are the queries' own: query i sees up to token T - L + i.

    Shapes: q [B, Hq, L, D]; k, v [B, H, T, D].
    """
    xp = ops_of(q)
    B, Hq, L, D = q.shape
    H, T = k.shape[1], k.shape[2]
    if T == 0:  # a row that has had nothing but padding so far
        return Partial(xp.promote(q) * 0, xp.promote(q)[..., 0] * 0 - np.inf)
    q = xp.promote(q).reshape(B, H, Hq // H * L, D)
    scores = (q @ xp.promote(k).swapaxes(-1, -2)) * scale
    scores = scores.reshape(B, H, Hq // H, L, T)
    if softcap:
        scores = xp.tanh(scores / softcap) * softcap
    if causal and L > 1:
        seen = xp.arange(T, q) <= xp.arange(L, q).reshape(L, 1) + (T - L)
        scores = xp.where(seen, scores, scores * 0 - np.inf)
    top = xp.maximum(xp.max(scores, -1, keepdims=True), -1e30)  # finite where nothing is seen
    p = xp.exp(scores - top)
    total = xp.sum(p, -1, keepdims=True)
    some = total > 0
    p = p / xp.where(some, total, total + 1)
    out = p.reshape(B, H, Hq // H * L, T) @ xp.promote(v)
    lse = xp.where(some, top + xp.log(xp.where(some, total, total + 1)), total * 0 - np.inf)
    return Partial(out.reshape(B, Hq, L, D), lse.reshape(B, Hq, L))


def join(parts: Sequence[Partial]) -> Partial:
    """The answer over the union of disjoint sets: lse = logaddexp, outputs by their weights."""
    xp = ops_of(parts[0].out)
    if len(parts) == 1:
        return parts[0]
    lses = xp.stack([p.lse for p in parts], 0)
    top = xp.maximum(xp.max(lses, 0), -1e30)
    weights = xp.exp(lses - top)
    total = xp.sum(weights, 0)
    some = total > 0
    safe = xp.where(some, total, total + 1)
    out = sum((weights[i] / safe)[..., None] * p.out for i, p in enumerate(parts))
    return Partial(out, xp.where(some, top + xp.log(safe), total * 0 - np.inf))
