"""Products of queries with coded keys, as Triton functions, one for each way that keys lie.

A tile is TILE tokens of one block. Products are of q [ROWS, channels], not scaled, in float32. No
key is decoded where its steps can be folded: into q where a step is that of a channel, into the
products where it is that of a token.
"""

# Triton compiles no unpacking, nor what follows a constant branch that returns
# ruff: noqa: RET505, RUF005
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.attend_coded_codes import (
    channels,
    code,
    fit,
    inside,
    signs,
    weight,
    woven,
)
from kvc.ops.scales import GRID_STEP

GRID = tl.constexpr(GRID_STEP[2])  # of two-sided scales without steps, which have two bits


@triton.jit
def key_parts(
    q, rows, mine, raw, unit,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr,
    GROUP: tl.constexpr, PER: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries [ROWS, N] of each part of the channels, divided by `unit` [ROWS].

    Those of q at offsets `rows` [ROWS], which are also `raw` [ROWS, DP]. With BLOCK they are turned
    by the Hadamard matrix with blocks of that size.
    """
    if PARTS == 1 and not BLOCK:
        return (raw,)
    else:
        parts = ()
        for i in tl.static_range(PARTS):
            channel = channels(i, N, GROUP, PER, D)
            if BLOCK:
                own = _turned(q, rows, mine, unit, channel, D, BLOCK, PRODUCT, PRECISION)
            else:
                mask = mine[:, None] & (channel < D)[None, :]
                own = tl.load(q + rows[:, None] + channel[None, :], mask=mask, other=0.0)
                own = own.to(tl.float32) / unit[:, None]
            parts = parts + (own.to(PRODUCT),)
        return parts


@triton.jit
def _turned(
    q, rows, mine, unit, channel,
    D: tl.constexpr, BLOCK: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some channels of q Hd, in sums over 16 of its own at a time."""
    part = tl.arange(0, 16)
    found = tl.zeros([rows.shape[0], channel.shape[0]], tl.float32)
    for start in tl.range(0, D, 16):
        at = rows[:, None] + (start + part)[None, :]
        some = tl.load(q + at, mask=mine[:, None], other=0.0).to(tl.float32)
        some = (some / unit[:, None]).to(PRODUCT)
        turn = signs(start + part, channel, BLOCK).to(PRODUCT)
        found = tl.dot(some, turn, found, input_precision=PRECISION)
    return tl.where((channel < D)[None, :], found * BLOCK**-0.5, 0.0)


@triton.jit
def fit_products(
    parts, c,
    D: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, FIT: tl.constexpr,
    N: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products q C [ROWS, FIT] of the low-rank fit of a block, c [D, RANK]."""
    found = tl.zeros([parts[0].shape[0], FIT], tl.float32)
    for i in tl.static_range(len(parts)):
        channel = channels(i, N, GROUP, PER, D)
        own = fit(c, channel, channel < D, RANK, WIDTH, FIT, PRODUCT)
        found = tl.dot(parts[i], own, found, input_precision=PRECISION)
    return found


@triton.jit
def channel_scales(step, low, mu, c, base, channel, D: tl.constexpr, BITS: tl.constexpr):
    """What codes of channels [N] are multiplied by, what is added to that, and means; each [N].

    Two-sided scales without steps are of a fixed grid.
    """
    own = channel < D
    if c is None:
        steps = tl.load(step + base + channel, mask=own, other=0.0).to(tl.float32)
        lows = tl.load(low + base + channel, mask=own, other=0.0).to(tl.float32)
        means = lows * 0
    else:
        factors = tl.load(c + base + channel, mask=own, other=0.0).to(tl.float32)
        means = tl.load(mu + base + channel, mask=own, other=0.0).to(tl.float32)
        if step is None:
            steps = factors * GRID
            lows = steps * (0.5 - 2 ** (BITS - 1))
        else:
            steps = tl.load(step + base + channel, mask=own, other=0.0).to(tl.float32) * factors
            lows = tl.load(low + base + channel, mask=own, other=0.0).to(tl.float32) * factors
    return steps, lows, means


@triton.jit
def key_products(
    parts, item, whole, codes, step, low, r, scales, first, n, token, there, k_t,
    D: tl.constexpr, FORM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr, TILE: tl.constexpr,
    FULL: tl.constexpr, ALIGNED: tl.constexpr, PRODUCT: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, TILE] with the tile from token `first` of a block on.

    The block's arrays are those of number `item`, or of number `whole` where heads share them.
    """
    if FORM == "dense":
        d = channels(0, N, D, 1, D)
        at = token.to(tl.int64)[:, None] * k_t + d[None, :]
        x = tl.load(codes + at, mask=inside(there, d, D, N), other=0.0)
        return tl.dot(parts[0], tl.trans(x.to(PRODUCT)), input_precision=PRECISION)
    elif FORM == "rows":
        row_words: tl.constexpr = (D * BITS + 31) // 32 * 2
        at = (whole if ALL else item) * n * (D // SPAN)
        return with_rows(
            parts, codes + item * n * row_words, step + at, low + at, token, there, row_words,
            D, SPAN, BITS, PRODUCT, PACKED, PRECISION,
        )  # fmt: skip
    else:
        row_words = (n * BITS + 31) // 32 * 2
        if ALIGNED:
            row_words = tl.multiple_of(row_words, 8)
        codes += item * D * row_words + first * BITS // 16
        word = tl.arange(0, TILE * BITS // 16)
        within = tl.full([TILE * BITS // 16], 1, tl.int1)
        if not FULL:
            within = first * BITS // 16 + word < row_words
        found = tl.zeros([parts[0].shape[0], TILE], tl.float32)
        for g in tl.static_range(len(parts)):
            channel = channels(g, N, GROUP, 1, D)
            at = channel[:, None] * row_words + word[None, :]
            mask = tl.trans(inside(within, tl.arange(0, N), GROUP, N))
            words = tl.load(codes + at, mask=mask, other=0)
            if FORM == "groups":
                at = (item * n + token) * len(parts) + g
                of_tokens = tl.load(step + at, mask=there, other=0.0).to(tl.float32)
                low_tokens = tl.load(low + at, mask=there, other=0.0).to(tl.float32)
                plain = tl.sum(parts[g].to(tl.float32), 1)
                own = with_codes(parts[g], words, plain * 0, BITS, PRODUCT, PACKED, PRECISION)
                found += own * of_tokens[None, :] + plain[:, None] * low_tokens[None, :]
            elif FORM == "elements":
                at = item * (n // SPAN) * D
                found = with_elements(
                    parts[g], words, step + at, low + at, channel, first, n, D, SPAN, TILE, BITS,
                    PRODUCT, PACKED, PRECISION,
                )  # fmt: skip
            else:
                steps, lows, means = scales
                found = with_channels(
                    parts[g], words, steps, lows, BITS, PRODUCT, PACKED, PRECISION
                )
                if r is not None:
                    of_tokens = tl.load(r + item * n + token, mask=there, other=0.0)
                    found = found * of_tokens.to(tl.float32)[None, :]
                    found += with_vector(parts[g], means, PRODUCT, PRECISION)[:, None]
        return found


@triton.jit
def with_codes(
    q, words, more,
    BITS: tl.constexpr, PRODUCT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, TILE] of q [ROWS, C] with the codes of half words [C, N], and more [ROWS]."""
    parts = ()
    for j in tl.static_range(16 // BITS):
        found = tl.dot(q, code(words, j, BITS, PRODUCT, PACKED), input_precision=PRECISION)
        parts = parts + (found * weight(j, BITS, PRODUCT) + more[:, None],)
    return woven(parts)


@triton.jit
def with_channels(
    q, words, step, low,
    BITS: tl.constexpr, PRODUCT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of q with step code + low, where step and low [C] are those of the channels.

    q (step code + low) = (q step) code + q low.
    """
    folded = q * step.to(PRODUCT)[None, :]
    lows = with_vector(q, low, PRODUCT, PRECISION)
    return with_codes(folded, words, lows, BITS, PRODUCT, PACKED, PRECISION)


@triton.jit
def with_vector(q, x, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """Products [ROWS] of q [ROWS, C] with one vector [C], as a matrix of equal columns."""
    columns = tl.broadcast_to(x.to(PRODUCT)[:, None], [x.shape[0], 8])
    return tl.max(tl.dot(q, columns, input_precision=PRECISION), 1)


@triton.jit
def with_elements(
    q, words, step, low, channel, first, n,
    D: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    PRODUCT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same, where GROUP tokens that share a step [groups, D] do not make up whole tiles."""
    per: tl.constexpr = 16 // BITS
    word = tl.arange(0, TILE // per)
    parts = ()
    for j in tl.static_range(per):
        token = first + word * per + j
        at = (token // GROUP)[None, :] * D + channel[:, None]
        mask = (token < n)[None, :] & (channel < D)[:, None]
        steps = tl.load(step + at, mask=mask, other=0.0).to(tl.float32)
        lows = tl.load(low + at, mask=mask, other=0.0).to(tl.float32)
        x = code(words, j, BITS, PRODUCT, PACKED).to(tl.float32) * weight(j, BITS, PRODUCT)
        x = (x * steps + lows).to(PRODUCT)
        parts = parts + (tl.dot(q, x, input_precision=PRECISION),)
    return woven(parts)


@triton.jit
def with_rows(
    q, codes, step, low, token, there, row_words,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    PRODUCT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products with keys that lie as values do, a row of half words for a token.

    Part i of q has the channels i, i + per, ... of the per codes of a half word; step and low are
    [n, D / GROUP].
    """
    per: tl.constexpr = 16 // BITS
    N: tl.constexpr = q[0].shape[1]
    word = tl.arange(0, N)
    mask = inside(there, word, D // per, N)
    words = tl.load(codes + token[:, None] * row_words + word[None, :], mask=mask, other=0)
    at = token[:, None] * (D // GROUP) + (word * per // GROUP)[None, :]
    steps = tl.load(step + at, mask=mask, other=0.0).to(tl.float32)
    lows = tl.load(low + at, mask=mask, other=0.0).to(tl.float32)
    found = tl.zeros([q[0].shape[0], token.shape[0]], tl.float32)
    for i in tl.static_range(per):
        x = code(words, i, BITS, PRODUCT, PACKED).to(tl.float32) * weight(i, BITS, PRODUCT)
        x = (x * steps + lows).to(PRODUCT)
        found = tl.dot(q[i], tl.trans(x), found, input_precision=PRECISION)
    return found
