"""Products of queries with a tile of coded keys, as Triton functions; steps are folded.

A team's tile is TILE tokens of one block, in the order of their codes: those of code 0 of each half
word, then those of code 1, and so on. Queries are [W or 1, ROWS, channels], products not scaled, in
float32.
"""

# Triton compiles no unpacking, nor what follows a constant branch that returns
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.attend_coded_codes import (
    beside,
    code,
    columns,
    inside,
    inverse,
    power,
    stacked,
    summed,
    weight,
)

FIT = tl.constexpr(16)  # columns of a low-rank fit in a product


@triton.jit
def tile_order(TILE: tl.constexpr, BITS: tl.constexpr):
    """The tokens [TILE] of a tile."""
    i = tl.arange(0, TILE)
    words: tl.constexpr = TILE * BITS // 16
    return i % words * (16 // BITS) + i // words


@triton.jit
def channel_factors(q, step, low, base, live, D: tl.constexpr):
    """Queries times the steps of channels, stacked; products with lows [W, ROWS]; their unit [W].

    step and low have D entries from `base` [W] on. q (step code + low) = (q step) code + q low.
    Both are divided by the unit, a power of two, so that they are float16 numbers of a good size.
    """
    W: tl.constexpr = base.shape[0]
    DP: tl.constexpr = q.shape[2]
    d = tl.arange(0, DP)
    at = base[:, None] + d[None, :]
    mask = inside(live, d, D, DP)
    steps = tl.load(step + at, mask=mask, other=0.0).to(tl.float32)
    lows = tl.load(low + at, mask=mask, other=0.0).to(tl.float32)
    most = tl.max(tl.maximum(steps, tl.abs(lows)), 1)
    unit = power(tl.maximum(most, 1e-30)) * 2.0**-10
    wide = q.to(tl.float32)
    each = inverse(unit)[:, None]
    folded = stacked(wide * (steps * each)[:, None, :])
    of_low = tl.dot(stacked(wide * (lows * each)[:, None, :]), tl.full([W, DP, 8], 1.0, tl.float16))
    return folded, tl.max(summed(of_low), 2), unit


@triton.jit
def code_products(
    folded, words, BITS: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Products [W, ROWS, TILE] of what is stacked with the codes of half words [W, C, N]."""
    parts = ()
    for j in tl.static_range(16 // BITS):
        found = summed(tl.dot(folded, code(words, j, BITS, PACKED)))
        parts = parts + (found * weight(j, BITS),)
    return beside(parts)


@triton.jit
def load_codes(
    codes, row, word, live, ROW_WORDS, C: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    TILE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Half words [W, WIDTH, N] of a tile: of C channels, whose rows begin at `row` [W].

    `word` [W] is the tile's first in each row of ROW_WORDS.
    """
    c = tl.arange(0, WIDTH)
    # rows of eight half words are read in two parts: read in one, they are not prefetched
    k = tl.max_contiguous(tl.arange(0, TILE * BITS // 16), 8 if TILE * BITS > 128 else 4)
    at = word[:, None, None] + (c[:, None] * ROW_WORDS + k[None, :])[None]
    mask = inside(live, c, C, WIDTH)[:, :, None]
    if not FULL:
        mask = mask & (word[:, None] + k[None, :] < ROW_WORDS)[:, None, :]
    return tl.load(codes + row[:, None, None] + at, mask=tl.broadcast_to(mask, at.shape), other=0)


@triton.jit
def token_products(
    q, codes, step, low, row, word, base, token, live, there, ROW_WORDS,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
    FULL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Products with keys whose steps are of GROUP channels of a token.

    q is a tuple of the groups' queries, stacked, and their sums [1, ROWS]; step and low
    [tokens, D / GROUP], of which base + token are the tile's.
    """
    groups: tl.constexpr = D // GROUP
    steps = columns(step, base, token, there, groups)
    lows = columns(low, base, token, there, groups)
    parts, plain = q
    found = tl.zeros([token.shape[0], plain[0].shape[1], TILE], tl.float32)
    for g in tl.static_range(groups):
        words = load_codes(
            codes, row + g * GROUP * ROW_WORDS, word, live, ROW_WORDS, GROUP, GROUP, BITS, TILE,
            FULL,
        )  # fmt: skip
        folded = tl.broadcast_to(parts[g], [token.shape[0], parts[g].shape[1], GROUP])
        own = code_products(folded, words, BITS, PACKED)
        found += own * steps[g][:, None, :] + plain[g][:, :, None] * lows[g][:, None, :]
    return found


@triton.jit
def fit_queries(q, c, base, live, D: tl.constexpr, RANK: tl.constexpr):
    """Products q C of a low-rank fit A C^T, divided by their unit [W] and stacked, and the unit.

    c [D, RANK] from `base` [W] on; there are FIT columns, of zeros between, as in `fit_rows`.
    """
    apart: tl.constexpr = FIT // triton.next_power_of_2(RANK)
    DP: tl.constexpr = q.shape[2]
    W: tl.constexpr = base.shape[0]
    d, r = tl.arange(0, DP), tl.arange(0, FIT)
    at = base[:, None, None] + (d[:, None] * RANK + (r // apart)[None, :])[None]
    own = (r % apart == 0) & (r // apart < RANK)
    mask = inside(live, d, D, DP)[:, :, None] & own[None, None, :]
    columns = tl.load(c + at, mask=mask, other=0.0).to(tl.float16)
    wide = tl.broadcast_to(stacked(q.to(tl.float32)), [W, 2 * q.shape[1], DP])
    found = summed(tl.dot(wide, columns))
    unit = power(tl.maximum(tl.max(tl.max(tl.abs(found), 2), 1), 1e-30))
    return stacked(found * inverse(unit)[:, None, None]), unit


@triton.jit
def fit_rows(a, base, token, there, RANK: tl.constexpr, FIT: tl.constexpr):
    """Rows base [W] + token [W, TILE] of a factor a [tokens, RANK], in float16: [W, TILE, FIT].

    Only what is there is read, and zeros lie between: column r is at r FIT / (a power of two).
    """
    WIDTH: tl.constexpr = triton.next_power_of_2(RANK)
    r = tl.arange(0, WIDTH)
    at = (token * RANK)[:, :, None] + r[None, None, :]
    mask = tl.broadcast_to(there[:, :, None], at.shape)
    if WIDTH != RANK:
        mask = mask & (r < RANK)[None, None, :]
    found = tl.load(a + (base * RANK)[:, None, None] + at, mask=mask, other=0.0).to(tl.float16)
    for _ in tl.static_range(4):
        if found.shape[2] < FIT:
            wide = tl.join(found, tl.zeros_like(found))
            found = tl.reshape(wide, [found.shape[0], found.shape[1], found.shape[2] * 2])
    return found
