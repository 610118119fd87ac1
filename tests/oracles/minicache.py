"""MiniCache: two adjacent layers' vectors as one direction and two norms.

Liu et al. 2024, arXiv:2405.14366. Layer a is the shallower of a pair, b the deeper; K and V are
merged by the same rule, independently. The cache of a pair is `minicache_cache`.
"""

from dataclasses import dataclass
from decimal import Decimal
from math import atan2, cos, pi, sin
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.oracles.attention import Array, stored

EPS_ANGLE = 1e-3  # below: linear blend
EPS_ANTIPODAL = 1e-3  # within this of pi: no direction between
RULES = ("angle", "cosine", "ratio", "literal", "none")


def norm(x: ArrayLike) -> float:
    """The length ||x||_2."""
    return float(np.sqrt(np.sum(np.asarray(x, np.float64) ** 2)))


def unit(x: Array) -> Array:
    """The unit vector x / ||x||, 0 for a zero vector."""
    length = norm(x)
    return x / length if length > 0 else np.zeros_like(x)


def angle(xa: ArrayLike, xb: ArrayLike) -> float:
    """Omega = 2 atan2(||u - v||, ||u + v||) of the unit vectors; 0 where one of them is zero."""
    u, v = unit(np.asarray(xa, np.float64)), unit(np.asarray(xb, np.float64))
    if norm(u) == 0 or norm(v) == 0:
        return 0.0
    return 2 * atan2(norm(u - v), norm(u + v))


def slerp(ua: Array, ub: Array, t: float) -> Array:
    """Direction [sin((1-t) W) u^a + sin(t W) u^b] / sin W, renormalized. Both are unit vectors.

    W < 1e-3: (1-t) u^a + t u^b instead. W > pi - 1e-3: no such direction; u^b.
    """
    w = angle(ua, ub)
    if w > pi - EPS_ANTIPODAL:
        return ub.copy()
    if w < EPS_ANGLE:
        return unit((1 - t) * ua + t * ub)
    return unit((sin((1 - t) * w) * ua + sin(t * w) * ub) / sin(w))


class Merged(NamedTuple):
    """One merged vector pair: x^a ~ norm_a e, x^b ~ norm_b e."""

    e: Array  # [D]
    norm_a: float
    norm_b: float
    angle: float
    antipodal: bool  # has to be retained


def merge(xa: ArrayLike, xb: ArrayLike, t: float = 0.6, how: str = "slerp") -> Merged:
    """One direction for two vectors.

    slerp: `slerp` of the units. max-norm: the unit of the longer, of the deeper if equal. mean:
    e = (x^a + x^b) / 2 with both norms 1, because one averaged vector is all that is kept.
    A zero vector: the other's direction; both zero: the first basis vector.

    Shapes: xa, xb [D].
    """
    xa, xb = np.asarray(xa, np.float64), np.asarray(xb, np.float64)
    norm_a, norm_b = norm(xa), norm(xb)
    w = angle(xa, xb)
    far = w > pi - EPS_ANTIPODAL
    if how == "mean":
        return Merged((xa + xb) / 2, 1.0, 1.0, w, far)
    if norm_a == 0 and norm_b == 0:
        e = np.zeros_like(xa)
        e[0] = 1.0
    elif norm_a == 0:
        e = unit(xb)
    elif norm_b == 0:
        e = unit(xa)
    elif how == "max-norm":
        e = unit(xa) if norm_a > norm_b else unit(xb)
    elif how == "slerp":
        e = slerp(unit(xa), unit(xb), t)
    else:
        raise ValueError(f"how: expected slerp, mean or max-norm, got {how}")
    return Merged(e, norm_a, norm_b, w, far)


class Thresholds(NamedTuple):
    """What decides retention later: extremes of the first merged block."""

    low: float  # d_min, or cos_min, or the smallest angle that "ratio" retained (in units of pi)
    high: float  # d_max, or cos_max; unused by "ratio"


def thresholds(angles: ArrayLike, rule: str, gamma: float) -> Thresholds:
    """Extremes over the compared set, always_keep entries included. Shapes: angles of any shape.

    d = W / pi. ratio: the ceil(gamma n) largest d are retained, in decimal arithmetic.
    """
    d = [float(w) / pi for w in np.asarray(angles, np.float64).ravel()]
    if rule == "cosine":
        d = [cos(w) for w in np.asarray(angles, np.float64).ravel()]
    if rule == "ratio":
        chosen = by_ratio(d, gamma)
        return Thresholds(min((d[i] for i in chosen), default=np.inf), max(d))
    return Thresholds(min(d), max(d))


def by_ratio(d: list[float], gamma: float) -> list[int]:
    """Indices of the ceil(gamma n) largest; of equal ones the earlier."""
    exact = Decimal(str(gamma)) * len(d)
    count = int(exact) + (exact != int(exact))
    return sorted(range(len(d)), key=lambda i: (-d[i], i))[:count]


def passes(w: float, rule: str, gamma: float, limits: Thresholds) -> bool:
    """Whether a rule retains an entry of angle W, given the thresholds.

    angle: d_max - d <= gamma (d_max - d_min). cosine: cos - cos_min <= gamma (cos_max - cos_min).
    literal: d < d_min + gamma (d_max - d_min), which retains what merges best. ratio: d >= low.
    """
    low, high = limits
    if rule == "angle":
        return high - w / pi <= gamma * (high - low)
    if rule == "cosine":
        return cos(w) - low <= gamma * (high - low)
    if rule == "literal":
        return w / pi < low + gamma * (high - low)
    if rule == "ratio":
        return w / pi >= low
    if rule == "none":
        return False
    raise ValueError(f"rule: expected one of {RULES}, got {rule}")


def retained(
    angles: ArrayLike, rule: str, gamma: float, limits: Thresholds | None = None
) -> NDArray[np.bool_]:
    """Which entries a rule retains; without limits, those of this very set.

    Shapes: angles [...], all entries of one row, one tensor, one pair; returns [...].
    """
    angles = np.asarray(angles, np.float64)
    flat = [float(w) for w in angles.ravel()]
    if limits is None and rule == "ratio":
        chosen = set(by_ratio([w / pi for w in flat], gamma))
        keep = [i in chosen for i in range(len(flat))]
    else:
        known = thresholds(angles, rule, gamma) if limits is None and flat else limits
        keep = [known is not None and passes(w, rule, gamma, known) for w in flat]
    return np.array(keep, bool).reshape(angles.shape)


@dataclass(frozen=True)
class Block:
    """Tokens of one tensor of a pair, merged. Units: G = H vectors a token, or 1 of H D."""

    e: Array  # [n, G, W]
    norm_a: Array  # [n, G]
    norm_b: Array  # [n, G]
    angles: Array  # [n, G]
    kept: NDArray[np.bool_]  # [n, G]
    original_a: Array  # [n, G, W], 0 where not retained
    original_b: Array  # [n, G, W]


def vectors(x: ArrayLike, granularity: str) -> Array:
    """[H, n, D] as merged vectors: head [n, H, D], token [n, 1, H D]."""
    rows = np.asarray(x, np.float64).swapaxes(0, 1)
    if granularity not in ("head", "token"):
        raise ValueError(f"granularity: expected head or token, got {granularity}")
    return rows.copy() if granularity == "head" else rows.reshape(rows.shape[0], 1, -1)


def merge_block(
    xa: ArrayLike,
    xb: ArrayLike,
    t: float = 0.6,
    how: str = "slerp",
    rule: str = "angle",
    gamma: float = 0.05,
    granularity: str = "head",
    always_keep: int = 0,
    limits: Thresholds | None = None,
    direction_dtype: str | None = None,
    norm_dtype: str | None = None,
) -> Block:
    """Merge the tokens of two layers; retain by the rule, the first `always_keep`, the antipodal.

    Shapes: xa, xb [H, n, D]. With limits, they decide (a later block); else this set's own.
    """
    xa, xb = vectors(xa, granularity), vectors(xb, granularity)
    n, n_vectors, width = xa.shape
    e = np.zeros((n, n_vectors, width))
    norm_a, norm_b, angles = (np.zeros((n, n_vectors)) for _ in range(3))
    forced = np.zeros((n, n_vectors), bool)
    for i in range(n):
        for g in range(n_vectors):
            one = merge(xa[i, g], xb[i, g], t, how)
            e[i, g], norm_a[i, g], norm_b[i, g] = one.e, one.norm_a, one.norm_b
            angles[i, g] = one.angle
            forced[i, g] = one.antipodal or i < always_keep
    kept = retained(angles, rule, gamma, limits) | forced
    return Block(
        e=stored(e, direction_dtype),
        norm_a=stored(norm_a, norm_dtype),
        norm_b=stored(norm_b, norm_dtype),
        angles=angles,
        kept=kept,
        original_a=np.where(kept[..., None], xa, 0.0),
        original_b=np.where(kept[..., None], xb, 0.0),
    )


def restore(block: Block, layer: str, n_kv_heads: int) -> Array:
    """Values norm e, then the retained originals in their places.

    Shapes: layer "a" or "b"; returns [H, n, D].
    """
    norms = block.norm_a if layer == "a" else block.norm_b
    originals = block.original_a if layer == "a" else block.original_b
    x = norms[..., None] * block.e
    for i, g in np.argwhere(block.kept):
        x[i, g] = originals[i, g]
    return x.reshape(x.shape[0], n_kv_heads, -1).swapaxes(0, 1)


def pairs(n_layers: int, start: int | None = None) -> list[tuple[int, int]]:
    """(S, S+1), (S+2, S+3), ...; S = floor(L / 2) by default; an odd last layer stays alone."""
    first = n_layers // 2 if start is None else start
    return [(a, a + 1) for a in range(first, n_layers - 1, 2)]


def relative_errors(w: float, t: float) -> tuple[float, float]:
    """||x - x^|| / ||x|| of layers a and b after SLERP: 2 sin(t W / 2), 2 sin((1 - t) W / 2)."""
    return 2 * sin(t * w / 2), 2 * sin((1 - t) * w / 2)
