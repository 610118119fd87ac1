"""Uniform quantization in groups, and codes packed into 32-bit words.

GEAR's backbone (Kang et al. 2024, arXiv:2403.05527) is KIVI's (Liu et al. 2024, arXiv:2402.02750):
keys in groups of tokens for each channel, values in groups of channels for each token.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from kvc.backends.base import Array, ops_of
from kvc.ops.dispatch import op

Role = Literal["k", "v"]
Backbone = Literal["kivi", "kcvt", "token"]


class Quantized(NamedTuple):
    """Codes of one block of n tokens, packed; x is about codes * step + low."""

    codes: Array  # keys [B, H, D, words of n], values [B, H, n, words of D]
    step: Array  # [B, H, rows, groups] or broadcastable to the groups of `grouped`
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


def unpack(words: Array, bits: int, n: int) -> Array:
    """The first `n` codes of each row of words, in the word's dtype."""
    xp = ops_of(words)
    per = 32 // bits
    codes = xp.stack([(words >> (j * bits)) & (2**bits - 1) for j in range(per)], -1)
    return codes.reshape(*words.shape[:-1], words.shape[-1] * per)[..., :n]


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


@op
def quantize(
    x: Array, bits: int, role: Role, backbone: Backbone, group_size: int, meta: Any
) -> Quantized:
    """Asymmetric uniform codes, code = clip(round((x - low) / step), 0, 2^bits - 1).

    Low and step are rounded to `meta` before the codes are taken, so that reading them back loses
    nothing more. A group whose step rounds to zero is constant: step 1, codes 0.

    Shapes: x [B, H, n, D], n and D multiples of `group_size` where it groups along them.
    """
    xp = ops_of(x)
    g, axis = grouped(xp.promote(x), role, backbone, group_size)
    low, high = xp.min(g, axis, keepdims=True), xp.max(g, axis, keepdims=True)
    top = 2**bits - 1
    step = xp.astype((high - low) / top, meta)
    low = xp.astype(low, meta)
    wide = xp.astype(step, g.dtype)
    wide = xp.where(wide == 0, wide * 0 + 1, wide)
    codes = xp.round((g - xp.astype(low, g.dtype)) / wide)
    codes = xp.minimum(xp.maximum(codes, 0), top)
    codes = xp.where(xp.astype(step, g.dtype) == 0, codes * 0, codes)
    codes = ungrouped(codes, x.shape, role, backbone)
    if role == "k":
        codes = codes.swapaxes(-1, -2)
    return Quantized(pack(codes, bits), xp.astype(wide, meta), low)


def dequantize(
    code: Quantized, shape: tuple[int, ...], bits: int, role: Role, backbone: Backbone, group: int
) -> Array:
    """Low + step * codes, [B, H, n, D] in the type that sums are taken in."""
    xp = ops_of(code.codes)
    step, low = xp.promote(code.step), xp.promote(code.low)
    codes = unpack(code.codes, bits, shape[2] if role == "k" else shape[3])
    if role == "k":
        codes = codes.swapaxes(-1, -2)
    g, _ = grouped(xp.astype(codes, step.dtype), role, backbone, group)
    return ungrouped(g * step + low, shape, role, backbone)
