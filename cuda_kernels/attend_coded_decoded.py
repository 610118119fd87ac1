"""Attention over coded tokens of every kind, of which a tile at a time is decoded in registers.

What `attend_coded_folded` does not take: outliers, two-sided scales, tokens that are merged or
kept, groups that tiles would cut, low-rank fits that do not fit into registers, and queries in
float32, whose products are as exact as that.
"""

# Triton compiles no unpacking, nor what follows a constant branch that returns
# ruff: noqa: RET505, RUF005
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.attend_coded_codes import ROWS, flat, tall, times, times_signs, turned
from kvc.cuda_kernels.attend_coded_exact import before, key_originals, outliers, value_originals
from kvc.cuda_kernels.softmax import finish, scores_of, take
from kvc.ops.scales import GRID_STEP

GRID = tl.constexpr(GRID_STEP[2])  # of two-sided scales without steps, which have two bits


GROWING = [
    "n", "stretch", "blocks", "start", "B", "k_many", "v_many", "k_kept", "v_kept",
    "valid_b", "valid_h", "k_norm_b", "k_norm_h", "v_norm_b", "v_norm_h",
]  # fmt: skip


@triton.jit(do_not_specialize=GROWING)
def attend_decoded_kernel(
    q, valid, length, out, lse,
    k_codes, k_step, k_low, k_mu, k_factor, k_r, k_a, k_c, k_index, k_delta,
    k_norm, k_places, k_exact,
    v_codes, v_step, v_low, v_mu, v_factor, v_r, v_a, v_c, v_index, v_delta,
    v_norm, v_places, v_exact,
    q_b, q_h, q_l, k_b, k_h, k_t, v_b, v_h, v_t,
    valid_b, valid_h, k_norm_b, k_norm_h, v_norm_b, v_norm_h,
    n, stretch, blocks, start, B, k_many, v_many, k_kept, v_kept, scale, softcap, k_gain, v_gain,
    H: tl.constexpr, SHARE: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr, WIDE: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    K_BITS: tl.constexpr, K_ACROSS: tl.constexpr, K_TOKENS: tl.constexpr,
    K_CHANNELS: tl.constexpr, K_ALL: tl.constexpr, K_RANK: tl.constexpr,
    K_VECTORS: tl.constexpr, K_WIDTH: tl.constexpr,
    V_BITS: tl.constexpr, V_ACROSS: tl.constexpr, V_TOKENS: tl.constexpr,
    V_CHANNELS: tl.constexpr, V_ALL: tl.constexpr, V_RANK: tl.constexpr,
    V_VECTORS: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    """A program has some tiles of a head of K and V, and up to ROWS of its SHARE rows.

    q, valid, length, out, lse and codes as in `attend_folded_kernel`; where BITS are 0 there are
    directions [B, H, n, D] with strides instead of codes. Half words are ACROSS tokens or channels.
    Steps are of TOKENS tokens, 0 for a block, and CHANNELS channels; ALL: of all heads. All that
    goes with a block lies as `kvc.ops.codec.Code` says; what is of channels is read once for
    `stretch` tokens. norm [B, H, start + tokens] with strides;
    places [B, kept] are token * VECTORS + vector; exact [B, kept, WIDTH]. `start` is the first
    token's number in these.
    """
    tiles: tl.constexpr = (SHARE + ROWS - 1) // ROWS
    head, top_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row, t, d = tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, DP)
    mine = top_row + row < SHARE

    q += b * q_b + h * (SHARE // L) * q_h
    rows = (top_row + row) // L * q_h + (top_row + row) % L * q_l
    raw = tl.load(
        q + rows[:, None] + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)
    unit = tl.exp2(tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(raw), 1), 1e-30))))
    plain = tall(raw / unit[:, None])
    queries = plain
    if BLOCK:
        queries = tall(turned(q, rows, mine, unit, d, D, BLOCK))

    if K_BITS == 0:
        k_codes += b * k_b + h * k_h
    if V_BITS == 0:
        v_codes += b * v_b + h * v_h
    if valid is not None:
        valid += b * valid_b + h * valid_h
    if k_norm is not None:
        k_norm += b * k_norm_b + h * k_norm_h + start
    if v_norm is not None:
        v_norm += b * v_norm_b + h * v_norm_h + start

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    kept = tl.zeros([ROWS, DP], tl.float32)  # of originals, which are not turned

    per_block = (n + TILE - 1) // TILE
    if length is not None:
        blocks = tl.minimum(tl.load(length) // n, blocks)
    count = blocks * per_block
    span = (count + tl.num_programs(1) - 1) // tl.num_programs(1)
    low = tl.minimum(tl.program_id(1) * span, count)
    high = tl.minimum(low + span, count)
    oldest = start + low // per_block * n + low % per_block * TILE
    if k_places is not None:
        k_places += b * k_kept
        k_exact += b * k_kept * K_WIDTH + h * (D if K_VECTORS == 1 else 0)
        one = tl.zeros([1], tl.int32)
        k_before = tl.max(before(k_places + one, k_kept + one, one + oldest * K_VECTORS), 0)
    if v_places is not None:
        v_places += b * v_kept
        v_exact += b * v_kept * V_WIDTH + h * (D if V_VECTORS == 1 else 0)
        one = tl.zeros([1], tl.int32)
        v_before = tl.max(before(v_places + one, v_kept + one, one + oldest * V_VECTORS), 0)

    for block in tl.range(low // per_block, (high + per_block - 1) // per_block):
        item, whole = (block * B + b) * H + h, block * B + b
        begin = tl.maximum(low - block * per_block, 0) * TILE
        stop = tl.minimum(high - block * per_block, per_block) * TILE
        k_rows = (item * D + d) * k_many
        if k_index is not None:
            k_at = before(k_index + k_rows, tl.where(d < D, k_many, 0), d * 0 + begin)
        if DP <= 128:
            of_k = _columns(k_c, item, d, D, K_RANK)
            of_v = _columns(v_c, item, d, D, V_RANK)
        for piece in tl.range(begin // stretch, (stop + stretch - 1) // stretch):
            k_of = _of_channels(
                k_step, k_low, k_mu, k_factor, item, piece, n, d, D, TILE, K_BITS, K_TOKENS
            )
            v_of = _of_channels(
                v_step, v_low, v_mu, v_factor, item, piece, n, d, D, TILE, V_BITS, V_TOKENS
            )
            oldest_token = tl.maximum(begin, piece * stretch)
            newest_token = tl.minimum(stop, (piece + 1) * stretch)
            for first in tl.range(oldest_token, newest_token, TILE):
                token = first + t
                there = token < n
                number = block * n + token
                if DP > 128:  # more than registers hold: read from the cache again for each tile
                    again = item + tl.minimum(first, 0)  # which the compiler does not know to be 0
                    of_k = _columns(k_c, again, d, D, K_RANK)
                    of_v = _columns(v_c, again, d, D, V_RANK)
                x = _decoded(
                    k_codes, k_step, k_low, k_r, k_a, k_of, of_k, k_t, item, whole, n,
                    token[None, :], d[:, None], there[None, :], 1, D, TILE, K_BITS, K_ACROSS,
                    K_TOKENS, K_CHANNELS, K_ALL,
                )  # fmt: skip
                if k_index is not None:
                    more, k_at = outliers(
                        k_index + k_rows, k_delta + k_rows, k_many, k_at, d < D, first, TILE, TILE
                    )
                    x += more
                products = times(queries, x, True)
                if k_norm is not None:
                    norm = tl.load(k_norm + number, mask=there, other=0.0).to(tl.float32)
                    products = products * norm[None, :]
                if k_gain is not None:
                    products = products * k_gain
                last = start + block * n + tl.minimum(first + TILE, n)
                if k_places is not None:
                    products, k_before = key_originals(
                        products, plain, k_places, k_exact, k_kept, k_before,
                        start + block * n + first, last, h if K_VECTORS > 1 else 0, d, D, K_VECTORS,
                        K_WIDTH, WIDE,
                    )  # fmt: skip

                seen = there
                if valid is not None:
                    seen = seen & tl.load(valid + number, mask=there, other=0).to(tl.int1)
                scores = scores_of(flat(products) * unit[:, None], scale, softcap, SOFTCAP)
                scores = tl.where(seen[None, :], scores, float("-inf"))
                top, total, factor, p = take(top, total, scores)

                if v_places is not None:
                    kept, p, v_before = value_originals(
                        kept * factor[:, None], p, v_places, v_exact, v_kept, v_before,
                        start + block * n + first, last, h if V_VECTORS > 1 else 0, d, D, V_VECTORS,
                        V_WIDTH, WIDE,
                    )  # fmt: skip
                x = _decoded(
                    v_codes, v_step, v_low, v_r, v_a, v_of, of_v, v_t, item, whole, n,
                    token[:, None], d[None, :], there[:, None], 0, D, TILE, V_BITS, V_ACROSS,
                    V_TOKENS, V_CHANNELS, V_ALL,
                )  # fmt: skip
                if v_index is not None:
                    at = (whole * n + token) * v_many
                    of_head = (h * D).to(tl.int32)
                    begins = before(v_index + at, tl.where(there, v_many, 0), t * 0 + of_head)
                    more, _ = outliers(
                        v_index + at,
                        v_delta + at,
                        v_many,
                        begins,
                        there,
                        (h * D).to(tl.int32),
                        D,
                        DP,
                    )
                    x += more
                if v_norm is not None:
                    norm = tl.load(v_norm + number, mask=there, other=0.0).to(tl.float32)
                    x = x * norm[:, None]
                if v_gain is not None:
                    x = x * v_gain
                sums = sums * factor[:, None] + flat(times(tall(p), x, WIDE))

    if BLOCK:
        sums = flat(times_signs(sums, d, d, D, BLOCK))
    answer, own_lse = finish(top, total, sums + kept)
    at = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles * SHARE)
    at += head * SHARE + top_row + row
    tl.store(out + at[:, None] * D + d[None, :], answer, mask=mine[:, None] & (d < D)[None, :])
    tl.store(lse + at, own_lse, mask=mine)


@triton.jit
def _columns(c, item, d, D: tl.constexpr, RANK: tl.constexpr):
    """The columns [DP] of a factor [D, RANK] of a block's low-rank fit."""
    found = ()
    for i in tl.static_range(RANK):
        found = found + (_wide(c + item * D * RANK + i, d * RANK, d < D),)
    return found


@triton.jit
def _of_channels(
    step, low, mu, factor, item, piece, n, d,
    D: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What codes of channels [DP] are multiplied by, what is added to that, and means.

    Where they are those of a piece of a block, of TOKENS tokens or all; else nothing.
    """
    if BITS == 0 or (TOKENS and TOKENS % TILE):
        return ()
    else:
        base = (item * (n // TOKENS) + piece) * D if TOKENS else item * D
        if factor is None:
            return _wide(step + base, d, d < D), _wide(low + base, d, d < D)
        else:
            factors, means = _wide(factor + base, d, d < D), _wide(mu + base, d, d < D)
            if step is None:
                steps = factors * GRID
                return steps, steps * (0.5 - 2 ** (BITS - 1)), means
            else:
                steps, lows = _wide(step + base, d, d < D), _wide(low + base, d, d < D)
                return steps * factors, lows * factors, means


@triton.jit
def _decoded(
    codes, step, low, r, a, of_channels, of_c, stride, item, whole, n, token, d, there,
    AXIS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    ACROSS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """A tile's numbers in float32; token, `there` and channels d are columns and a row, or turned.

    AXIS is that of tokens. A row of codes is of a channel or of a token; in either a half word has
    several, which threads beside one another read.
    """
    mask = there & (d < D)
    if BITS == 0:
        x = tl.load(codes + token.to(tl.int64) * stride + d, mask=mask, other=0.0).to(tl.float32)
    else:
        per: tl.constexpr = 16 // BITS
        if ACROSS:
            row_words = (n * BITS + 31) // 32 * 2
            codes += item * D * row_words
            at = d * row_words + token // per
            shift = token % per * BITS
        else:
            row_words = (D * BITS + 31) // 32 * 2
            codes += item * n * row_words
            at = token * row_words + d // per
            shift = d % per * BITS
        words = tl.load(codes + at, mask=mask, other=0).to(tl.int32)
        x = ((words >> shift) & ((1 << BITS) - 1)).to(tl.float32)

        if len(of_channels) == 0:
            base = (whole if ALL else item) * (n // TOKENS) * (D // CHANNELS)
            if CHANNELS == D:
                at, own = token // TOKENS, there
            else:
                at, own = token // TOKENS * (D // CHANNELS) + d // CHANNELS, mask
            x = x * _wide(step + base, at, own) + _wide(low + base, at, own)
        else:
            x = x * tl.expand_dims(of_channels[0], AXIS) + tl.expand_dims(of_channels[1], AXIS)
            if len(of_channels) == 3:
                x = x * _wide(r + item * n, token, there) + tl.expand_dims(of_channels[2], AXIS)
    for i in tl.static_range(len(of_c)):
        of_token = _wide(a + item * n * len(of_c) + i, token * len(of_c), there)
        x += of_token * tl.expand_dims(of_c[i], AXIS)
    return x


@triton.jit
def _wide(x, at, mask):
    """Some numbers in float32."""
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
