"""Exact attention, the join of partial answers, and the attention mass of a key.

Slow and obvious: one query of one head at a time, in float64.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Partial(NamedTuple):
    """A query's answer over a set of tokens: its mean value, and the log of its denominator."""

    out: Array  # [Hq, L, D]
    lse: Array  # [Hq, L]; -inf where a query sees no token, and then out is 0


def stored(x: ArrayLike, dtype: str | None) -> Array:
    """Round x to the dtype it is kept in ("float16", "float32"; None: not at all), as float64."""
    exact = np.asarray(x, np.float64)
    if dtype is None:
        return exact.copy()
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype: expected float16, float32 or None, got {dtype}")
    return exact.astype(dtype).astype(np.float64)


def kv_head(j: int, n_heads: int, n_kv_heads: int) -> int:
    """The key/value head which query head j reads: g(j) = j // G, G = Hq / H."""
    if n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads do not divide among {n_kv_heads}")
    return j // (n_heads // n_kv_heads)


def scores(
    q: ArrayLike,
    k: ArrayLike,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> Array:
    """Scores s_i = scale q.k_i, then softcap tanh(s_i / softcap); -inf where a query may not look.

    Causal: query l of L stands at position T - L + l and sees the keys up to its own.

    Shapes: q [Hq, L, D]; k [H, T, D]; mask [L, T], true where allowed; returns [Hq, L, T].
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    (n_heads, n_queries, head_dim), (n_kv_heads, n_keys, _) = q.shape, k.shape
    scale = head_dim**-0.5 if scale is None else scale
    s = np.full((n_heads, n_queries, n_keys), -np.inf)
    for j in range(n_heads):
        g = kv_head(j, n_heads, n_kv_heads)
        for l in range(n_queries):
            row = scale * (k[g] @ q[j, l])
            if softcap is not None:
                row = softcap * np.tanh(row / softcap)
            for i in range(n_keys):
                ahead = causal and i > n_keys - n_queries + l
                if not ahead and (mask is None or mask[l, i]):
                    s[j, l, i] = row[i]
    return s


def log_sum_exp(s: ArrayLike) -> float:
    """The log of sum_i exp(s_i) of one row, -inf for a row that is empty or all -inf."""
    s = np.asarray(s, np.float64)
    top = float(np.max(s, initial=-np.inf))
    return top if np.isinf(top) else top + float(np.log(np.sum(np.exp(s - top))))


def softmax(s: ArrayLike) -> Array:
    """Probabilities exp(s_i - lse) of one row; zeros when nothing is allowed."""
    s = np.asarray(s, np.float64)
    lse = log_sum_exp(s)
    return np.zeros_like(s) if np.isinf(lse) else np.exp(s - lse)


def probs(
    q: ArrayLike,
    k: ArrayLike,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    mask: NDArray[np.bool_] | None = None,
    sinks: ArrayLike | None = None,
) -> Array:
    """Softmax over the keys; a sink is one more logit per query head, with no value.

    Shapes: q [Hq, L, D]; k [H, T, D]; sinks [Hq]; returns [Hq, L, T], rows sum to 1 less the sink.
    """
    s = scores(q, k, scale, causal, softcap, mask)
    p = np.zeros_like(s)
    for j in range(s.shape[0]):
        for l in range(s.shape[1]):
            row = list(s[j, l])
            if sinks is not None:
                row.append(float(np.asarray(sinks)[j]))
            p[j, l] = softmax(row)[: s.shape[2]]
    return p


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    mask: NDArray[np.bool_] | None = None,
    sinks: ArrayLike | None = None,
) -> Partial:
    """Attention out = softmax(scale q k^T) v and its log-sum-exp, the sink included in both.

    Shapes: q [Hq, L, D]; k, v [H, T, D]; sinks [Hq]; returns out [Hq, L, D], lse [Hq, L].
    """
    v = np.asarray(v, np.float64)
    s = scores(q, k, scale, causal, softcap, mask)
    out = np.zeros((s.shape[0], s.shape[1], v.shape[2]))
    lse = np.zeros(s.shape[:2])
    for j in range(s.shape[0]):
        g = kv_head(j, s.shape[0], v.shape[0])
        for l in range(s.shape[1]):
            row = list(s[j, l])
            if sinks is not None:
                row.append(float(np.asarray(sinks)[j]))
            lse[j, l] = log_sum_exp(row)
            p = softmax(row)
            out[j, l] = p[: s.shape[2]] @ v[g]
    return Partial(out, lse)


def sink_partial(sinks: ArrayLike, n_queries: int, head_dim: int) -> Partial:
    """The sinks alone, to join once to partials that were taken without them: out 0, lse sink."""
    sinks = np.asarray(sinks, np.float64)
    out = np.zeros((len(sinks), n_queries, head_dim))
    return Partial(out, np.repeat(sinks[:, None], n_queries, axis=1))


def join(partials: Iterable[Partial]) -> Partial:
    """Join over disjoint sets: lse = log sum_p exp(lse_p), out = sum_p exp(lse_p - lse) out_p.

    Shapes: each out [Hq, L, D], lse [Hq, L].
    """
    parts = list(partials)
    out = np.zeros_like(parts[0].out, dtype=np.float64)
    lse = np.zeros_like(parts[0].lse, dtype=np.float64)
    for j in range(lse.shape[0]):
        for l in range(lse.shape[1]):
            row = [float(p.lse[j, l]) for p in parts]
            lse[j, l] = log_sum_exp(row)
            for weight, p in zip(softmax(row), parts, strict=True):
                if weight > 0:  # a part which saw nothing may hold anything
                    out[j, l] += weight * p.out[j, l]
    return Partial(out, lse)


def attention_mass(
    q: ArrayLike,
    k: ArrayLike,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    mask: NDArray[np.bool_] | None = None,
    sinks: ArrayLike | None = None,
    lse: ArrayLike | None = None,
) -> Array:
    """Mass_i = sum over the queries, and the G query heads of a key head, of exp(s_i - lse).

    With lse given (a denominator over more tokens than these) it is used as it is.

    Shapes: q [Hq, L, D]; k [H, T, D]; lse [Hq, L]; returns [H, T].
    """
    s = scores(q, k, scale, causal, softcap, mask)
    p = probs(q, k, scale, causal, softcap, mask, sinks) if lse is None else np.zeros_like(s)
    n_kv_heads = np.asarray(k).shape[0]
    mass = np.zeros((n_kv_heads, s.shape[2]))
    for j in range(s.shape[0]):
        for l in range(s.shape[1]):
            row = p[j, l] if lse is None else np.exp(s[j, l] - np.asarray(lse)[j, l])
            mass[kv_head(j, s.shape[0], n_kv_heads)] += row
    return mass
