"""GEAR's codec: a block of tokens as quantized codes, a low-rank fit and exact outliers.

Kang et al. 2024, arXiv:2403.05527: X is about D + L + S.

Departures: outliers are stored as what must be added to D + L, so that they are exact (the authors'
code adds L on top of the raw value); the low-rank fit is of one head, not of a layer. Rotation and
two-sided scales are newer than the paper. With the latter, outliers are those of the residual, so
that they hold what clipping cut off.

The first axis of every array is a batch like any other: equal blocks may be decoded as more rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvc.backends.base import Array, Shard, ops_of
from kvc.ops.dispatch import op
from kvc.ops.quant import Backbone, Quantized, Role, dequantize, quantize
from kvc.ops.residual import (
    LowRank,
    Outliers,
    Seed,
    add_rows,
    clear,
    fill,
    find_outliers,
    of_channels,
    outlier_count,
    power_iteration,
    start,
    take_rows,
)
from kvc.ops.rotate import hadamard
from kvc.ops.scales import Dual, dual_dequantize, dual_quantize


class Code(NamedTuple):
    """One block of n tokens of K or of V."""

    d: Quantized | Dual
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
    rotate: str = ""  # or hadamard
    scales: str = ""  # or dual, in place of the backbone's groups
    tile: int = 128  # tokens that share dual scales; divides n, unless n is less
    scale_dtype: str = ""  # of step, and of mu, c and r; empty: of the tokens
    zero_dtype: str = ""  # of low; empty: of the tokens


@op
def encode(x: Array, spec: Spec, *, rank: int, outliers: float, n_iter: int, seed: Seed) -> Code:
    """X [B, H, n, D] as D + L + S; L and S are stored in the dtype of `x`.

    `seed` is of the start of the power iteration.
    """
    xp = ops_of(x)
    wide = turn(xp.promote(x), spec)
    scale = xp.dtype(spec.scale_dtype) if spec.scale_dtype else x.dtype
    zero = xp.dtype(spec.zero_dtype) if spec.zero_dtype else x.dtype
    r, index = min(rank, spec.n, spec.head_dim), None
    if spec.scales == "dual":
        code = Code(dual_quantize(wide, spec.bits, spec.role, spec.tile, scale, zero), None, None)
        if outliers:
            index = find_outliers(wide - decode(code, spec), spec.role, outliers)
    else:
        index = find_outliers(wide, spec.role, outliers)
        filled = wide if index is None else fill(wide, index, spec.role)  # S = Filter_s(X)
        d = quantize(  # D = Quant_b(X - S)
            filled, spec.bits, spec.role, spec.backbone, spec.group_size, scale, zero
        )
        code = Code(d, None, None)
    if r:
        rest = wide - decode(code, spec)
        if index is not None:  # outliers are S's: they do not bend the fit
            rest = clear(rest, index, spec.role)
        c0 = start(seed, spec.role, x.shape[1], spec.head_dim, r)
        start_c = xp.astype(xp.from_numpy(c0.astype("float32"), x), wide.dtype)
        a, c = power_iteration(rest, start_c, n_iter)  # L = SVD_r(X - D - S)
        code = code._replace(l=LowRank(xp.astype(a, x.dtype), xp.astype(c, x.dtype)))
    if index is None:
        return code
    return code._replace(s=take_rows(wide - decode(code, spec), index, spec.role, x.dtype))


def decode(code: Code, spec: Spec, start: int = 0, stop: int | None = None) -> Array:
    """D + L + S of the tokens `start` to `stop`, and of few others.

    They are as stored: `turn` takes them, or what is linear in them, out of a rotation.

    Shapes: returns [B, H, stop - start, D] in the type that sums are taken in.
    """
    xp = ops_of(code.d.codes)
    stop = spec.n if stop is None else stop
    if isinstance(code.d, Dual):
        x = dual_dequantize(
            code.d, spec.bits, spec.role, spec.tile, spec.n, spec.head_dim, start, stop
        )
    else:
        x = dequantize(
            code.d, spec.bits, spec.role, spec.backbone, spec.group_size, spec.n, spec.head_dim,
            start, stop,
        )  # fmt: skip
    if code.l is not None:
        x = x + xp.promote(code.l.a[:, :, start:stop]) @ xp.promote(code.l.c).swapaxes(-1, -2)
    return x if code.s is None else add_rows(x, code.s, spec.role, start)


def turn(x: Array, spec: Spec) -> Array:
    """`x` [..., D] into the coordinates that `spec` stores, or out of them, which is the same.

    Without a rotation that is `x` itself.
    """
    return hadamard(x) if spec.rotate else x


def spans_heads(spec: Spec, outliers: float, heads: int) -> bool:
    """Whether a head's code depends on the others of all `heads`, as some of values do.

    A row that outliers are chosen in has all heads of a token, and so has a group of kcvt.
    """
    groups = spec.backbone == "kcvt" and not spec.scales
    return spec.role == "v" and (groups or outlier_count(outliers, heads * spec.head_dim) > 0)


def own_heads(code: Code, shard: Shard, channels: int) -> Code:
    """A process's own heads, of `channels` together, of values coded with all heads.

    Groups of kcvt and outliers are not divided: each process has those of all heads.
    """

    def own(x: Array) -> Array:
        return x if x.shape[1] == 1 else shard.own(x)

    found = map_code(own, code._replace(s=None))
    return found._replace(s=code.s and of_channels(code.s, shard.index * channels, channels))


def arrays(code: Code) -> Iterator[tuple[str, Array]]:
    """Every array of a code, with the name of the part that its bytes count for."""
    yield "codes", code.d.codes
    yield from (("scales", x) for x in code.d[1:] if x is not None)
    yield from (("low rank", x) for x in code.l or ())
    yield from (("outliers", x) for x in code.s or ())


def map_code(f: Callable[..., Array], *codes: Code) -> Code:
    """The code whose arrays are `f` of the arrays that stand at one place in all `codes`.

    The codes are of one spec, rank and fraction of outliers, so that they have the same arrays.
    """

    def mapped(parts: tuple[Any, ...]) -> Any:
        if parts[0] is None:
            return None
        each = (None if xs[0] is None else f(*xs) for xs in zip(*parts, strict=True))
        return type(parts[0])(*each)

    return Code(*map(mapped, zip(*codes, strict=True)))
