"""MiniCache's merge: two adjacent layers' vectors as one direction and two norms.

Liu et al. 2024, arXiv:2405.14366. Layer a is the shallower of a pair, b the deeper.

Departures: the printed retention rule keeps the pairs that merge best; here the ones that merge
worst are kept (`literal` is the printed rule). Nearly parallel units are blended, not vectors.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

from kvc.backends.base import Array, ops_of
from kvc.errors import ConfigError
from kvc.ops.dispatch import op

How = Literal["slerp", "mean", "max-norm"]
Granularity = Literal["head", "token"]
Rule = Literal["angle", "cosine", "ratio", "literal", "none"]

EPS_ANGLE = 1e-3  # below: a linear blend
EPS_ANTIPODAL = 1e-3  # this near to pi: there is no direction between


class Merged(NamedTuple):
    """Pairs of vectors: x^a is about norm_a e, x^b about norm_b e. G = H, or 1 for whole tokens."""

    e: Array  # [B, H, T, D]
    norm_a: Array  # [B, G, T]
    norm_b: Array  # [B, G, T]
    angle: Array  # [B, G, T]


class Thresholds(NamedTuple):
    """What decides retention: extremes over one batch row's compared set."""

    low: Array  # [B], d_min = W_min / pi, or cos_min, or the smallest d that `ratio` retained
    high: Array  # [B], d_max or cos_max


def angle(ua: Array, ub: Array) -> Array:
    """W = 2 atan2(|u - v|, |u + v|) of unit vectors, accurate at both ends, unlike arccos."""
    xp = ops_of(ua)
    return 2 * xp.arctan2(_norm(ua - ub), _norm(ua + ub))


def slerp(ua: Array, ub: Array, t: float) -> Array:
    """The direction [sin((1-t) W) u^a + sin(t W) u^b] / sin W of unit vectors, renormalized.

    Nearly parallel: (1-t) u^a + t u^b. Nearly antipodal: u^b.
    """
    return _slerp(ua, ub, angle(ua, ub), t)


def _slerp(ua: Array, ub: Array, w: Array, t: float) -> Array:
    xp = ops_of(ua)
    near, far = w < EPS_ANGLE, w > math.pi - EPS_ANTIPODAL
    base = xp.where(near | far, 1.0, xp.sin(w))
    of_a = xp.where(near, 1.0 - t, xp.where(far, 0.0, xp.sin((1 - t) * w) / base))
    of_b = xp.where(near, float(t), xp.where(far, 1.0, xp.sin(t * w) / base))
    return _unit(of_a[..., None] * ua + of_b[..., None] * ub)[0]


@op
def merge_pair(
    xa: Array, xb: Array, t: float, how: How = "slerp", granularity: Granularity = "head"
) -> Merged:
    """One direction for two layers' vectors of the same token.

    `max-norm` takes the longer one's direction, the deeper's if equal. `mean` averages the
    vectors themselves, so its norms are 1. A zero vector takes the other's direction.

    Shapes: xa, xb [B, H, T, D].

    Raises:
        ConfigError: if `how` or `granularity` is none of those listed.
    """
    if how not in get_args(How):
        raise ConfigError(f"merge: expected one of {', '.join(get_args(How))}, got {how!r}")
    if granularity not in get_args(Granularity):
        names = ", ".join(get_args(Granularity))
        raise ConfigError(f"granularity: expected one of {names}, got {granularity!r}")
    xp = ops_of(xa)
    shape = tuple(xa.shape)
    xa, xb = (vectors(xp.promote(x), granularity) for x in (xa, xb))
    (ua, norm_a), (ub, norm_b) = _unit(xa), _unit(xb)
    no_a, no_b = (norm_a == 0)[..., None], (norm_b == 0)[..., None]
    basis = xp.astype(xp.arange(xa.shape[-1], xa) == 0, xa.dtype)
    ua = xp.where(no_a, xp.where(no_b, ua + basis, ub), ua)
    ub = xp.where(no_b, ua, ub)
    w = angle(ua, ub)
    if how == "mean":
        one = xp.zeros(w.shape, w.dtype, w) + 1
        return Merged(_tokens((xa + xb) / 2, shape, granularity), one, one, w)
    if how == "max-norm":
        e = xp.where((norm_a > norm_b)[..., None], ua, ub)
    else:
        e = _slerp(ua, ub, w, t)
    return Merged(_tokens(e, shape, granularity), norm_a, norm_b, w)


def restore(e: Array, norm: Array) -> Array:
    """One layer's vectors, norm e. Shapes: e [B, H, T, D]; norm [B, H or 1, T]."""
    xp = ops_of(e)
    return xp.promote(norm)[..., None] * xp.promote(e)


def thresholds(angle: Array, rule: Rule, gamma: float) -> Thresholds:
    """The extremes of a compared set: all entries of a row, always_keep or not.

    Shapes: angle [B, G, T].
    """
    _check(rule)
    xp = ops_of(angle)
    d = _flat(xp.cos(angle) if rule == "cosine" else angle / math.pi)
    if rule != "ratio":
        return Thresholds(xp.min(d, -1), xp.max(d, -1))
    count = _count(gamma, d.shape[1])
    ranked = xp.take_along_axis(d, xp.argsort(-d, -1), -1)
    return Thresholds(ranked[:, count - 1] if count else ranked[:, 0] * 0 + 4.0, ranked[:, 0])


def retained(
    angle: Array,
    rule: Rule,
    gamma: float,
    limits: Thresholds | None = None,
    always_keep: int = 0,
) -> Array:
    """Which entries keep both originals: by the rule, the first `always_keep`, the antipodal.

    angle: d_max - d <= gamma (d_max - d_min). cosine: cos - cos_min <= gamma (cos_max - cos_min).
    ratio: the ceil(gamma n) largest d, of equal ones the earlier; with limits d >= low.
    literal: d < d_min + gamma (d_max - d_min). Without limits, those of this very set.

    Shapes: angle [B, G, T]; returns bool [B, G, T].
    """
    _check(rule)
    xp = ops_of(angle)
    B, G, T = angle.shape
    keep = (angle > math.pi - EPS_ANTIPODAL) | (xp.arange(T, angle) < always_keep)
    if rule == "none":
        return keep
    if rule == "ratio" and limits is None:
        rank = xp.argsort(xp.argsort(-_flat(angle), -1), -1)
        return keep | (rank < _count(gamma, T * G)).reshape(B, T, G).swapaxes(1, 2)
    limits = limits or thresholds(angle, rule, gamma)
    low, high = limits.low.reshape(B, 1, 1), limits.high.reshape(B, 1, 1)
    d = xp.cos(angle) if rule == "cosine" else angle / math.pi
    if rule == "angle":
        return keep | (high - d <= gamma * (high - low))
    if rule == "cosine":
        return keep | (d - low <= gamma * (high - low))
    if rule == "literal":
        return keep | (d < low + gamma * (high - low))
    return keep | (d >= low)


def _check(rule: str) -> None:
    if rule not in get_args(Rule):
        raise ConfigError(f"retention: expected one of {', '.join(get_args(Rule))}, got {rule!r}")


def _count(gamma: float, n: int) -> int:
    """ceil(gamma n), in decimal arithmetic."""
    return math.ceil(Fraction(str(gamma)) * n)


def _flat(x: Array) -> Array:
    """[B, G, T] as [B, T G]: earlier tokens first."""
    return x.swapaxes(1, 2).reshape(x.shape[0], -1)


def _norm(x: Array) -> Array:
    xp = ops_of(x)
    return xp.sqrt(xp.sum(x * x, -1))


def _unit(x: Array) -> tuple[Array, Array]:
    """The unit vectors, 0 for a zero vector, and the norms."""
    xp = ops_of(x)
    norm = _norm(x)
    return x / xp.where(norm > 0, norm, 1.0)[..., None], norm


def vectors(x: Array, granularity: Granularity) -> Array:
    """[B, H, T, D] as it is, or as [B, 1, T, H D]."""
    B, H, T, D = x.shape
    return x if granularity == "head" else x.swapaxes(1, 2).reshape(B, 1, T, H * D)


def _tokens(x: Array, shape: tuple[int, ...], granularity: Granularity) -> Array:
    B, H, T, D = shape
    return x if granularity == "head" else x.reshape(B, T, H, D).swapaxes(1, 2)
