"""GEAR: one chunk, X^ = deq(Q) + A C^T + Delta. The streaming cache is `gear_cache`.

Kang et al. 2024, arXiv:2403.05527, on the backbone of KIVI, arXiv:2402.02750. Rotation and
two-sided scales: SAW-INT4, arXiv:2604.19157, and KVarN, arXiv:2606.03458.
"""

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.oracles.attention import Array, stored
from tests.oracles.codes import (
    Codes,
    Role,
    dequantize,
    dual_quantize,
    hadamard,
    pack,
    quantize,
)

VARIANTS = {  # name: (low rank, outliers)
    "quant": (False, False),
    "gear_l": (True, False),
    "gear_s": (False, True),
    "gear": (True, True),
}


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of GEAR, and what a tensor is rounded to when it is stored."""

    variant: str = "gear"
    backbone: str = "kivi"  # kivi, kcvt, token
    k_bits: int = 2
    v_bits: int = 2
    k_group: int = 64
    v_group: int = 64
    buffer: int = 64  # n_b
    prefill_rank: int = 4  # r_p
    rank: int = 2  # r_d
    outliers: float = 0.02  # s, half of them low, half high
    n_iter: int = 3  # I
    seed: int = 0
    layer: int = 0
    meta: str | None = None  # dtype of m and step, and of mu, r, c
    zero: str | None = "same"  # dtype of m where it differs
    cache: str | None = None  # dtype of A, C and Delta
    sink: int = 0
    window: int = 0
    value_window: str = "chunk"  # chunk, sliding
    rotate: str | None = None  # hadamard
    scales: str | None = None  # dual
    tile: int | None = None  # tokens per tile of dual scales; None: the whole chunk
    scale: float | None = None  # of the scores; None: 1 / sqrt(D)

    def __post_init__(self) -> None:
        """Refuse what the method cannot mean."""
        low_rank, _ = VARIANTS[self.variant]
        if self.backbone == "kivi" and self.scales is None and self.buffer % self.k_group:
            raise ValueError(f"kivi: a buffer of {self.buffer} is not groups of {self.k_group}")
        if self.value_window == "sliding":
            if self.backbone != "kivi" or self.scales is not None or self.window:
                raise ValueError("a sliding value window is for plain kivi, with no other window")
            if low_rank and (self.prefill_rank or self.rank):
                raise ValueError("a sliding value window has no chunk for a low-rank fit")

    def bits(self, role: Role) -> int:
        """Bits of K or of V."""
        return self.k_bits if role == "k" else self.v_bits


@dataclass(frozen=True)
class Chunk:
    """One compressed chunk of K or of V. All but `x` are in rotated coordinates, if rotated."""

    role: Role
    codes: Codes  # [H, n, D]
    words: NDArray[np.uint32] | None  # packed; None at bit widths that are not packed
    meta: dict[str, Array]  # m, step as [H, n, D]; or mu, r, c (m, step) of dual, expanded alike
    base: Array  # [H, n, D], deq(Q)
    a: Array  # [H, n, r']
    c: Array  # [H, D, r']
    outlier: NDArray[np.bool_]  # [H, n, D]
    delta: Array  # [H, n, D], 0 where not an outlier
    x: Array  # [H, n, D], X^ in the coordinates of the input

    @property
    def n(self) -> int:
        """Tokens."""
        return int(self.codes.shape[1])

    @property
    def rank(self) -> int:
        """The effective rank r' = min(r, n, D)."""
        return int(self.a.shape[2])


def outlier_count(fraction: float, n: int) -> int:
    """Outliers per side, floor(s n / 2) in decimal arithmetic: 29 for s = 0.58, n = 100."""
    return int(Decimal(str(fraction)) * n / 2)


def outliers_of_row(row: ArrayLike, k: int) -> list[int]:
    """The k smallest, then the k largest of the others; of equal values the earlier first."""
    values = [float(value) for value in np.asarray(row)]
    order = range(len(values))
    low = sorted(order, key=lambda i: (values[i], i))[:k]
    rest = [i for i in order if i not in set(low)]
    return low + sorted(rest, key=lambda i: (-values[i], i))[:k]


def outlier_rows(shape: tuple[int, int, int], role: Role) -> list[list[tuple[int, int, int]]]:
    """Rows inside which outliers are sought, as lists of positions.

    K: one row per (head, channel) along the tokens; V: one row per token along all H D channels.
    """
    n_heads, n, head_dim = shape
    if role == "k":
        rows = [(h, d) for h in range(n_heads) for d in range(head_dim)]
        return [[(h, t, d) for t in range(n)] for h, d in rows]
    return [[(h, t, d) for h in range(n_heads) for d in range(head_dim)] for t in range(n)]


def split_outliers(x: ArrayLike, role: Role, fraction: float) -> tuple[NDArray[np.bool_], Array]:
    """Which entries are outliers, and x with each of them filled by the mean of its row.

    The mean is over all entries of the row, outliers included.
    Shapes: x [H, n, D]; returns mask, filled [H, n, D].
    """
    x = np.asarray(x, np.float64)
    mask, filled = np.zeros(x.shape, bool), x.copy()
    for row in outlier_rows(x.shape, role):
        values = [x[at] for at in row]
        for i in outliers_of_row(values, outlier_count(fraction, len(row))):
            mask[row[i]] = True
            filled[row[i]] = sum(values) / len(values)
    return mask, filled


def start(settings: Settings, role: Role, chunk: int, shape: tuple[int, int], rank: int) -> Array:
    """C0 = default_rng([seed, layer, role, chunk]).standard_normal((H, D, 16))[..., :r'].

    Role 0 for K, 1 for V; above rank 16 (H, D, r') is drawn. `chunk` counts the chunks of the
    layer from 0.

    Shapes: shape (H, D); returns [H, D, r'].
    """
    rng = np.random.default_rng([settings.seed, settings.layer, "kv".index(role), chunk])
    return rng.standard_normal((*shape, max(16, rank)))[..., :rank]


def power_iteration(e: ArrayLike, c0: ArrayLike, n_iter: int) -> tuple[Array, Array]:
    """Block power iteration: E ~ A C^T with A^T A = I and C = E^T A.

    n_iter times { last round: C := orth(C); A := E C; last round: A := orth(A); C := E^T A }.

    Shapes: e [n, D]; c0 [D, r']; returns a [n, r'], c [D, r'].
    """
    e, c = np.asarray(e, np.float64), np.asarray(c0, np.float64)
    a = np.zeros((e.shape[0], c.shape[1]))
    for i in range(n_iter):
        last = i == n_iter - 1
        if last:
            c = np.linalg.qr(c)[0]
        a = e @ c
        if last:
            a = np.linalg.qr(a)[0]
        c = e.T @ a
    return a, c


def best_error(e: ArrayLike, rank: int) -> float:
    """Least Frobenius error at a rank: sqrt(sum of sigma_i^2 over i > r). Shapes: e [n, D]."""
    sigma = np.linalg.svd(np.asarray(e, np.float64), compute_uv=False)
    return float(np.sqrt(np.sum(sigma[rank:] ** 2)))


def dual_chunk(x: Array, role: Role, s: Settings) -> tuple[Codes, Array, dict[str, Array]]:
    """Two-sided scales head by head and tile by tile. Shapes: x [H, n, D]."""
    codes, base = np.zeros(x.shape, np.int64), np.zeros(x.shape)
    meta = {name: np.zeros(x.shape) for name in ("mu", "r", "c", "m", "step")}
    for h in range(x.shape[0]):
        for t in range(0, x.shape[1], s.tile or x.shape[1]):
            at = (h, slice(t, t + (s.tile or x.shape[1])))
            tile = dual_quantize(x[at], s.bits(role), s.meta)
            codes[at], base[at] = tile.codes, tile.x
            meta["mu"][at], meta["r"][at], meta["c"][at] = tile.mu, tile.r[:, None], tile.c
            if tile.m is not None:
                meta["m"][at], meta["step"][at] = tile.m, tile.step
    return codes, base, meta


def compress(
    x: ArrayLike, role: Role, s: Settings, rank: int | None = None, chunk: int = 0
) -> Chunk:
    """X^ = deq(Q) + A C^T + Delta of one chunk.

    Backbones: outliers of X are filled by the mean of their row before quantization; E = X - deq
    is 0 at outliers. Dual scales: nothing is filled; the outliers are those of the residual, so
    that they hold what clipping cut off. Delta = X - (deq + A C^T) at the outliers, with A and C
    as stored, so that outliers are exact up to the rounding of Delta.

    Shapes: x [H, n, D]; `rank` None: that of decode chunks.
    """
    original = np.asarray(x, np.float64)
    n_heads, n, head_dim = original.shape
    low_rank, sparse = VARIANTS[s.variant]
    turn = hadamard(head_dim) if s.rotate == "hadamard" else np.eye(head_dim)
    x = original @ turn if s.rotate else original
    fraction = s.outliers if sparse else 0.0
    if s.scales == "dual":
        codes, base, meta = dual_chunk(x, role, s)
        mask, _ = split_outliers(x - base, role, fraction)
    else:
        mask, filled = split_outliers(x, role, fraction)
        group = s.k_group if role == "k" else s.v_group
        q = quantize(filled, role, s.backbone, s.bits(role), group, s.meta, s.zero)
        codes, base, meta = q.codes, dequantize(q), {"m": q.m, "step": q.step}

    e = np.where(mask, 0.0, x - base)
    r = min(s.rank if rank is None else rank, n, head_dim) if low_rank else 0
    a, c = np.zeros((n_heads, n, r)), np.zeros((n_heads, head_dim, r))
    c0 = start(s, role, chunk, (n_heads, head_dim), r)
    for h in range(n_heads if r else 0):
        a[h], c[h] = power_iteration(e[h], c0[h], s.n_iter)
    a, c = stored(a, s.cache), stored(c, s.cache)
    smooth = base.copy()
    for h in range(n_heads):
        smooth[h] += a[h] @ c[h].T
    delta = stored(np.where(mask, x - smooth, 0.0), s.cache)
    full = smooth + delta
    bits = s.bits(role)
    return Chunk(
        role=role,
        codes=codes,
        words=pack(codes, role, bits) if bits in (2, 4, 8) else None,
        meta=meta,
        base=base,
        a=a,
        c=c,
        outlier=mask,
        delta=delta,
        x=full @ turn.T if s.rotate else full,
    )
