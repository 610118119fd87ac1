"""Attention as a join of partial answers over disjoint sets of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kvc.backends.base import Array, ops_of
from kvc.ops.dispatch import op
from kvc.ops.past import Past

TILE = 2048  # coded tokens that are read at a time; bounds what attention holds decoded
FEW = 8  # queries for which tokens are not decoded
CACHED = 2**21  # numbers of coded tokens that few queries take at a time, to bound what is decoded
SCORES = 2**20  # scores that are held at a time, over all heads and rows


class Partial(NamedTuple):
    """Attention over some of the tokens: weighted values, and the log of the denominator.

    With an axis in front of both: answers over as many disjoint sets, not joined yet.
    """

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
    valid: Array | None = None,
    length: Array | None = None,
    joined: Sequence[Partial] = (),
    sinks: Array | None = None,
    dtype: Any = None,
) -> Partial:
    """softmax(scale q K^T) V over the tokens, and its log-sum-exp, joined with other answers.

    With `causal` the newest L tokens are the queries' own: query i sees up to token T - L + i. Many
    queries are taken a few at a time, so that memory grows with T alone.

    With `length` there are so many tokens, and room for T; the number is an array, so that one
    recorded launch serves every length.

    Shapes: q [B, Hq, L, D]; k, v [B, H, T, D]; valid bool [B, H or 1, T], false for empty slots;
    length int32 [1]; joined, sinks and dtype as in `join`.
    """
    own = _answer(q, k, v, scale, causal, softcap, valid, length)
    return join([own, *joined], sinks=sinks, dtype=dtype)


def _answer(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    causal: bool,
    softcap: float | None,
    valid: Array | None,
    length: Array | None = None,
) -> Partial:
    """`attend_dense` over its own tokens alone."""
    xp = ops_of(q)
    B, Hq, L, _ = q.shape
    T = k.shape[2]
    if T == 0:  # a row that has had nothing but padding so far
        return Partial(xp.promote(q) * 0, xp.promote(q)[..., 0] * 0 - np.inf)
    step = max(1, SCORES // (B * Hq * T))
    if step < L:
        parts = []
        for start in range(0, L, step):
            stop = min(start + step, L)
            last, seen = length, T
            if causal and length is not None:
                last = length - (L - stop)
            elif causal:
                seen = max(0, T - L + stop)  # behind padding T may be below L
            some = None if valid is None else valid[:, :, :seen]
            queries = q[:, :, start:stop]
            parts.append(
                _answer(queries, k[:, :, :seen], v[:, :, :seen], scale, causal, softcap, some, last)
            )
        return Partial(*(xp.concat([part[i] for part in parts], 2) for i in (0, 1)))
    scores = scores_of(q, k, scale, softcap, _there(0, T, valid, length, q))
    if causal and L > 1:
        scores = xp.where(causal_mask(L, T if length is None else length, q, T), scores, -np.inf)
    return _softmax(scores, lambda p: p @ xp.promote(v))


def _softmax(scores: Array, sums: Callable[[Array], Array]) -> Partial:
    """The answer from scores [B, H, G, L, T]; `sums` weighs the values by p [B, H, G L, T]."""
    xp = ops_of(scores)
    B, H, G, L, T = scores.shape
    top = xp.maximum(xp.max(scores, -1, keepdims=True), -1e30)  # finite where nothing is seen
    p = xp.exp(scores - top)
    total = xp.sum(p, -1, keepdims=True)
    some = total > 0
    safe = xp.where(some, total, 1.0)
    out = sums((p / safe).reshape(B, H, G * L, T))
    lse = xp.where(some, top + xp.log(safe), -np.inf)
    # a join asks for the lse of all tiles first: lazily, all their probabilities would wait for it
    lse = xp.after(lse, out)
    return Partial(out.reshape(B, H * G, L, -1), lse.reshape(B, H * G, L))


@op
def attend_coded(
    q: Array,
    k: Past,
    v: Past,
    scale: float,
    *,
    softcap: float | None = None,
    valid: Array | None = None,
    length: Array | None = None,
) -> Partial:
    """Attention over tokens that are all older than every query, read a tile at a time.

    A kernel may return the answers over parts of the tokens, not joined. `length` as in
    `attend_dense`: a whole number of blocks, of the n that there is room for.

    Shapes: q [B, Hq, L, D]; k, v of n tokens each; valid bool [B, H or 1, n]; length int32 [1].
    """
    xp, turned, parts = ops_of(q), k.turn(q), []
    B, Hq, L, D = q.shape
    H = k.n_kv_heads
    few = L <= FEW
    tile = max(64, CACHED // (B * H * D)) if few else TILE
    for start in range(0, k.n, tile):
        stop = min(start + tile, k.n)
        some = None if valid is None else valid[:, :, start:stop]
        some = _there(start, stop, some, length, q)
        if few:
            grouped = xp.promote(turned).reshape(B, H, Hq // H * L, D)
            products = k.scores(grouped, start, stop).reshape(B, H, Hq // H, L, stop - start)
            scores = _capped(products * scale, softcap, some)
            parts.append(_softmax(scores, partial(v.sums, start=start, stop=stop)))
        else:  # one decoding is cheap for so many
            keys, values = k.read(start, stop), v.read(start, stop)
            parts.append(_answer(turned, keys, values, scale, False, softcap, some))
    out, lse = join(parts)
    return Partial(v.turn(out), lse)


def scores_of(
    q: Array, k: Array, scale: float, softcap: float | None = None, valid: Array | None = None
) -> Array:
    """Scale q K^T, soft-capped, -inf at keys that are not valid.

    Shapes: returns [B, H, Hq / H, L, T].
    """
    xp = ops_of(q)
    B, Hq, L, D = q.shape
    H, T = k.shape[1], k.shape[2]
    grouped = xp.promote(q).reshape(B, H, Hq // H * L, D)
    products = (grouped @ xp.promote(k).swapaxes(-1, -2)).reshape(B, H, Hq // H, L, T)
    return _capped(products * scale, softcap, valid)


def _capped(scores: Array, softcap: float | None, valid: Array | None) -> Array:
    """Scores [B, H, Hq / H, L, T] soft-capped, -inf at keys that are not valid."""
    xp = ops_of(scores)
    if softcap:
        scores = xp.tanh(scores / softcap) * softcap
    return scores if valid is None else xp.where(valid[:, :, None, None, :], scores, -np.inf)


def _there(
    start: int, stop: int, valid: Array | None, length: Array | None, like: Array
) -> Array | None:
    """Which of the tokens `start` to `stop` are valid and among the first `length`.

    Shapes: valid, and what is returned, bool [B or 1, H or 1, stop - start]; None for all.
    """
    if length is None:
        return valid
    xp = ops_of(like)
    there = (xp.arange(stop - start, like) + start < length).reshape(1, 1, -1)
    return there if valid is None else valid & there


def causal_mask(L: int, T: Any, like: Array, room: int | None = None) -> Array:
    """Which of T tokens each of the newest L sees, in `room` for more where T is an array [1].

    Shapes: returns bool [L, room or T].
    """
    xp = ops_of(like)
    return xp.arange(room or T, like) <= xp.arange(L, like).reshape(L, 1) + (T - L)


@op
def join(parts: Sequence[Partial], *, sinks: Array | None = None, dtype: Any = None) -> Partial:
    """The answer over the union of disjoint sets: lse = logaddexp, outputs by their weights.

    Shapes: sinks [Hq], logits that take part in the denominator and carry no value; out in `dtype`,
    or else in the type that sums are taken in.
    """
    xp = ops_of(parts[0].out)
    stacked = [p if p.out.ndim == 5 else Partial(p.out[None], p.lse[None]) for p in parts]
    answers = [Partial(p.out[i], p.lse[i]) for p in stacked for i in range(p.out.shape[0])]
    out, lse = answers[0]
    if sinks is not None:
        logits = xp.astype(sinks, lse.dtype).reshape(1, -1, 1)
        answers.append(Partial(out * 0, xp.broadcast_to(logits, lse.shape)))
    if len(answers) > 1:
        lses = xp.stack([p.lse for p in answers], 0)
        top = xp.maximum(xp.max(lses, 0), -1e30)
        weights = xp.exp(lses - top)
        total = xp.sum(weights, 0)
        some = total > 0
        safe = xp.where(some, total, 1.0)
        out = sum((weights[i] / safe)[..., None] * p.out for i, p in enumerate(answers))
        lse = xp.where(some, top + xp.log(safe), -np.inf)
    return Partial(out if dtype is None else xp.astype(out, dtype), lse)
