"""Outliers of a block: which entries of a row they are, and what must be added there.

Nothing is sorted. The last of the k smallest is found bit by bit: it is the largest number that
fewer than k entries lie below; then its place in the same way, among those that equal it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvc.cuda_kernels.launch import Variant
from kvc.cuda_kernels.quantize_kernel import order_of, outside, rounded
from kvc.ops.quant import Quantized, Role
from kvc.ops.residual import LowRank, Outliers, outlier_count

ENTRIES = {"k": 64, "v": 2048}  # of a row that are taken at a time
ROWS = 16  # of a tile of keys, channels side by side
WARPS = 4
DELTAS = 256  # of a program
BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}  # of float32 that can differ


class Found(NamedTuple):
    """Outliers of the rows [B, H, D] of keys or [B, n] of values, 2k of each."""

    index: torch.Tensor  # [..., 2k], ascending; low 16 bits where these suffice
    bounds: torch.Tensor  # int32 [..., 4], see quantize_kernel.outside
    mean: torch.Tensor  # float32 [...], of all entries of a row


@triton.jit
def orders(x, row, known, at, length, head, token, D: tl.constexpr, KEYS: tl.constexpr,
           ENTRIES: tl.constexpr):  # fmt: skip
    """Of `row` [ROWS, 1] the entries from `at` on: their values, order, places, and which exist."""
    place = at + tl.arange(0, ENTRIES)[None, :]
    there = known & (place < length)
    entry = row + place * token if KEYS else row * token + place // D * head + place % D
    value = tl.load(x + entry, mask=there, other=0.0).to(tl.float32)
    return value, order_of(value), place, there


@triton.jit(do_not_specialize=["n", "k", "length", "place_bits"])
def select(
    x, index, bounds, mean, batch, head, token, n, k, length, place_bits,
    H: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, WALK: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The k smallest and the k largest of ROWS rows of x [B, H, n, D], as `Found` has them.

    A row is a channel's n tokens (KEYS) or a token's H D channels; with WALK it is read ENTRIES at
    a time for every bit, else once. BITS: how many bits of the numbers differ at all.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    known = row < (D if KEYS else n)
    b = tl.program_id(1).to(tl.int64)
    if KEYS:
        x += b // H * batch + b % H * head
    else:
        x += b * batch
    if not WALK:
        values, order, places, exist = orders(
            x, row, known, 0, length, head, token, D, KEYS, ENTRIES
        )

    # low = max {v: #(x < v) < k},  high = max {v: #(x >= v) >= k}
    low = tl.full([ROWS, 1], -2147483648, tl.int32)
    high = tl.full([ROWS, 1], -2147483648, tl.int32)
    below = tl.zeros([ROWS, 1], tl.int32)  # entries less than low
    above = tl.zeros([ROWS, 1], tl.int32)  # entries more than high
    for i in tl.range(0, BITS):
        bit = tl.full([ROWS, 1], 1, tl.int32) << (31 - i)
        less, more = tl.zeros([ROWS, 1], tl.int32), tl.zeros([ROWS, 1], tl.int32)
        for at in tl.range(0, length, ENTRIES):
            if WALK:
                value, o, place, there = orders(
                    x, row, known, at, length, head, token, D, KEYS, ENTRIES
                )
            else:
                value, o, place, there = values, order, places, exist
            less += tl.sum((there & (o < (low ^ bit))).to(tl.int32), 1, keep_dims=True)
            more += tl.sum((there & (o >= (high ^ bit))).to(tl.int32), 1, keep_dims=True)
        below = tl.where(less < k, less, below)
        low = tl.where(less < k, low ^ bit, low)
        above = tl.where(more < k, more, above)
        high = tl.where(more < k, high, high ^ bit)

    # the bits that cannot differ are ones in the order of negative numbers
    SAME: tl.constexpr = (1 << (32 - BITS)) - 1
    low, high = tl.where(low < 0, low | SAME, low), tl.where(high < 0, high | SAME, high)

    # the places in the same way; if low = high, the smallest have taken the first of the equals
    shared = tl.where(low == high, k - below, 0)
    low_at, high_at = tl.zeros([ROWS, 1], tl.int32), tl.zeros([ROWS, 1], tl.int32)
    for i in tl.range(0, place_bits):
        bit = 1 << (place_bits - 1 - i)
        less, more = tl.zeros([ROWS, 1], tl.int32), tl.zeros([ROWS, 1], tl.int32)
        for at in tl.range(0, length, ENTRIES):
            if WALK:
                value, o, place, there = orders(
                    x, row, known, at, length, head, token, D, KEYS, ENTRIES
                )
            else:
                value, o, place, there = values, order, places, exist
            early = there & (o == low) & (place < low_at + bit)
            less += tl.sum(early.to(tl.int32), 1, keep_dims=True)
            early = there & (o == high) & (place < high_at + bit)
            more += tl.sum(early.to(tl.int32), 1, keep_dims=True)
        low_at = tl.where(below + less < k, low_at + bit, low_at)
        high_at = tl.where(above + tl.maximum(more - shared, 0) < k, high_at + bit, high_at)

    number = b * (D if KEYS else n) + row
    count = tl.zeros([ROWS, 1], tl.int32)
    total = tl.zeros([ROWS, 1], tl.float32)
    for at in tl.range(0, length, ENTRIES):
        if WALK:
            value, o, place, there = orders(
                x, row, known, at, length, head, token, D, KEYS, ENTRIES
            )
        else:
            value, o, place, there = values, order, places, exist
        out = there & outside(o, place, low, low_at, high, high_at)
        nth = count + tl.cumsum(out.to(tl.int32), 1) - 1
        stored = tl.broadcast_to(place, out.shape).to(index.dtype.element_ty)
        tl.store(index + number * (2 * k) + nth, stored, mask=out)
        count += tl.sum(out.to(tl.int32), 1, keep_dims=True)
        total += tl.sum(value, 1, keep_dims=True)
    tl.store(mean + number, total / length, mask=known)
    tl.store(bounds + number * 4, low, mask=known)
    tl.store(bounds + number * 4 + 1, low_at, mask=known)
    tl.store(bounds + number * 4 + 2, high, mask=known)
    tl.store(bounds + number * 4 + 3, high_at, mask=known)


@triton.jit(do_not_specialize=["n", "m", "total", "of_tokens", "of_channels"])
def deltas(
    x, codes, step, low, a, c, index, delta, batch, head, token, n, m, total,
    s_batch, s_head, s_token, s_channel, of_tokens, of_channels,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr,
    DELTAS: tl.constexpr,
):  # fmt: skip
    """What x has beyond codes * step + low + A C^T at the places `index`, all as stored.

    A step is at (b s_batch + h s_head + t // of_tokens s_token + d // of_channels s_channel).
    """
    i = tl.program_id(0).to(tl.int64) * DELTAS + tl.arange(0, DELTAS)
    there = i < total
    place = tl.load(index + i, mask=there, other=0).to(tl.int32)
    if index.dtype.element_ty == tl.int16:
        place = place & 0xFFFF
    row = i // m
    if KEYS:
        b, h, t, d = row // (H * D), row // D % H, place, row % D
    else:
        b, h, t, d = row // n, place // D, row % n, place % D
    value = tl.load(x + b * batch + h * head + t * token + d, mask=there, other=0.0).to(tl.float32)
    known = tl.zeros([DELTAS], tl.float32)
    if codes is not None:
        PER: tl.constexpr = 32 // BITS
        if KEYS:
            at, along = ((b * H + h) * D + d) * ((n + PER - 1) // PER), t
        else:
            at, along = ((b * H + h) * n + t) * (D // PER), d
        word = tl.load(codes + at + along // PER, mask=there, other=0)
        code = (word >> (along % PER * BITS).to(tl.int32)) & ((1 << BITS) - 1)
        at = b * s_batch + h * s_head + t // of_tokens * s_token + d // of_channels * s_channel
        wide = tl.load(step + at, mask=there, other=0.0).to(tl.float32)
        known = code.to(tl.float32) * wide + tl.load(low + at, mask=there, other=0.0).to(tl.float32)
    if a is not None:
        for j in tl.range(0, R):
            of_token = tl.load(a + ((b * H + h) * n + t) * R + j, mask=there, other=0.0)
            of_channel = tl.load(c + ((b * H + h) * D + d) * R + j, mask=there, other=0.0)
            known += of_token.to(tl.float32) * of_channel.to(tl.float32)
    tl.store(delta + i, rounded(value - known, delta.dtype.element_ty), mask=there)


def find(x: torch.Tensor, role: Role, fraction: float) -> Found | None:
    """The outliers of x [B, H, n, D]; None where there are none."""
    B, H, n, D = x.shape
    length = n if role == "k" else H * D
    k = outlier_count(fraction, length)
    if k == 0:
        return None
    shape = (B, H, D) if role == "k" else (B, n)
    places = torch.int16 if length <= 2**16 else torch.int32
    index = x.new_empty((*shape, 2 * k), dtype=places)
    bounds = x.new_empty((*shape, 4), dtype=torch.int32)
    mean = x.new_empty(shape, dtype=torch.float32)
    tile = tiling(length, role)
    grid = (triton.cdiv(shape[-1], tile["ROWS"]), B * H if role == "k" else B)
    select[grid](
        x, index, bounds, mean, *x.stride()[:3], n, k, length, length.bit_length(),
        H=H, D=D, KEYS=role == "k", BITS=BITS[x.dtype], **tile, num_warps=WARPS,
    )  # fmt: skip
    return Found(index, bounds, mean)


def tiling(length: int, role: Role) -> dict[str, int]:
    """A tile of `select` for rows of so many entries."""
    entries = min(ENTRIES[role], triton.next_power_of_2(length))
    rows = ROWS if role == "k" else ENTRIES[role] // entries
    return {"WALK": length > entries, "ROWS": rows, "ENTRIES": entries}


def take(
    x: torch.Tensor,
    index: torch.Tensor,
    role: Role,
    dtype: torch.dtype,
    d: Quantized | None,
    of_tokens: int,
    of_channels: int,
    bits: int,
    l: LowRank | None,
) -> Outliers:
    """What x [B, H, n, D] has beyond D + L at the places `index`.

    A step of `d` is that of so many tokens and channels; without `d`, x is what D leaves.
    """
    _, H, n, D = x.shape
    delta = torch.empty_like(index, dtype=dtype)
    strides = [0, 0, 0, 0]
    if d is not None:  # [B, H or 1, groups of tokens, groups of channels]
        step = d.step.reshape(*d.step.shape[:2], -1, 1 if of_channels >= D else D // of_channels)
        strides = [s if size > 1 else 0 for s, size in zip(step.stride(), step.shape, strict=True)]
    deltas[(triton.cdiv(index.numel(), DELTAS),)](
        x, d and d.codes, d and d.step, d and d.low, l and l.a, l and l.c, index, delta,
        *x.stride()[:3], n, index.shape[-1], index.numel(), *strides, of_tokens, of_channels,
        H=H, D=D, R=l.a.shape[-1] if l else 0, BITS=bits, KEYS=role == "k", DELTAS=DELTAS,
        num_warps=WARPS,
    )  # fmt: skip
    return Outliers(index, delta)


def variants() -> Iterator[Variant]:
    """Both roles, rows that fit in a tile and longer ones."""
    roles: tuple[Role, ...] = ("k", "v")
    for role in roles:
        for dtype, bits in (("bf16", 16), ("fp32", 32)):
            flags = {"H": 8, "D": 128, "KEYS": role == "k"}
            strides = dict.fromkeys(("batch", "head", "token"), "i32:16")
            for length in (1024, 8192) if role == "v" else (128, 8192):
                tile = tiling(length, role)
                yield Variant(
                    f"select-{role}-{length}-{dtype}",
                    select,
                    {
                        "x": f"*{dtype}:16",
                        "index": "*i16:16",
                        "bounds": "*i32:16",
                        "mean": "*fp32:16",
                        **strides,
                        **dict.fromkeys(("n", "k", "length", "place_bits"), "i32"),
                    },
                    {**flags, **tile, "BITS": bits},
                    WARPS,
                    3,
                )
            sizes = ("n", "m", "total", "s_batch", "s_head", "s_token", "s_channel")
            yield Variant(
                f"deltas-{role}-{dtype}",
                deltas,
                {
                    **dict.fromkeys(("x", "step", "low", "a", "c", "delta"), f"*{dtype}:16"),
                    "codes": "*i32:16",
                    "index": "*i16:16",
                    **strides,
                    **dict.fromkeys((*sizes, "of_tokens", "of_channels"), "i32"),
                },
                {**flags, "R": 4, "BITS": 2, "DELTAS": DELTAS},
                WARPS,
                3,
            )
