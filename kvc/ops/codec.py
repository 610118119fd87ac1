"""GEAR's codec: a block of tokens as quantized codes, a low-rank fit and exact outliers.

Kang et al. 2024, arXiv:2403.05527: X is about D + L + S.

Departures: outliers are stored as what must be added to D + L, so that they are exact (the authors'
code adds L on top of the raw value); the low-rank fit is of one head, not of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvc.backends.base import Array, ops_of
from kvc.ops.attention import Partial, attend_dense
from kvc.ops.dispatch import op
from kvc.ops.quant import Backbone, Quantized, Role, dequantize, quantize
from kvc.ops.residual import (
    LowRank,
    Outliers,
    add_rows,
    fill,
    find_outliers,
    power_iteration,
    rows,
    start,
    unrows,
)


class Code(NamedTuple):
    """One block of n tokens of K or of V."""

    d: Quantized
    l: LowRank | None
    s: Outliers | None


@dataclass(frozen=True, slots=True)
class Spec:
    """How a block was coded: what cannot be read off its arrays."""

    role: Role
    bits: int
    backbone: Backbone
    group_size: int
    n: int  # tokens
    head_dim: int


@op
def encode(
    x: Array, spec: Spec, *, rank: int, outliers: float, n_iter: int, seed: tuple[int, int, int]
) -> Code:
    """X [B, H, n, D] as D + L + S; everything is stored in the dtype of `x`.

    `seed` is the seed, the layer and the number of the block: the start of the power iteration.
    """
    xp = ops_of(x)
    wide = xp.promote(x)
    index = find_outliers(wide, spec.role, outliers)
    filled = wide if index is None else fill(wide, index, spec.role)  # S = Filter_s(X)
    d = quantize(filled, spec.bits, spec.role, spec.backbone, spec.group_size, x.dtype)
    base = _dequantized(d, spec, x.shape)  # D = Quant_b(X - S)
    low: LowRank | None = None
    r = min(rank, spec.n, spec.head_dim)
    if r:
        rest = wide - base
        if index is not None:  # outliers are S's: they do not bend the fit
            e = rows(rest, spec.role)
            e = xp.put_along_axis(e, index, xp.take_along_axis(e, index, -1) * 0, -1)
            rest = unrows(e, x.shape, spec.role)
        c0 = start(seed[0], seed[1], spec.role, seed[2], x.shape[1], spec.head_dim, r)
        start_c = xp.astype(xp.from_numpy(c0.astype("float32"), x), wide.dtype)
        a, c = power_iteration(rest, start_c, n_iter)  # L = SVD_r(X - D - S)
        low = LowRank(xp.astype(a, x.dtype), xp.astype(c, x.dtype))
    code = Code(d, low, None)
    if index is None:
        return code
    delta = xp.take_along_axis(rows(wide - decode(code, spec), spec.role), index, -1)
    small = max(spec.n, x.shape[1] * spec.head_dim) <= 2**15
    kept = xp.astype(index, xp.dtype("int16" if small else "int32"))
    return code._replace(s=Outliers(kept, xp.astype(delta, x.dtype)))


def _dequantized(d: Quantized, spec: Spec, shape: tuple[int, ...]) -> Array:
    return dequantize(d, tuple(shape), spec.bits, spec.role, spec.backbone, spec.group_size)


def decode(code: Code, spec: Spec) -> Array:
    """D + L + S, [B, H, n, D] in the type that sums are taken in."""
    B, H = code.d.codes.shape[:2]
    xp = ops_of(code.d.codes)
    x = _dequantized(code.d, spec, (B, H, spec.n, spec.head_dim))
    if code.l is not None:
        x = x + xp.promote(code.l.a) @ xp.promote(code.l.c).swapaxes(-1, -2)
    if code.s is not None:
        index = xp.astype(code.s.index, xp.dtype("int32"))
        x = add_rows(x, Outliers(index, code.s.delta), spec.role)
    return x


@op
def attend_coded(
    q: Array,
    blocks: list[tuple[Code, Spec, Code, Spec]],
    scale: float,
    *,
    softcap: float | None = None,
) -> Partial:
    """Attention over coded blocks, all of them older than every query.

    Shapes: q [B, Hq, L, D]; a block is K's code and V's.
    """
    xp = ops_of(q)
    k = xp.concat([decode(code, spec) for code, spec, _, _ in blocks], 2)
    v = xp.concat([decode(code, spec) for _, _, code, spec in blocks], 2)
    return attend_dense(q, k, v, scale, softcap=softcap)
