"""Two-sided scales: a tile of tokens as mean + token factor * channel factor * code.

KVarN (2026, arXiv:2606.03458). Channels that are large all along and tokens that are large in all
channels are divided out, so that one fixed grid fits the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvc.backends.base import Array, ops_of
from kvc.ops.quant import Role, affine, pack_tokens, unpack_tokens, whole

GRID_STEP = {2: 0.9957}  # of the fixed grid for unit variance; with more bits: min-max
ROUNDS = 16
EPS = 1e-8  # floor of a deviation


class Dual(NamedTuple):
    """Codes of one block of n tokens in tiles, packed; x is about level(code) * r * c + mu."""

    codes: Array  # keys [B, H, D, words of n], values [B, H, n, words of D]
    mu: Array  # [B, H, tiles, D]
    c: Array  # [B, H, tiles, D]
    r: Array  # [B, H, n]
    step: Array | None  # [B, H, tiles, D], level = code * step + low; None: the fixed grid
    low: Array | None


def _deviation(x: Array, axis: int) -> Array:
    xp = ops_of(x)
    x = x - xp.mean(x, axis, keepdims=True)
    return xp.maximum(xp.sqrt(xp.mean(x * x, axis, keepdims=True)), EPS)


def dual_scales(x: Array) -> tuple[Array, Array, Array]:
    """Channel means mu, and r, c that give rows and columns of (x - mu) / (r c) deviation 1.

    Each round sets c = std_t(y / r), then r = std_d(y / c), where y = x - mu: that is the paper's
    running sum of logs, in one piece, because std_t(y / (r c)) c = std_t(y / r). The floor is on
    the deviation itself; inside the running sum it would multiply in a constant channel.

    Shapes: x [..., T, D]; returns mu [..., 1, D], r [..., T, 1], c [..., 1, D].
    """
    xp = ops_of(x)
    mu = xp.mean(x, -2, keepdims=True)
    # once more, as what a constant channel's mean is rounded by would be scaled up to one
    mu = mu + xp.mean(x - mu, -2, keepdims=True)
    y = x - mu
    r, c = y[..., :1] * 0 + 1, mu
    for _ in range(ROUNDS):
        c = _deviation(y / r, -2)
        r = _deviation(y / c, -1)
    return mu, r, c


def dual_quantize(x: Array, bits: int, role: Role, tile: int, scale: Any, zero: Any) -> Dual:
    """Codes of z = (x - mu) / (r c), with mu, r and c as they are stored; 0 where r c is 0.

    With 2 bits level = (code - 1.5) * 0.9957, clipped; with more, the channel's own range in the
    tile. Low is stored in the dtype `zero`, every other number in `scale`.

    Shapes: x [B, H, n, D], n a multiple of `tile` or less than it.
    """
    xp = ops_of(x)
    B, H, n, D = x.shape
    x = xp.promote(x).reshape(B, H, -1, min(tile, n), D)
    mu, r, c = (xp.astype(part, scale) for part in dual_scales(x))
    factor = xp.astype(r, x.dtype) * xp.astype(c, x.dtype)
    some = factor > 0  # a factor may be too small for `scale`
    y = x - xp.astype(mu, x.dtype)
    z = xp.where(some, y / xp.where(some, factor, factor * 0 + 1), y * 0)
    step = low = None
    if bits in GRID_STEP:
        top = 2**bits - 1
        codes = xp.minimum(xp.maximum(xp.round(z / GRID_STEP[bits] + top / 2), 0), top)
    else:
        codes, step, low = affine(z, -2, bits, scale, zero)
        step, low = step[..., 0, :], low[..., 0, :]
    words = pack_tokens(codes.reshape(B, H, n, D), bits, role)
    return Dual(words, mu[..., 0, :], c[..., 0, :], r.reshape(B, H, n), step, low)


def dual_dequantize(
    code: Dual, bits: int, role: Role, tile: int, n: int, head_dim: int, start: int, stop: int
) -> Array:
    """Level * r * c + mu of the tokens `start` to `stop` of n, in the type that sums are taken in.

    Shapes: returns [B, H, stop - start, D].
    """
    xp = ops_of(code.codes)
    size = min(tile, n)
    first, last = whole(start, stop, size, n)
    tiles = slice(first // size, last // size)

    def of_tiles(x: Array) -> Array:
        return xp.promote(x)[:, :, tiles, None]

    B, H = code.r.shape[:2]
    r = xp.promote(code.r)[:, :, first:last].reshape(B, H, -1, size, 1)
    codes = xp.astype(unpack_tokens(code.codes, bits, role, head_dim, first, last), r.dtype)
    codes = codes.reshape(B, H, -1, size, head_dim)
    if code.step is None:
        level = (codes - (2**bits - 1) / 2) * GRID_STEP[bits]
    else:
        level = codes * of_tiles(code.step) + of_tiles(code.low)
    x = level * r * of_tiles(code.c) + of_tiles(code.mu)
    return x.reshape(B, H, last - first, head_dim)[:, :, start - first : stop - first]
