"""Codes in registers, as Triton functions: 16 bits of a row of codes are read as one half word.

Codes of half words become factors of products of matrices without arithmetic: masked where they
stand, among the low ten bits of a half word, they are float16 numbers below the normal ones, code *
2^(at - 24), and the products are exact. `weight` says by what the sums are to be multiplied. Code j
of all half words is a factor by itself, so no code moves from thread to thread.

The other factor is rounded to float16. It has eight rows, and products of matrices have sixteen: so
what rounding cuts off is rounded once more, and lies in the other eight (`stacked`, `summed`).

Arrays have an axis in front: of teams, see `attend_coded_folded`.
"""

# Triton compiles no unpacking, nor what follows a constant branch that returns
# ruff: noqa: RET505, RUF005, SIM300
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

ROWS = tl.constexpr(8)  # queries; twice as many rows are the least of a product


@triton.jit
def code(words, j: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """Code j of each half word, divided by `weight`, in float16.

    PACKED takes two half words at a time; the interpreter knows no assembler.
    """
    place: tl.constexpr = ((1 << BITS) - 1) << (j * BITS % 8)
    both: tl.constexpr = place * 0x10001
    if PACKED:
        if j * BITS >= 8:
            words = tl.inline_asm_elementwise(
                "shr.u32 $0, $1, 8;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
            )
        found = tl.inline_asm_elementwise(
            f"and.b32 $0, $1, {both};", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        if j * BITS >= 8:
            words = words >> 8
        found = (words & place).to(tl.int16).to(tl.float16, bitcast=True)
    return found


@triton.jit
def weight(j: tl.constexpr, BITS: tl.constexpr):
    """What `code` j is to be multiplied by."""
    found: tl.constexpr = 2.0 ** (24 - j * BITS % 8)
    return found


@triton.jit
def stacked(x):
    """X [W, ROWS, N] as [W, 2 ROWS, N] in float16: rounded, and behind that what it was off by."""
    high = x.to(tl.float16)
    return pair(high, (x - high.to(tl.float32)).to(tl.float16))


@triton.jit
def pair(x, y):
    """The rows of x and then those of y, both [W, ROWS, N]."""
    rows = tl.permute(tl.join(x, y), (0, 3, 1, 2))
    return tl.reshape(rows, [x.shape[0], 2 * x.shape[1], x.shape[2]])


@triton.jit
def summed(x):
    """The two halves of the rows [W, 2 ROWS, N] as one: [W, ROWS, N]."""
    return tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2, x.shape[2]]), 1)


@triton.jit
def twice(x):
    """What is that of a row [W, ROWS], for both halves."""
    wide = tl.broadcast_to(x[:, None, :], [x.shape[0], 2, x.shape[1]])
    return tl.reshape(wide, [x.shape[0], 2 * x.shape[1]])


@triton.jit
def tall(x):
    """X [ROWS, N] stacked: [2 ROWS, N]."""
    return tl.reshape(stacked(x[None]), [2 * x.shape[0], x.shape[1]])


@triton.jit
def flat(x):
    """The two halves of the rows [2 ROWS, N] as one: [ROWS, N]."""
    return tl.reshape(summed(x[None]), [x.shape[0] // 2, x.shape[1]])


@triton.jit
def times(x, y, WIDE: tl.constexpr):
    """X Y in float32, x [2 ROWS, C] stacked, y [C, N]; WIDE as exact as float32."""
    unit = power(tl.maximum(tl.max(tl.max(tl.abs(y), 1), 0), 1e-30)) * 2.0**-10
    y = y * inverse(unit)
    high = y.to(tl.float16)
    found = tl.dot(x, high)
    if WIDE:
        found = tl.dot(x, (y - high.to(tl.float32)).to(tl.float16), found)
    return found * unit


@triton.jit
def _joined(x, y):
    both = tl.permute(tl.join(x, y), (0, 1, 3, 2))
    return tl.reshape(both, [x.shape[0], x.shape[1], 2 * x.shape[2]])


@triton.jit
def beside(parts):
    """Of 1, 2, 4 or 8 parts [W, R, N]: [W, R, N parts], behind one another."""
    for _ in tl.static_range(3):
        if len(parts) > 1:
            pairs = ()
            for j in tl.static_range(len(parts) // 2):
                pairs = pairs + (_joined(parts[2 * j], parts[2 * j + 1]),)
            parts = pairs
    return parts[0]


@triton.jit
def _halves(x):
    """The first half of the columns of x [W, T, N], and the second; of two columns [W, T] each."""
    W: tl.constexpr = x.shape[0]
    T: tl.constexpr = x.shape[1]
    half: tl.constexpr = x.shape[2] // 2
    low, high = tl.split(tl.permute(tl.reshape(x, [W, T, 2, half]), (0, 1, 3, 2)))
    if half == 1:
        return tl.reshape(low, [W, T]), tl.reshape(high, [W, T])
    else:
        return low, high


@triton.jit
def columns(x, base, at, there, N: tl.constexpr):
    """Rows base [W] + at [W, T] of x [rows, N] in float32, as a tuple of their columns [W, T].

    Behind the N columns there may be more, of zeros; rows that are not `there` are zero.
    """
    WIDTH: tl.constexpr = triton.next_power_of_2(N)
    if WIDTH == 1:
        return (tl.load(x + base[:, None] + at, mask=there, other=0.0).to(tl.float32),)
    else:
        column = tl.arange(0, WIDTH)
        mask = tl.broadcast_to(there[:, :, None], [at.shape[0], at.shape[1], WIDTH])
        if WIDTH != N:
            mask = mask & (column < N)[None, None, :]
        place = (at * N)[:, :, None] + column[None, None, :]
        found = (tl.load(x + (base * N)[:, None, None] + place, mask=mask, other=0.0),)
        for _ in tl.static_range(4):
            if len(found[0].shape) > 2:
                halves = ()
                for i in tl.static_range(len(found)):
                    halves = halves + _halves(found[i])
                found = halves
        wide = ()
        for i in tl.static_range(len(found)):
            wide = wide + (found[i].to(tl.float32),)
        return wide


@triton.jit
def inside(live, x, size: tl.constexpr, N: tl.constexpr):
    """Which of [W, N] are there, x < size among N; where all of N are, plainly so.

    What is masked in parts is not read 16 bytes at a time.
    """
    mask = tl.broadcast_to(live[:, None], [live.shape[0], N])
    if N != size:
        mask = mask & (x < size)[None, :]
    return mask


@triton.jit
def power(x):
    """The power of two that is at most x > 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def inverse(x):
    """1 / x of a power of two; a division would take several steps."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def turned(q, rows, mine, unit, channel, D: tl.constexpr, BLOCK: tl.constexpr):
    """Some channels [ROWS, N] of q Hd / unit, in sums over 16 channels of q at a time.

    q is that at the offsets `rows` [ROWS].
    """
    part = tl.arange(0, 16)
    found = tl.zeros([2 * ROWS, channel.shape[0]], tl.float32)
    for start in tl.range(0, D, 16):
        at = rows[:, None] + (start + part)[None, :]
        some = tl.load(q + at, mask=mine[:, None], other=0.0).to(tl.float32) / unit[:, None]
        found += times_signs(some, start + part, channel, D, BLOCK)
    return tl.where((channel < D)[None, :], flat(found), 0.0)


@triton.jit
def times_signs(x, channel, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """X Hd [2 ROWS, DP], stacked; x [ROWS, N] are some channels, behind them D."""
    x = tl.where((channel < D)[None, :], x, 0.0)
    unit = power(tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-30))
    return tl.dot(tall(x * inverse(unit)), signs(channel, d, BLOCK).to(tl.float16)) * (
        unit * BLOCK**-0.5
    )


@triton.jit
def signs(rows, columns, BLOCK: tl.constexpr):
    """Signs of the Hadamard matrix, as `kvc.ops.rotate.signs`, in blocks of a power of two.

    Of entry (i, j) it is the parity of the bits that i and j share.
    """
    i, j = rows[:, None], columns[None, :]
    shared = i & j & (BLOCK - 1)
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    odd = (shared ^ (shared >> 1)) & 1
    return tl.where(i // BLOCK == j // BLOCK, 1.0 - 2.0 * odd.to(tl.float32), 0.0)
