"""Codes, step and low of a tile of tokens and channels, as functions of Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """`x`, float32, rounded to TYPE as the definition does: the interpreter cuts bfloat16 off."""
    if tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        up = 0x7FFF + ((bits >> 16) & 1)  # half a unit, less where that rounds to even
        x = ((bits + up) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def order_of(x):
    """Integers in the order of the numbers; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def outside(order, place, low, low_at, high, high_at):
    """Whether an entry is among a row's outliers: the k smallest, or the k largest of the rest.

    A row's bounds are the last of the smallest and its place, the last of the largest and its
    place; of equal entries the earlier ones are outliers.
    """
    least = (order < low) | ((order == low) & (place <= low_at))
    return least | (order > high) | ((order == high) & (place <= high_at))


@triton.jit
def code_of(x, low, step, constant, TOP: tl.constexpr):
    """Code = clip(round((x - low) / step), 0, top), in float32; 0 where a group is constant."""
    z = tl.minimum(tl.maximum((x - low) / step, 0.0), TOP)
    # numbers from 1.5 * 2**23 on have no fraction, and sums round half to even
    return tl.where(constant, 0.0, (z + 12582912.0) - 12582912.0)


@triton.jit
def store_scales(step, low, least, most, to, known, TOP: tl.constexpr, TYPES: tl.constexpr):
    """Step = (high - low) / top and low as they are stored, and which groups are constant.

    A step that rounds to 0 is stored as 1.
    """
    some = most >= least  # there are no entries in groups of padding
    least, most = tl.where(some, least, 0.0), tl.where(some, most, 0.0)
    wide = tl.div_rn(most - least, tl.full(most.shape, TOP, tl.float32))
    wide = rounded(wide, TYPES[0]).to(tl.float32)
    constant = wide == 0
    wide = tl.where(constant, 1.0, wide)
    least = rounded(least, TYPES[1])
    tl.store(step + to, wide.to(TYPES[0]), mask=known)
    tl.store(low + to, least, mask=known)
    return wide, least.to(tl.float32), constant


@triton.jit
def packed(codes, BITS: tl.constexpr, AXIS: tl.constexpr):
    """Words of a tile of codes [R, C], along the axis 0 or 1."""
    PER: tl.constexpr = 32 // BITS
    R: tl.constexpr = codes.shape[0]
    C: tl.constexpr = codes.shape[1]
    shift = tl.arange(0, PER) * BITS
    if AXIS == 0:
        words = tl.sum(tl.reshape(codes, [R // PER, PER, C]) << shift[None, :, None], 1)
    else:
        words = tl.sum(tl.reshape(codes, [R, C // PER, PER]) << shift[None, None, :], 2)
    return words


@triton.jit
def split(x, ALONG: tl.constexpr, GROUPS: tl.constexpr):
    """A tile [R, C] with the entries of a group along axis 1 or, of channels, along axis 2."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    if ALONG:
        groups = tl.reshape(x, [GROUPS, R // GROUPS, C])
    else:
        groups = tl.reshape(x, [R, GROUPS, C // GROUPS])
    return groups


@triton.jit
def entries(x, there, bounds, mean, row, known, place):
    """A tile's numbers, with the mean of its row in place of an outlier, and what is an outlier.

    `row` are the rows' numbers, and `known` those that there are, [TOKENS, 1] or [1, CHANNELS].
    """
    value = tl.load(x, mask=there, other=0.0).to(tl.float32)
    out = tl.zeros(value.shape, tl.int1)
    if bounds is not None:
        at = bounds + row * 4
        low, low_at = tl.load(at, mask=known, other=0), tl.load(at + 1, mask=known, other=0)
        high, high_at = tl.load(at + 2, mask=known, other=0), tl.load(at + 3, mask=known, other=0)
        out = outside(order_of(value), place, low, low_at, high, high_at)
        value = tl.where(out, tl.load(mean + row, mask=known, other=0.0), value)
    return value, out


@triton.jit(do_not_specialize=["n", "span", "groups"])
def sweep(
    x, codes, step, low, rest, bounds, mean, batch, head, token, n, span, groups,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr,
    ALONG: tl.constexpr, WALK: tl.constexpr, SPREAD: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr, ACROSS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Codes of `span` tokens and ACROSS channels, of W that lie side by side: D, or H D.

    x [B, H, n, D] of strides batch, head, token, 1. A tile has GROUPS whole groups, along tokens
    (ALONG) or channels; or, with WALK, a part of one group. With SPREAD they are of any size.
    codes: KEYS [B, H, D, words of n], else [B, H, n, words of D]
    step, low: ALONG [B, H, groups, 1, D], else [B, planes, n, groups, 1], a plane of W channels
    rest [B, H, n, D]: x - (codes * step + low), 0 at outliers
    bounds, mean: of rows; KEYS [B, H, D], a token's number is its place; else [B, n], a channel's
    """
    PER: tl.constexpr = 32 // BITS
    TOP: tl.constexpr = (1 << BITS) - 1
    PLANES: tl.constexpr = H * D // W
    b, plane = (tl.program_id(2) // PLANES).to(tl.int64), tl.program_id(2) % PLANES
    first, last = tl.program_id(0) * span, tl.minimum(tl.program_id(0) * span + span, n)
    c0 = tl.program_id(1) * ACROSS
    i = tl.arange(0, CHANNELS)
    c = (c0 + i)[None, :]
    in_c = ((i < ACROSS) & (c0 + i < W))[None, :]
    h, d = plane + c // D, c % D
    column = (b * H + h) * D + d  # of a channel of all
    place = plane * W + c  # among the channels of all heads
    t = first + tl.arange(0, TOKENS)[:, None]

    # low = min(x), high = max(x)
    TYPES: tl.constexpr = (step.dtype.element_ty, low.dtype.element_ty)
    AXIS: tl.constexpr = 0 if ALONG else 1
    if WALK:
        least = tl.full([1, CHANNELS], float("inf"), tl.float32)
        most = tl.full([1, CHANNELS], float("-inf"), tl.float32)
        for at in tl.range(first, last, TOKENS):
            t = at + tl.arange(0, TOKENS)[:, None]
            there = (t < last) & in_c
            value, _ = entries(
                x + b * batch + h * head + t * token + d, there, bounds, mean,
                column if KEYS else b * n + t, in_c if KEYS else t < last, t if KEYS else place,
            )  # fmt: skip
            lowest = tl.min(tl.where(there, value, float("inf")), 0, keep_dims=True)
            highest = tl.max(tl.where(there, value, float("-inf")), 0, keep_dims=True)
            least, most = tl.minimum(least, lowest), tl.maximum(most, highest)
        nth = tl.program_id(0)
        wide, least, constant = store_scales(
            step, low, least, most, ((b * H + h) * groups + nth) * D + d, in_c, TOP, TYPES
        )
        wide, least, constant = wide[None], least[None], constant[None]
    else:
        there = (t < last) & in_c
        value, out = entries(
            x + b * batch + h * head + t * token + d, there, bounds, mean,
            column if KEYS else b * n + t, in_c if KEYS else t < last, t if KEYS else place,
        )  # fmt: skip
        g = tl.program_id(AXIS) * GROUPS
        if SPREAD:
            which = (t - first) // (span // GROUPS) if ALONG else (i // (ACROSS // GROUPS))[None, :]
            least = tl.zeros(value.shape, tl.float32)
            wide = tl.full(value.shape, 1.0, tl.float32)
            constant = tl.zeros(value.shape, tl.int1)
            for j in tl.range(0, GROUPS):
                inside = there & (which == j)
                nth = tl.full([1, 1], 0, tl.int32) + g + j
                lowest = tl.min(tl.where(inside, value, float("inf")), AXIS, keep_dims=True)
                highest = tl.max(tl.where(inside, value, float("-inf")), AXIS, keep_dims=True)
                if ALONG:
                    of_group = ((b * H + h) * groups + nth) * D + d
                    known = in_c & (nth < groups)
                else:
                    of_group = ((b * PLANES + plane) * n + t) * groups + nth
                    known = (t < last) & (nth < groups)
                wide_j, least_j, constant_j = store_scales(
                    step, low, lowest, highest, of_group, known, TOP, TYPES
                )
                wide = tl.where(which == j, wide_j, wide)
                least = tl.where(which == j, least_j, least)
                constant = tl.where(which == j, constant_j, constant)
        else:
            lowest = split(tl.where(there, value, float("inf")), ALONG, GROUPS)
            highest = split(tl.where(there, value, float("-inf")), ALONG, GROUPS)
            lowest, highest = tl.min(lowest, 1 + AXIS), tl.max(highest, 1 + AXIS)
            if ALONG:
                nth = g + tl.arange(0, GROUPS)[:, None]
                of_group = ((b * H + h) * groups + nth) * D + d
                known = in_c & (nth < groups)
            else:
                nth = g + tl.arange(0, GROUPS)[None, :]
                of_group = ((b * PLANES + plane) * n + t) * groups + nth
                known = (t < last) & (nth < groups)
            wide, least, constant = store_scales(
                step, low, lowest, highest, of_group, known, TOP, TYPES
            )
            wide, least = tl.expand_dims(wide, 1 + AXIS), tl.expand_dims(least, 1 + AXIS)
            constant = tl.expand_dims(constant, 1 + AXIS)

    for at in tl.range(first, last if WALK else first + 1, TOKENS):
        if WALK:
            t = at + tl.arange(0, TOKENS)[:, None]
            there = (t < last) & in_c
            value, out = entries(
                x + b * batch + h * head + t * token + d, there, bounds, mean,
                column if KEYS else b * n + t, in_c if KEYS else t < last, t if KEYS else place,
            )  # fmt: skip
        grouped = value if SPREAD else split(value, ALONG, GROUPS)
        code = code_of(grouped, least, wide, constant, TOP)
        left = tl.reshape(grouped - (code * wide + least), [TOKENS, CHANNELS])
        code = tl.where(there, tl.reshape(code, [TOKENS, CHANNELS]), 0.0).to(tl.int32)
        if KEYS:
            w = at // PER + tl.arange(0, TOKENS // PER)[:, None]
            to = column * ((n + PER - 1) // PER) + w
            tl.store(codes + to, packed(code, BITS, 0), mask=(w * PER < last) & in_c)
        else:
            word = tl.arange(0, CHANNELS // PER) * PER
            cw = (c0 + word)[None, :]
            to = ((b * H + plane + cw // D) * n + t) * (D // PER) + cw % D // PER
            in_w = ((word < ACROSS) & (c0 + word < W))[None, :]
            tl.store(codes + to, packed(code, BITS, 1), mask=(t < last) & in_w)
        if rest is not None:
            to = ((b * H + h) * n + t) * D + d
            tl.store(rest + to, tl.where(out, 0.0, left), mask=there)
