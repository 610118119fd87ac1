"""Products with coded tokens of which none is decoded: scales are folded into the other factor.

A block is X = D + L + S (see `kvc.ops.codec`). Here q X^T = q D^T + (q C) A^T + q S^T and p X =
p D + (p A) C^T + p S. What does not fold (two-sided scales, groups that cut a word) is decoded.
"""

from __future__ import annotations

import math

from kvc.backends.base import Array, ops_of
from kvc.ops.codec import Code, Spec, decode
from kvc.ops.quant import Quantized, strands, whole, woven
from kvc.ops.residual import add_rows

FEW = 2  # groups up to which codes stay where they lie; more cost too many products one by one


def scores(q: Array, code: Code, spec: Spec, start: int, stop: int) -> Array:
    """Q X^T over the tokens `start` to `stop` of a block.

    Shapes: q [B, H, R, D] in the coordinates that tokens are stored in; returns
    [B, H, R, stop - start].
    """
    d, xp = code.d, ops_of(q)
    if spec.role == "v" or not isinstance(d, Quantized) or not _folds(spec):
        return q @ decode(code, spec, start, stop).swapaxes(-1, -2)
    found = (_by_token if spec.backbone == "token" else _by_channel)(q, d, spec, start, stop)
    if code.l is not None:
        a, c = xp.promote(code.l.a[:, :, start:stop]), xp.promote(code.l.c)
        found = found + (q @ c) @ a.swapaxes(-1, -2)
    if code.s is not None:
        B, H = q.shape[:2]
        nothing = xp.zeros((B, H, spec.head_dim, stop - start), q.dtype, q)
        s = add_rows(nothing.swapaxes(-1, -2), code.s, "k", start)
        found = found + q @ s.swapaxes(-1, -2)
    return found


def sums(p: Array, code: Code, spec: Spec, start: int, stop: int) -> Array:
    """P X over the tokens `start` to `stop` of a block.

    Shapes: p [B, H, R, stop - start]; returns [B, H, R, D].
    """
    d, xp = code.d, ops_of(p)
    if spec.role == "k" or not isinstance(d, Quantized) or not _folds(spec):
        return p @ decode(code, spec, start, stop)
    size = spec.head_dim if spec.backbone == "kcvt" else spec.group_size
    step, low = (x[:, :, start:stop, :, 0] for x in (d.step, d.low))
    found = _product(p, d.codes[:, :, start:stop], step, low, size, spec.bits)
    if code.l is not None:
        a, c = xp.promote(code.l.a[:, :, start:stop]), xp.promote(code.l.c)
        found = found + (p @ a) @ c.swapaxes(-1, -2)
    if code.s is not None:
        B, H = p.shape[:2]
        nothing = xp.zeros((B, stop - start, H, spec.head_dim), p.dtype, p)
        found = found + p @ add_rows(nothing.swapaxes(1, 2), code.s, "v", start)
    return found


def _folds(spec: Spec) -> bool:
    """Whether tokens begin with a byte, and groups with a word."""
    if spec.head_dim * spec.bits % 8:
        return False
    return spec.backbone == "kcvt" or spec.group_size * spec.bits % 32 == 0


def _words(d: Quantized, spec: Spec, start: int, stop: int, size: int) -> tuple[Array, int, int]:
    """Keys' codes [B, H, D, words] in whole words and groups of `size`, and their tokens."""
    per = 32 // spec.bits
    first, last = whole(start, stop, math.lcm(size, per), spec.n)
    return d.codes[..., first // per : math.ceil(last / per)], first, last


def _by_channel(q: Array, d: Quantized, spec: Spec, start: int, stop: int) -> Array:
    """Q D^T where steps and lows are of a channel of some tokens: kivi, kcvt."""
    if spec.backbone == "kcvt":
        codes, first, last = _words(d, spec, start, stop, 1)
        size, groups = 32 // spec.bits * codes.shape[-1], slice(0, 1)
    else:
        size = spec.group_size
        codes, first, last = _words(d, spec, start, stop, size)
        groups = slice(first // size, last // size)
    step, low = (x[:, :, groups, 0].swapaxes(-1, -2) for x in (d.step, d.low))  # [B, H, D, groups]
    found = _product(q, codes, step, low, size, spec.bits)
    return found[..., start - first : stop - first]


def _by_token(q: Array, d: Quantized, spec: Spec, start: int, stop: int) -> Array:
    """Q D^T where steps and lows are of some channels of a token."""
    xp, size = ops_of(q), spec.group_size
    codes, first, last = _words(d, spec, start, stop, 1)
    step, low = (xp.promote(x[:, :, None, first:last, :, 0]) for x in (d.step, d.low))
    parts = [xp.astype(x, q.dtype) for x in strands(codes, spec.bits)]
    found: Array = 0
    for g in range(spec.head_dim // size):
        own = slice(g * size, (g + 1) * size)
        products = woven([q[..., own] @ x[:, :, own] for x in parts])[..., : last - first]
        lows = xp.sum(q[..., own], -1, keepdims=True) * low[..., g]
        found = found + products * step[..., g] + lows
    return found[..., start - first : stop - first]


def _product(x: Array, words: Array, step: Array, low: Array, size: int, bits: int) -> Array:
    """X (step code + low), where `size` codes behind one another share step and low.

    Shapes: x [B, H, R, m]; words [B, H, m, words of n]; step, low [B, H or 1, m, groups]; returns
    [B, H, R, size groups].
    """
    xp = ops_of(x)
    step, low = xp.promote(step), xp.promote(low)
    (B, H, m), G = words.shape[:3], step.shape[-1]
    if G > 1 and (found := xp.quantized_matmul(x, words, step, low, size, bits)) is not None:
        return found
    width = size * bits // 8  # of a group in each strand
    if G > FEW:  # groups are put behind one another, each a product of its own
        n = size * bits // 32
        words = words[..., : G * n].reshape(B, H, m, G, n).swapaxes(2, 3)
        parts = strands(words, bits)
        folded = x[:, :, None] * step.swapaxes(-1, -2)[:, :, :, None]  # [B, H, G, R, m]
        found = woven([folded @ xp.astype(c, x.dtype) for c in parts])
        found = found + (x @ low).swapaxes(-1, -2)[..., None]
        return found.swapaxes(2, 3).reshape(*x.shape[:3], G * size)
    parts = [xp.astype(c[..., : G * width], x.dtype) for c in strands(words, bits)]
    products = []
    for g in range(G):
        folded = x * step[:, :, None, :, g]
        own = slice(g * width, (g + 1) * width)
        products.append(woven([folded @ c[..., own] for c in parts]))
    found = products[0] if G == 1 else xp.concat(products, -1)
    lows = xp.broadcast_to((x @ low)[..., None], (*x.shape[:3], G, size))
    return found + lows.reshape(found.shape)
