"""Uniform quantization in groups, and codes packed into 32-bit words.

GEAR's backbone (Kang et al. 2024, arXiv:2403.05527) is KIVI's (Liu et al. 2024, arXiv:2402.02750):
keys in groups of tokens for each channel, values in groups of channels for each token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from kvc.backends.base import Array, ops_of
from kvc.ops.dispatch import op

Role = Literal["k", "v"]
Backbone = Literal["kivi", "kcvt", "token"]


class Quantized(NamedTuple):
    """Codes of one block of n tokens, packed; x is about codes * step + low.

    Step and low have one entry for each group of g tokens or channels, on the axes of `grouped`:
    kivi's keys [B, H, n/g, 1, D]; kivi's values and both of token [B, H, n, D/g, 1]; kcvt's keys
    [B, H, 1, 1, D] and values [B, 1, n, 1, 1].
    """

    codes: Array  # keys [B, H, D, words of n], values [B, H, n, words of D]
    step: Array
    low: Array


def n_words(n: int, bits: int) -> int:
    """32-bit words that a row of `n` codes takes."""
    return math.ceil(n * bits / 32)


def pack(codes: Array, bits: int) -> Array:
    """Codes [..., n] into words [..., n_words]; element j of a word has the bits from j * bits."""
    xp = ops_of(codes)
    per = 32 // bits
    words = n_words(codes.shape[-1], bits)
    pad = words * per - codes.shape[-1]
    codes = xp.astype(codes, xp.word)
    if pad:
        codes = xp.concat([codes, xp.zeros((*codes.shape[:-1], pad), xp.word, codes)], -1)
    codes = codes.reshape(*codes.shape[:-1], words, per)
    out = codes[..., 0]
    for j in range(1, per):
        out = out | (codes[..., j] << (j * bits))
    return out


def strands(words: Array, bits: int) -> list[Array]:
    """The codes of words [..., w] as bytes: strand j has the elements j, j + m, ... of its m.

    Shapes: each [..., 4 w], m = 8 / bits.
    """
    octets = ops_of(words).octets(words)  # shifting words would move four times as much
    if bits == 8:
        return [octets]
    top = 2**bits - 1
    between = [(octets >> j) & top for j in range(bits, 8 - bits, bits)]
    return [octets & top, *between, octets >> (8 - bits)]


def unpack(words: Array, bits: int, n: int) -> Array:
    """The first `n` codes of each row of words, as bytes."""
    codes = woven(strands(words, bits))
    return codes[..., :n]


def woven(xs: Sequence[Array]) -> Array:
    """Strands [..., n] as one [..., m n], in the order of `strands`."""
    whole = ops_of(xs[0]).stack(xs, -1) if len(xs) > 1 else xs[0]
    return whole.reshape(*xs[0].shape[:-1], len(xs) * xs[0].shape[-1])


def pack_tokens(codes: Array, bits: int, role: Role) -> Array:
    """Codes [B, H, n, D] in words: keys [B, H, D, words of n], values [B, H, n, words of D]."""
    return pack(codes.swapaxes(-1, -2) if role == "k" else codes, bits)


def unpack_tokens(
    words: Array, bits: int, role: Role, head_dim: int, start: int, stop: int
) -> Array:
    """Codes of the tokens `start` to `stop`, [B, H, stop - start, D], from the words they are in.

    `words` are those of `pack_tokens`.
    """
    if role == "v":
        return unpack(words[:, :, start:stop], bits, head_dim)
    per = 32 // bits
    first = start // per
    codes = unpack(words[..., first : math.ceil(stop / per)], bits, stop - first * per)
    return codes[..., start - first * per :].swapaxes(-1, -2)


def whole(start: int, stop: int, size: int, n: int) -> tuple[int, int]:
    """The tokens of the groups of `size` that `start` to `stop` lie in, among the first `n`."""
    return start // size * size, min(n, math.ceil(stop / size) * size)


def grouped(x: Array, role: Role, backbone: Backbone, group_size: int) -> tuple[Array, int]:
    """`x` [B, H, n, D] with the entries of a group along one axis of its own, and that axis."""
    B, H, n, D = x.shape
    if backbone == "kivi" and role == "k":
        return x.reshape(B, H, n // group_size, group_size, D), -2
    if backbone == "kcvt" and role == "k":
        return x.reshape(B, H, 1, n, D), -2
    if backbone == "kcvt":  # one group per token over all heads
        return x.swapaxes(1, 2).reshape(B, 1, n, 1, H * D), -1
    return x.reshape(B, H, n, D // group_size, group_size), -1


def ungrouped(x: Array, shape: tuple[int, ...], role: Role, backbone: Backbone) -> Array:
    """Back to [B, H, n, D] from the shape of `grouped`."""
    B, H, n, D = shape
    if backbone == "kcvt" and role == "v":
        return x.reshape(B, n, H, D).swapaxes(1, 2)
    return x.reshape(B, H, n, D)


def affine(x: Array, axis: int, bits: int, scale: Any, zero: Any) -> tuple[Array, Array, Array]:
    """Codes, step and low of groups along `axis`: code = clip(round((x - low) / step), 0, top).

    Top is 2^bits - 1. Step is rounded to the dtype `scale` and low to `zero` before the codes are
    taken, so that reading them back loses nothing more. A group whose step rounds to zero is
    constant: step 1, codes 0.
    """
    xp = ops_of(x)
    low, high = xp.min(x, axis, keepdims=True), xp.max(x, axis, keepdims=True)
    top = 2**bits - 1
    step, low = xp.astype((high - low) / top, scale), xp.astype(low, zero)
    wide = xp.astype(step, x.dtype)
    constant = wide == 0
    wide = xp.where(constant, wide * 0 + 1, wide)
    codes = xp.round((x - xp.astype(low, x.dtype)) / wide)
    codes = xp.minimum(xp.maximum(codes, 0), top)
    return xp.where(constant, codes * 0, codes), xp.astype(wide, scale), low


@op
def quantize(
    x: Array, bits: int, role: Role, backbone: Backbone, group_size: int, scale: Any, zero: Any
) -> Quantized:
    """Asymmetric uniform codes in groups; step is stored in `scale` and low in `zero`, dtypes.

    Shapes: x [B, H, n, D], n and D multiples of `group_size` where it groups along them.
    """
    g, axis = grouped(ops_of(x).promote(x), role, backbone, group_size)
    codes, step, low = affine(g, axis, bits, scale, zero)
    return Quantized(pack_tokens(ungrouped(codes, x.shape, role, backbone), bits, role), step, low)


def dequantize(
    code: Quantized,
    bits: int,
    role: Role,
    backbone: Backbone,
    group_size: int,
    n: int,
    head_dim: int,
    start: int,
    stop: int,
) -> Array:
    """Low + step * codes of the tokens `start` to `stop` of n, in the type that sums are taken in.

    Shapes: returns [B, H, stop - start, D].
    """
    xp = ops_of(code.codes)
    step, low = xp.promote(code.step), xp.promote(code.low)
    first, last = start, stop
    if backbone == "kivi" and role == "k":
        first, last = whole(start, stop, group_size, n)
        groups = slice(first // group_size, last // group_size)
        step, low = step[:, :, groups], low[:, :, groups]
    elif backbone != "kcvt" or role == "v":
        step, low = step[:, :, start:stop], low[:, :, start:stop]
    codes = unpack_tokens(code.codes, bits, role, head_dim, first, last)
    g, _ = grouped(xp.astype(codes, step.dtype), role, backbone, group_size)
    x = ungrouped(g * step + low, tuple(codes.shape), role, backbone)
    return x[:, :, start - first : stop - first]
