"""Entries of coded tokens that are exact, as Triton functions: outliers and retained originals.

Both lie by their places, in ascending order. A program keeps how many of a row lie before the tile,
and takes those that lie in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.attend_coded_codes import flat, tall, times

ENTRIES = tl.constexpr(16)  # originals that are taken at a time


@triton.jit
def before(index, many, key):
    """How many of the `many` places at the pointers `index` [N] are less than `key` [N]."""
    low = (key * 0).to(tl.int32)
    high = low + many
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        place = _place(index + middle, middle < many)
        less = _unsigned(place) < _unsigned(key)
        less = less & (low < high)
        high = tl.where(low < high, tl.where(less, high, middle), high)
        low = tl.where(less, middle + 1, low)
    return low


@triton.jit
def _unsigned(x):
    """Places so that -1, which stands where there is none, is behind all others."""
    return x.to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _place(pointer, mask):
    """Places; those of 16 bits have no sign."""
    place = tl.load(pointer, mask=mask, other=0).to(tl.int32)
    if pointer.dtype.element_ty == tl.int16:
        place = place & 0xFFFF
    return place


@triton.jit
def outliers(index, delta, many, at, some, first, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """What is to be added to a tile: [N, WIDTH], its SIZE places from `first` on.

    index and delta are N pointers to rows of `many` entries, of which `some` [N] are asked for and
    `at` [N] lie before the tile. Returns also how many lie before the next.
    """
    column = tl.arange(0, WIDTH)
    x = tl.zeros([at.shape[0], WIDTH], tl.float32)
    going = 1
    while going > 0:
        inside = some & (at < many)
        place = _place(index + at, inside)
        some = inside & (place < first + SIZE)
        value = tl.load(delta + at, mask=some, other=0.0).to(tl.float32)
        own = some[:, None] & ((place - first)[:, None] == column[None, :])
        x = tl.where(own, value[:, None], x)
        at += some.to(tl.int32)
        going = tl.max(some.to(tl.int32), 0)
    return x, at


@triton.jit
def key_originals(
    products, q, index, exact, many, at, first, stop, vector, d,
    D: tl.constexpr, G: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Products [2 ROWS, TILE] with the tokens `first` to `stop`, of originals in their places.

    index [many] are token * G + vector, and exact [many, W] the originals of all vectors, of which
    this head has `vector`; `at` of them lie before the tile; q is stacked. Returns also how many
    lie before the next tile.
    """
    column = tl.arange(0, products.shape[1])
    going = 1
    while going > 0:
        x, place, found = _originals(index, many, at, exact, first, stop, vector, d, D, G, W)
        own = place[:, None] == column[None, :]
        put = tl.dot(times(q, tl.trans(x), WIDE), own.to(tl.float32), input_precision="tf32x3")
        products = tl.where(tl.max(own.to(tl.int32), 0)[None, :] > 0, put, products)
        at += found
        going = tl.where(found == ENTRIES, 1, 0)
    return products, at


@triton.jit
def value_originals(
    sums, p, index, exact, many, at, first, stop, vector, d,
    D: tl.constexpr, G: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS, DP] + p X of the originals X, p [ROWS, TILE], and p with zeros in their places.

    Arguments as above. Returns also how many lie before the next tile.
    """
    column = tl.arange(0, p.shape[1])
    going = 1
    while going > 0:
        x, place, found = _originals(index, many, at, exact, first, stop, vector, d, D, G, W)
        own = place[:, None] == column[None, :]
        taken = tl.dot(tall(p), tl.trans(own.to(tl.float16)))  # as much of p as float16 twice is
        sums += flat(times(tall(flat(taken)), x, WIDE))
        p = tl.where(tl.max(own.to(tl.int32), 0)[None, :] > 0, 0.0, p)
        at += found
        going = tl.where(found == ENTRIES, 1, 0)
    return sums, p, at


@triton.jit
def _originals(
    index, many, at, exact, first, stop, vector, d,
    D: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """ENTRIES originals from `at` on: vectors, places, and how many belong to the tile's tokens.

    Vectors [ENTRIES, DP] of other heads are zero; places in the tile are -1 where there is none.
    """
    entry = at + tl.arange(0, ENTRIES)
    key = tl.load(index + entry, mask=entry < many, other=-1)
    inside = (key >= 0) & (key < stop * G)
    own = inside & (key % G == vector)
    x = tl.load(
        exact + entry.to(tl.int64)[:, None] * W + d[None, :],
        mask=own[:, None] & (d < D)[None, :],
        other=0.0,
    )
    return x.to(tl.float32), tl.where(own, key // G - first, -1), tl.sum(inside.to(tl.int32), 0)
