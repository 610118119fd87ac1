"""Weighted sums of coded values, as Triton functions.

Sums are a tuple of [ROWS, N]: of group g of channels, those of code i of each half word, which are
the channels g GROUP + word * per + i, behind one another by g and then by i.
"""

# Triton compiles no unpacking, nor what follows a constant branch that returns
# ruff: noqa: RET505, RUF005, SIM300
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.attend_coded_codes import channels, code, inside, weight
from kvc.cuda_kernels.attend_coded_keys import channel_scales


@triton.jit
def no_sums(COUNT: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """Sums of nothing."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([ROWS, N], tl.float32),)
    return sums


@triton.jit
def add_groups(
    sums, factor, p, codes, step, low, token, there, row_words,
    N: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    PRODUCT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums * factor + p (step code + low), where step and low [n, GROUPS] are those of tokens.

    p (step code + low) = (p step) code + p low. Steps are divided by the largest of the tile, so
    that p step is a number of PRODUCT whatever the values' size.
    """
    per: tl.constexpr = 16 // BITS
    word = tl.arange(0, N)
    weights = p.to(PRODUCT)
    steps, lows = (), ()
    unit, most = 1e-30, 1e-30
    for g in tl.static_range(GROUPS):
        own = tl.load(step + token * GROUPS + g, mask=there, other=0.0).to(tl.float32)
        least = tl.load(low + token * GROUPS + g, mask=there, other=0.0).to(tl.float32)
        steps, lows = steps + (own,), lows + (least,)
        unit = tl.maximum(unit, tl.max(own, 0))
        most = tl.maximum(most, tl.max(tl.abs(least), 0))
    found = ()
    for g in tl.static_range(GROUPS):
        rest = (lows[g] * (1 / most)).to(PRODUCT)
        rest = tl.broadcast_to(rest[:, None], [token.shape[0], N])
        rest = tl.dot(weights, rest, input_precision=PRECISION) * most
        folded = weights * (steps[g] * (1 / unit)).to(PRODUCT)[None, :]
        at = token[:, None] * row_words + (g * (GROUP // per) + word)[None, :]
        words = tl.load(codes + at, mask=inside(there, word, GROUP // per, N), other=0)
        for i in tl.static_range(per):
            x = code(words, i, BITS, PRODUCT, PACKED)
            own = tl.dot(folded, x, input_precision=PRECISION)
            own = own * (weight(i, BITS, PRODUCT) * unit) + rest
            found = found + (sums[g * per + i] * factor[:, None] + own,)
    return found


@triton.jit
def add_dual(
    sums, factor, p, codes, step, low, mu, c, r, base, token, there, row_words,
    N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    PRODUCT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for two-sided scales: r [n] of tokens is folded into p, c [D] into the sums."""
    per: tl.constexpr = 16 // BITS
    word = tl.arange(0, N)
    factors = tl.load(r + token, mask=there, other=0.0).to(tl.float32)
    unit = tl.maximum(1e-30, tl.max(factors, 0))
    if PRODUCT == tl.float32:
        unit = unit * 0 + 1
    scaled = p * (factors * (1 / unit))[None, :]
    of_lows, of_means = tl.sum(scaled, 1) * unit, tl.sum(p, 1)
    at = token[:, None] * row_words + word[None, :]
    words = tl.load(codes + at, mask=inside(there, word, D // per, N), other=0)
    found = ()
    for i in tl.static_range(per):
        steps, lows, means = channel_scales(
            step, low, mu, c, base, channels(i, N, D, per, D), D, BITS
        )
        x = code(words, i, BITS, PRODUCT, PACKED)
        own = tl.dot(scaled.to(PRODUCT), x, input_precision=PRECISION)
        own = own * (steps * (weight(i, BITS, PRODUCT) * unit))[None, :]
        own += of_lows[:, None] * lows[None, :] + of_means[:, None] * means[None, :]
        found = found + (sums[i] * factor[:, None] + own,)
    return found


@triton.jit
def add_elements(
    sums, factor, p, codes, step, low, token, there, row_words,
    N: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    PRODUCT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `add_groups` where groups are so small that their codes fill no matrix."""
    per: tl.constexpr = 16 // BITS
    word = tl.arange(0, N)
    at = token[:, None] * row_words + word[None, :]
    words = tl.load(codes + at, mask=inside(there, word, D // per, N), other=0)
    at = token[:, None] * (D // GROUP) + (word * per // GROUP)[None, :]
    mask = inside(there, word, D // per, N)
    steps = tl.load(step + at, mask=mask, other=0.0).to(tl.float32)
    lows = tl.load(low + at, mask=mask, other=0.0).to(tl.float32)
    found = ()
    for i in tl.static_range(per):
        x = code(words, i, BITS, PRODUCT, PACKED).to(tl.float32) * weight(i, BITS, PRODUCT)
        x = (x * steps + lows).to(PRODUCT)
        add = tl.dot(p.to(PRODUCT), x, input_precision=PRECISION)
        found = found + (sums[i] * factor[:, None] + add,)
    return found


@triton.jit
def no_fit_sums(COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Sums p A [ROWS] over no tokens, for each of so many columns of A."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([ROWS], tl.float32),)
    return sums


@triton.jit
def add_fit_sums(sums, factor, p, a, there, RANK: tl.constexpr):
    """Sums * factor + p A of a low-rank fit A C^T; `a` [TILE] are pointers to rows of A [n, RANK].

    Ranks are small: a product of matrices would cost more, in registers first of all.
    """
    found = ()
    for r in tl.static_range(RANK):
        column = tl.load(a + r, mask=there, other=0.0).to(tl.float32)
        found = found + (sums[r] * factor + tl.sum(p * column[None, :], 1),)
    return found


@triton.jit
def add_fit(
    sums, of_a, c,
    N: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sums + (p A) C^T of the low-rank fit of a block, of_a = p A as above; c [D, RANK]."""
    found = ()
    for i in tl.static_range(len(sums)):
        channel = channels(i, N, GROUP, PER, D)
        own = sums[i]
        for r in tl.static_range(RANK):
            row = tl.load(c + channel * RANK + r, mask=channel < D, other=0.0).to(tl.float32)
            own += of_a[r][:, None] * row[None, :]
        found = found + (own,)
    return found


@triton.jit
def add_tile(
    sums, factor, p, item, whole, codes, step, low, mu, c, r, first, n, token, there, v_t,
    D: tl.constexpr, FORM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr,
    PRODUCT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums * factor + p X of the tile from token `first` of a block on, p [ROWS, TILE].

    The block's arrays are those of number `item`, or of number `whole` where heads share them.
    """
    if FORM == "dense":
        d = channels(0, N, D, 1, D)
        at = token.to(tl.int64)[:, None] * v_t + d[None, :]
        x = tl.load(codes + at, mask=inside(there, d, D, N), other=0.0)
        own = tl.dot(p.to(PRODUCT), x.to(PRODUCT), input_precision=PRECISION)
        return (sums[0] * factor[:, None] + own,)
    else:
        row_words: tl.constexpr = (D * BITS + 31) // 32 * 2
        codes += item * n * row_words
        if FORM == "dual":
            tiles = n // SPAN if SPAN else 1
            base = (item * tiles + (first // SPAN if SPAN else 0)) * D
            return add_dual(
                sums, factor, p, codes, step, low, mu, c, r + item * n, base, token, there,
                row_words, N, D, BITS, PRODUCT, PACKED, PRECISION,
            )  # fmt: skip
        else:
            at = (whole if ALL else item) * n * (D // SPAN)
            if FORM == "groups":
                return add_groups(
                    sums, factor, p, codes, step + at, low + at, token, there, row_words,
                    N, D // GROUP, GROUP, BITS, PRODUCT, PACKED, PRECISION,
                )  # fmt: skip
            else:
                return add_elements(
                    sums, factor, p, codes, step + at, low + at, token, there, row_words,
                    N, D, SPAN, BITS, PRODUCT, PACKED, PRECISION,
                )  # fmt: skip
