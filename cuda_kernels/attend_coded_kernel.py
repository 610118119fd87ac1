"""Attention over coded tokens: the kernel.

Names of sizes: a block has n tokens, a tile TILE of them; D channels, DP the next power of two; a
half word has `per` codes; ROWS rows are queries of the query heads that share a head of K and V.
"""

# Triton compiles no unpacking, nor what follows a constant branch that returns
# ruff: noqa: RUF005, SIM300
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.attend_coded_codes import channels, fit, signs
from kvc.cuda_kernels.attend_coded_exact import before, key_originals, outliers, value_originals
from kvc.cuda_kernels.attend_coded_keys import (
    channel_scales,
    fit_products,
    key_parts,
    key_products,
)
from kvc.cuda_kernels.attend_coded_values import (
    add_fit,
    add_fit_sums,
    add_tile,
    no_fit_sums,
    no_sums,
)
from kvc.cuda_kernels.softmax import finish, scores_of, take


@triton.jit(
    do_not_specialize=[
        "n", "blocks", "span", "start", "B", "k_many", "v_many", "k_kept", "v_kept",
        "valid_b", "valid_h", "k_norm_b", "k_norm_h", "v_norm_b", "v_norm_h",
    ]
)  # fmt: skip
def attend_coded_kernel(
    q, valid, out, lse,
    k_codes, k_step, k_low, k_mu, k_c, k_r, k_fit_a, k_fit_c, k_index, k_delta,
    k_norm, k_places, k_exact,
    v_codes, v_step, v_low, v_mu, v_c, v_r, v_fit_a, v_fit_c, v_index, v_delta,
    v_norm, v_places, v_exact,
    q_b, q_h, q_l, k_b, k_h, k_t, v_b, v_h, v_t,
    valid_b, valid_h, k_norm_b, k_norm_h, v_norm_b, v_norm_h,
    n, blocks, span, start, B, k_many, v_many, k_kept, v_kept, scale, softcap, k_gain, v_gain,
    H: tl.constexpr, SHARE: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SHORT: tl.constexpr, FULL: tl.constexpr,
    ALIGNED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    K_FORM: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_SPAN: tl.constexpr,
    K_PARTS: tl.constexpr, K_N: tl.constexpr, K_ALL: tl.constexpr, K_RANK: tl.constexpr,
    K_WIDTH: tl.constexpr, FIT: tl.constexpr, K_VECTORS: tl.constexpr, K_W: tl.constexpr,
    V_FORM: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_SPAN: tl.constexpr,
    V_PARTS: tl.constexpr, V_N: tl.constexpr, V_ALL: tl.constexpr, V_RANK: tl.constexpr,
    V_VECTORS: tl.constexpr, V_W: tl.constexpr,
    PRODUCT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A program has `span` tiles of a head of K and V, and up to ROWS of its SHARE rows.

    q [B, Hq, L, D] with strides, D contiguous; valid [B, H, blocks n]; out [splits, B, Hq, L, D]
    and lse [splits, B, Hq, L], contiguous. Codes are half words of [blocks, B, H, D, words of n]
    or [blocks, B, H, n, words of D], directions [B, H, n, D] with strides; all that goes with a
    block lies as `kvc.ops.codec.Code` says, contiguous. norm [B, H, start + tokens] with strides;
    places [B, kept], exact [B, kept, W]. `start` is the first token's number in these.

    FORMs, GROUPs, PARTS and Ns are those of `attend_coded_keys` and `attend_coded_values`. SHORT
    blocks are one tile; FULL ones end with a tile; rows of words of ALIGNED ones do at 16 bytes.
    """
    PRECISION: tl.constexpr = "tf32x3"
    K_PER: tl.constexpr = 16 // K_BITS if K_FORM == "rows" else 1
    V_PER: tl.constexpr = 1 if V_FORM == "dense" else 16 // V_BITS
    tiles: tl.constexpr = (SHARE + ROWS - 1) // ROWS
    head, top_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row, t, d = tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, DP)
    mine = top_row + row < SHARE

    # q as a power of two times numbers up to 2, whatever its size: none is lost in float16
    q += b * q_b + h * (SHARE // L) * q_h
    rows = (top_row + row) // L * q_h + (top_row + row) % L * q_l
    raw = tl.load(
        q + rows[:, None] + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)
    unit = tl.exp2(tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(raw), 1), 1e-30))))
    if PRODUCT == tl.float32:
        unit = unit * 0 + 1
    raw = (raw / unit[:, None]).to(PRODUCT)
    row_scale = scores_of(unit, scale, softcap, False)
    parts = key_parts(
        q, rows, mine, raw, unit, D, BLOCK, K_PARTS, K_N, K_GROUP, K_PER, PRODUCT, PRECISION
    )

    if K_FORM == "dense":
        k_codes += b * k_b + h * k_h
    if V_FORM == "dense":
        v_codes += b * v_b + h * v_h
    if valid is not None:
        valid += b * valid_b + h * valid_h
    if k_norm is not None:
        k_norm += b * k_norm_b + h * k_norm_h + start
    if v_norm is not None:
        v_norm += b * v_norm_b + h * v_norm_h + start

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = no_sums(V_PARTS, ROWS, V_N)
    loose = tl.zeros([ROWS, DP], tl.float32)  # of outliers
    kept = tl.zeros([ROWS, DP], tl.float32)  # of originals, which are not turned

    per_block = 1 if SHORT else (n + TILE - 1) // TILE
    low = tl.program_id(1) * span
    high = tl.minimum(low + span, blocks * per_block)
    oldest = start + low // per_block * n + low % per_block * TILE
    if k_places is not None:
        k_places += b * k_kept
        k_exact += b * k_kept * K_W + h * (D if K_VECTORS == 1 else 0)
        one = tl.zeros([1], tl.int32)
        k_before = tl.max(before(k_places + one, k_kept + one, one + oldest * K_VECTORS), 0)
    if v_places is not None:
        v_places += b * v_kept
        v_exact += b * v_kept * V_W + h * (D if V_VECTORS == 1 else 0)
        one = tl.zeros([1], tl.int32)
        v_before = tl.max(before(v_places + one, v_kept + one, one + oldest * V_VECTORS), 0)

    for block in tl.range(low // per_block, (high + per_block - 1) // per_block):
        item = (block * B + b) * H + h
        if SHORT:
            begin, stop = 0, TILE
        else:
            begin = tl.maximum(low - block * per_block, 0) * TILE
            stop = tl.minimum(high - block * per_block, per_block) * TILE
        if K_RANK:
            of_q = fit_products(
                parts, k_fit_c + item * D * K_RANK, D, K_RANK, K_WIDTH, FIT, K_N, K_GROUP, K_PER,
                PRODUCT, PRECISION,
            )  # fmt: skip
        if V_RANK:
            of_fit = no_fit_sums(V_RANK, ROWS)
        if k_index is not None:
            k_at = ()
            for i in tl.static_range(K_PARTS):
                own = channels(i, K_N, K_GROUP, 1, D)
                entries = k_index + (item * D + own) * k_many
                k_at = k_at + (before(entries, tl.where(own < D, k_many, 0), own * 0 + begin),)
        if K_FORM == "channels" and not K_SPAN:  # steps of the whole block
            scales = channel_scales(
                k_step, k_low, k_mu, k_c, item * D, channels(0, K_N, D, 1, D), D, K_BITS
            )
        for first in tl.range(begin, stop, TILE):
            token = first + t
            there = tl.full([TILE], 1, tl.int1)
            if not FULL:
                there = token < n
            number = block * n + token
            if K_FORM != "channels":
                of_channels = None
            elif K_SPAN:
                base = (item * (n // K_SPAN) + first // K_SPAN) * D
                of_channels = channel_scales(
                    k_step, k_low, k_mu, k_c, base, channels(0, K_N, D, 1, D), D, K_BITS
                )
            else:
                of_channels = scales
            products = key_products(
                parts, item, block * B + b, k_codes, k_step, k_low, k_r,
                of_channels, first, n, token, there, k_t,
                D, K_FORM, K_BITS, K_GROUP, K_SPAN, K_N, K_ALL, TILE, FULL, ALIGNED,
                PRODUCT, PACKED, PRECISION,
            )  # fmt: skip
            if K_RANK:
                a = fit(k_fit_a + item * n * K_RANK, token, there, K_RANK, K_WIDTH, FIT, PRODUCT)
                products = tl.dot(
                    of_q.to(PRODUCT), tl.trans(a), products, input_precision=PRECISION
                )
            if k_index is not None:
                after = ()
                for i in tl.static_range(K_PARTS):
                    own = channels(i, K_N, K_GROUP, 1, D)
                    at = (item * D + own) * k_many
                    x, now = outliers(
                        k_index + at, k_delta + at, k_many, k_at[i], own < D, first, TILE, TILE,
                        PRODUCT,
                    )  # fmt: skip
                    products = tl.dot(parts[i], x, products, input_precision=PRECISION)
                    after = after + (now,)
                k_at = after
            if k_norm is not None:
                norm = tl.load(k_norm + number, mask=there, other=0.0).to(tl.float32)
                products = products * norm[None, :]
            if k_gain is not None:
                products = products * k_gain
            if k_places is not None:
                last = start + block * n + tl.minimum(first + TILE, n)
                products, k_before = key_originals(
                    products, raw, k_places, k_exact, k_kept, k_before, start + block * n + first,
                    last, h if K_VECTORS > 1 else 0, d, D, K_VECTORS, K_W, PRODUCT, PRECISION,
                )  # fmt: skip

            seen = there
            if valid is not None:
                seen = seen & tl.load(valid + number, mask=there, other=0).to(tl.int1)
            if SOFTCAP:
                scores = scores_of(products * unit[:, None], scale, softcap, SOFTCAP)
            else:
                scores = products * row_scale[:, None]
            scores = tl.where(seen[None, :], scores, float("-inf"))
            top, total, factor, p = take(top, total, scores)

            if v_places is not None:
                last = start + block * n + tl.minimum(first + TILE, n)
                kept, p, v_before = value_originals(
                    kept * factor[:, None], p, v_places, v_exact, v_kept, v_before,
                    start + block * n + first, last, h if V_VECTORS > 1 else 0, d, D, V_VECTORS,
                    V_W, PRODUCT, PRECISION,
                )  # fmt: skip
            if v_norm is not None:
                norm = tl.load(v_norm + number, mask=there, other=0.0).to(tl.float32)
                p = p * norm[None, :]
            if v_gain is not None:
                p = p * v_gain
            if V_RANK:
                of_fit = add_fit_sums(
                    of_fit, factor, p, v_fit_a + (item * n + token) * V_RANK, there, V_RANK
                )
            sums = add_tile(
                sums, factor, p, item, block * B + b, v_codes, v_step, v_low, v_mu,
                v_c, v_r, first, n, token, there, v_t,
                D, V_FORM, V_BITS, V_GROUP, V_SPAN, V_N, V_ALL, PRODUCT, PACKED, PRECISION,
            )  # fmt: skip
            if v_index is not None:
                at = ((block * B + b) * n + token) * v_many
                begins = before(
                    v_index + at, tl.where(there, v_many, 0), t * 0 + (h * D).to(tl.int32)
                )
                x, _ = outliers(
                    v_index + at, v_delta + at, v_many, begins, there, (h * D).to(tl.int32), D, DP,
                    PRODUCT,
                )  # fmt: skip
                loose = tl.dot(p.to(PRODUCT), x, loose * factor[:, None], input_precision=PRECISION)
        if V_RANK:
            sums = add_fit(
                sums, of_fit, v_fit_c + item * D * V_RANK, V_N, V_RANK, V_GROUP, V_PER, D
            )

    at = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles * SHARE)
    at += head * SHARE + top_row + row
    _, own_lse = finish(top, total, loose)
    tl.store(lse + at, own_lse, mask=mine)
    if BLOCK:
        turned = kept * BLOCK**0.5
        if v_index is not None:
            turned = tl.dot(loose, signs(d, d, BLOCK), turned, input_precision=PRECISION)
        for i in tl.static_range(V_PARTS):
            own = channels(i, V_N, V_GROUP, V_PER, D)
            turned = tl.dot(sums[i], signs(own, d, BLOCK), turned, input_precision=PRECISION)
        answer, _ = finish(top, total, turned * BLOCK**-0.5)
        inside = mine[:, None] & (d < D)[None, :]
        tl.store(out + at[:, None] * D + d[None, :], answer, mask=inside)
    else:
        for i in tl.static_range(V_PARTS):
            own = channels(i, V_N, V_GROUP, V_PER, D)
            part = sums[i]
            if v_index is not None or v_places is not None:
                place = (d[:, None] == own[None, :]).to(tl.float32)
                part = tl.dot(loose + kept, place, part, input_precision=PRECISION)
            answer, _ = finish(top, total, part)
            inside = mine[:, None] & (own < D)[None, :]
            tl.store(out + at[:, None] * D + own[None, :], answer, mask=inside)
