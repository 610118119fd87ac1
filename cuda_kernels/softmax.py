"""The running softmax that attention kernels share, as functions of Triton.

A row is a query of a query head. Of the scores it has seen so far it keeps the largest, `top`
[ROWS], the sum of exp2(score - top), `total` [ROWS], and the sum of exp2(score - top) value,
`weighted` [ROWS, D], all in float32. It begins with -inf, 0 and 0. Scores are logits * log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
STAGES = tl.constexpr(3)  # tiles of answers on their way at a time


@triton.jit
def scores_of(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores from q K^T: scaled, and capped to softcap tanh(x / softcap)."""
    x = products * scale
    if SOFTCAP:  # tanh(y) = 1 - 2 / (1 + exp(2 y))
        x = softcap * (1 - 2 / (1 + tl.exp2(x * (2 * LOG2E) / softcap)))
    return x * LOG2E


@triton.jit
def take(top, total, scores):
    """Of one tile of scores [ROWS, N], -inf where not seen: top, total, factor and p.

    p [ROWS, N] are the weights of the tile's values, and `factor` [ROWS] is that of what has been
    weighted before: weighted = weighted * factor + p V.
    """
    new = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - finite[:, None])
    factor = tl.exp2(top - finite)
    return new, total * factor + tl.sum(p, 1), factor, p


@triton.jit
def take_stack(
    top, total, weighted, outs, lses, n, every, first, rows, row, d,
    D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """With n answers over other tokens: outs [n, every, D] and lses [n, every], contiguous.

    Of `every` row the `rows` from `first` on are `row` [ROWS] = 0, 1, ... An answer is a token of
    which one row alone sees the score, lse, and the value, out. PAIRS (answer, row) at a time.
    """
    for start in tl.range(0, n * rows, PAIRS, num_stages=STAGES):
        pair = start + tl.arange(0, PAIRS)
        there = pair < n * rows
        at = (pair // rows).to(tl.int64) * every + first + pair % rows
        lse = tl.load(lses + at, mask=there, other=float("-inf"))
        own = row[:, None] == (pair % rows)[None, :]
        scores = tl.where(own, (lse * LOG2E)[None, :], float("-inf"))
        top, total, factor, p = take(top, total, scores)
        values = tl.load(
            outs + at[:, None] * D + d[None, :],
            mask=there[:, None] & (d < D)[None, :],
            other=0.0,
        )
        weighted = add_weighted(weighted * factor[:, None], p, values)
    return top, total, weighted


@triton.jit
def add_weighted(weighted, p, values):
    """Weighted + p V in float32; of one row as a sum, since products of matrices have 16."""
    if p.shape[0] == 1:
        weighted += tl.sum(tl.trans(p) * values, 0)[None, :]
    else:
        weighted = tl.dot(p, values, weighted, input_precision="ieee")
    return weighted


@triton.jit
def take_sink(top, total, weighted, logit):
    """With one logit [ROWS] more, which has no value: a sink."""
    top, total, factor, _ = take(top, total, (logit * LOG2E)[:, None])
    return top, total, weighted * factor[:, None]


@triton.jit
def finish(top, total, weighted):
    """Out [ROWS, D] and lse [ROWS]; zero and -inf where nothing was seen."""
    some = total > 0
    safe = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.log2(safe)) * LN2, float("-inf"))
    return weighted / safe[:, None], lse
