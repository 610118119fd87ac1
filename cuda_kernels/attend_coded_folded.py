"""Attention over coded tokens whose steps are folded into the other factor of each product.

A program is some teams, one for each warp. A team takes a tile of TILE tokens at a time and has a
running softmax of its own; they are joined when all tiles are done. So a program reads many tiles
at a time, and leaves one answer: what a split costs in bytes is not paid for each warp. All arrays
have the axis of the W teams in front, and no number goes from team to team before the end.

Names of sizes: a block has n tokens; D channels, DP the next power of two; a half word has `per`
codes; ROWS queries of the query heads that share a head of K and V.
"""

# Triton compiles no unpacking, nor what follows a constant branch that returns
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.attend_coded_codes import (
    ROWS,
    flat,
    stacked,
    summed,
    times_signs,
    turned,
    twice,
)
from kvc.cuda_kernels.attend_coded_keys import (
    FIT,
    channel_factors,
    code_products,
    fit_queries,
    fit_rows,
    load_codes,
    tile_order,
    token_products,
)
from kvc.cuda_kernels.attend_coded_values import add_fit, add_tile, channels, joined
from kvc.cuda_kernels.softmax import LN2, scores_of

SMALL = tl.constexpr(2.0**-100)  # the unit of sums of nothing


GROWING = ["n", "blocks", "B", "valid_b", "valid_h"]


@triton.jit(do_not_specialize=GROWING)
def attend_folded_kernel(
    q, valid, length, out, lse,
    k_codes, k_step, k_low, k_a, k_c, v_codes, v_step, v_low, v_a, v_c,
    q_b, q_h, q_l, valid_b, valid_h, n, blocks, B, scale, softcap,
    H: tl.constexpr, SHARE: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, TILE: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr,
    ALIGNED: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_SPAN: tl.constexpr, K_RANK: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_ALL: tl.constexpr, V_RANK: tl.constexpr,
    V_N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program has some tiles of a head of K and V, and up to ROWS of its SHARE rows.

    q [B, Hq, L, D] with strides, D contiguous; valid [B, H, tokens] with strides, tokens
    contiguous; length int32 [1], how many tokens of the blocks there are; out [splits, B, Hq, L, D]
    and lse [splits, B, Hq, L]. Codes are half words of [blocks, B, H, D, words of n] for K and
    [blocks, B, H, n, words of D] for V; all that goes with a block lies as `kvc.ops.codec.Code`
    says. Steps of K are of K_GROUP channels of a token, or else of K_SPAN tokens of a channel, 0
    for a block; those of V are of V_GROUP channels of a token, V_ALL if heads share them.

    FLAT takes tiles of several blocks at a time, where nothing goes with a block as a whole. FULL
    blocks end with a tile; rows of words of ALIGNED ones end at 16 bytes.
    """
    tiles: tl.constexpr = (SHARE + ROWS - 1) // ROWS
    head, top_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row, d, team = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, W)
    t = tile_order(TILE, K_BITS)
    mine = top_row + row < SHARE
    k_row_words = (n * K_BITS + 31) // 32 * 2
    if ALIGNED:
        k_row_words = tl.multiple_of(k_row_words, 8)

    # q as a power of two times numbers up to 2, whatever its size: none is lost in float16
    q += b * q_b + h * (SHARE // L) * q_h
    rows = (top_row + row) // L * q_h + (top_row + row) % L * q_l
    raw = tl.load(
        q + rows[:, None] + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)
    unit = tl.exp2(tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(raw), 1), 1e-30))))
    row_scale = scores_of(unit, scale, softcap, False)
    if BLOCK:
        queries = turned(q, rows, mine, unit, d, D, BLOCK)[None]
    else:
        queries = (raw / unit[:, None]).to(tl.float16)[None]
    if K_GROUP:
        parts = _query_parts(q, rows, mine, unit, D, K_GROUP, BLOCK)

    top = tl.full([W, ROWS], float("-inf"), tl.float32)
    total = tl.zeros([W, ROWS], tl.float32)
    size = tl.full([W], SMALL, tl.float32)
    sums, rests = (), ()
    for _ in tl.static_range((D // V_GROUP + 1) // 2 * (16 // V_BITS)):
        sums = sums + (tl.zeros([W, 2 * ROWS, V_N], tl.float32),)
    for _ in tl.static_range(D // V_GROUP):
        rests = rests + (tl.zeros([W, ROWS], tl.float32),)
    if valid is not None:
        valid += b * valid_b + h * valid_h

    per_block = (n + TILE - 1) // TILE
    if length is not None:
        blocks = tl.minimum(tl.load(length) // n, blocks)
    count = blocks * per_block
    share = tl.num_programs(1) * W
    span = (count + share - 1) // share * W
    oldest = tl.minimum(tl.program_id(1) * span, count)
    newest = tl.minimum(oldest + span, count)
    if FLAT:
        outer_low, outer_high = 0, 1
    else:
        outer_low, outer_high = oldest // per_block, (newest + per_block - 1) // per_block
    for outer in tl.range(outer_low, outer_high, num_stages=1):
        if FLAT:
            begin, stop = oldest, newest
        else:
            begin = tl.maximum(oldest - outer * per_block, 0)
            stop = tl.minimum(newest - outer * per_block, per_block)
            every = tl.full([W], 1, tl.int1)
            block = tl.full([W], outer, tl.int64)
            item = tl.full([W], (outer * B + b) * H + h, tl.int64)
            if not K_GROUP and not K_SPAN:
                folded, of_low, k_unit = channel_factors(queries, k_step, k_low, item * D, every, D)
            if K_RANK:
                of_c, c_unit = fit_queries(queries, k_c, item * (D * K_RANK), every, D, K_RANK)
            if V_RANK:
                of_a = tl.zeros([W, 2 * ROWS, FIT if V_RANK > 8 else 8], tl.float32)
        for start in tl.range(begin, stop, W, num_stages=STAGES):
            live = start + team < stop
            if FLAT:
                block = (start + team) // per_block
                first = (start + team) % per_block * TILE
                block = block.to(tl.int64)
                item = (block * B + b) * H + h
            else:
                first = (start + team) * TILE
            token = first[:, None] + t[None, :]
            there = tl.broadcast_to(live[:, None], [W, TILE])
            if not FULL:
                there = there & (token < n)
            base = item * n
            v_base = (block * B + b) * n if V_ALL else base
            line, word = item * D * k_row_words, first * K_BITS // 16

            if K_GROUP:
                products = token_products(
                    parts, k_codes, k_step, k_low, line, word, base, token, live, there,
                    k_row_words, D, K_GROUP, K_BITS, TILE, FULL, PACKED,
                )  # fmt: skip
            else:
                words = load_codes(
                    k_codes, line, word, live, k_row_words, D, DP, K_BITS, TILE, FULL
                )
                if K_SPAN:
                    folded, of_low, k_unit = channel_factors(
                        queries,
                        k_step,
                        k_low,
                        (item * (n // K_SPAN) + first // K_SPAN) * D,
                        live,
                        D,
                    )
                products = code_products(folded, words, K_BITS, PACKED) + of_low[:, :, None]
                products = products * k_unit[:, None, None]
            if K_RANK:
                a = fit_rows(k_a, base, token, there, K_RANK, FIT)
                products += summed(tl.dot(of_c, tl.trans(a, (0, 2, 1)))) * c_unit[:, None, None]

            seen = there
            if valid is not None:
                place = valid + (block * n)[:, None] + token
                seen = seen & tl.load(place, mask=there, other=0).to(tl.int1)
            if SOFTCAP:
                scores = scores_of(products * unit[None, :, None], scale, softcap, SOFTCAP)
            else:
                scores = products * row_scale[None, :, None]
            scores = tl.where(seen[:, None, :], scores, float("-inf"))
            top, total, factor, p = _take(top, total, scores)

            if V_RANK:  # first, so that p is done with
                a = fit_rows(v_a, base, token, there, V_RANK, FIT if V_RANK > 8 else 8)
                of_a = tl.dot(stacked(p), a, of_a * twice(factor)[:, :, None])
            sums, rests, size = add_tile(
                sums, rests, size, factor, p, v_codes, v_step, v_low, base, v_base, token,
                there,
                D, V_GROUP, V_BITS, V_N, PACKED,
            )  # fmt: skip
        if V_RANK:
            sums = add_fit(
                sums, size, of_a, v_c, item * (D * V_RANK), every, D, V_GROUP, V_BITS, V_N, V_RANK
            )

    if DP > 64:  # found anew, as registers are short: the compiler does not know that 0 is added
        row = tl.arange(0, ROWS) + tl.minimum(count, 0)
        mine = top_row + row < SHARE
    at = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles * SHARE)
    at += head * SHARE + top_row + row
    best = tl.max(top, 0)
    finite = tl.where(best == float("-inf"), 0.0, best)
    share = tl.exp2(top - finite[None, :])
    whole = tl.sum(total * share, 0)
    some = whole > 0
    safe = tl.where(some, whole, 1.0)
    own_lse = tl.where(some, (best + tl.log2(safe)) * LN2, float("-inf"))
    tl.store(lse + at, own_lse, mask=mine)
    share = share / safe[None, :]
    weighted = tl.zeros([2 * ROWS, DP], tl.float32)  # in the model's coordinates
    for s in tl.static_range((D // V_GROUP + 1) // 2):
        for i in tl.static_range(16 // V_BITS):
            answer = joined(sums, rests, size, share, s, i, D, V_GROUP, V_BITS, V_N)
            own, _ = channels(s, i, V_N, D, V_GROUP, V_BITS)
            if BLOCK:
                weighted += times_signs(answer, own, d, D, BLOCK)
            else:
                place = out + at[:, None] * D + own[None, :]
                tl.store(place, answer, mask=mine[:, None] & (own < D)[None, :])
    if BLOCK:
        answer = flat(weighted)
        tl.store(out + at[:, None] * D + d[None, :], answer, mask=mine[:, None] & (d < D)[None, :])


@triton.jit
def _take(top, total, scores):
    """As `softmax.take`, for each team."""
    new = tl.maximum(top, tl.max(scores, 2))
    finite = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - finite[:, :, None])
    factor = tl.exp2(top - finite)
    return new, total * factor + tl.sum(p, 2), factor, p


@triton.jit
def _query_parts(q, rows, mine, unit, D: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Queries [1, 2 ROWS, GROUP] of each group of channels, stacked, and their sums [1, ROWS]."""
    c = tl.arange(0, GROUP)
    parts, plain = (), ()
    for g in tl.static_range(D // GROUP):
        if BLOCK:
            own = turned(q, rows, mine, unit, g * GROUP + c, D, BLOCK)
        else:
            at = rows[:, None] + (g * GROUP + c)[None, :]
            own = tl.load(q + at, mask=mine[:, None], other=0.0).to(tl.float32) / unit[:, None]
        parts = parts + (stacked(own[None]),)
        plain = plain + (tl.sum(own, 1)[None],)
    return parts, plain
