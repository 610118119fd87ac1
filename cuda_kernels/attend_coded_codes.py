"""Codes in registers, as Triton functions: 16 bits of a row of codes are read as one half word.

Codes of half words become factors of products of matrices without arithmetic: masked where they
stand, among the low ten bits of a half word, they are float16 numbers below the normal ones, code *
2^(at - 24), and the products are exact. `weight` says by what the sums are to be multiplied. Code j
of all half words is a factor by itself, so no code moves from thread to thread.
"""

# Triton compiles no unpacking, nor what follows a constant branch that returns
# ruff: noqa: RET505, RUF005, SIM300
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def code(
    words, j: tl.constexpr, BITS: tl.constexpr, PRODUCT: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Code j of each half word, divided by `weight`, as PRODUCT (float16 or float32).

    PACKED takes two half words at a time; the interpreter knows no assembler.
    """
    top: tl.constexpr = (1 << BITS) - 1
    place: tl.constexpr = top << (j * BITS % 8)
    both: tl.constexpr = place * 0x10001
    if PRODUCT == tl.float32:
        found = ((words >> (j * BITS)) & top).to(tl.float32)
    elif PACKED:
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
def weight(j: tl.constexpr, BITS: tl.constexpr, PRODUCT: tl.constexpr):
    """What `code` j is to be multiplied by."""
    shift: tl.constexpr = 0 if PRODUCT == tl.float32 else 24 - j * BITS % 8
    found: tl.constexpr = 2.0**shift
    return found


@triton.jit
def woven(parts):
    """Of 2, 4 or 8 parts [ROWS, N]: [ROWS, N parts], part j at j, j + parts, ..."""
    width: tl.constexpr = parts[0].shape[1] * len(parts)
    rows: tl.constexpr = parts[0].shape[0]
    for _ in tl.static_range(3):  # an axis for each bit of a part's number, the highest first
        if len(parts) > 1:
            pairs = ()
            for j in tl.static_range(len(parts) // 2):
                pairs = pairs + (tl.join(parts[j], parts[j + len(parts) // 2]),)
            parts = pairs
    return tl.reshape(parts[0], [rows, width])


@triton.jit
def channels(
    i: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """The channels [N] of part i: of group i // PER those of code i % PER of each half word.

    Behind the group's end: D.
    """
    word = tl.arange(0, N)
    return tl.where(word * PER < GROUP, i // PER * GROUP + word * PER + i % PER, D)


@triton.jit
def inside(tokens, x, size: tl.constexpr, N: tl.constexpr):
    """Which of [tokens, N] are there, x < size among N; where all of N are, plainly so.

    What is masked in parts is not read 16 bytes at a time.
    """
    if N == size:
        return tl.broadcast_to(tokens[:, None], [tokens.shape[0], N])
    else:
        return tokens[:, None] & (x < size)[None, :]


@triton.jit
def fit(
    x, at, there, rank: tl.constexpr, WIDTH: tl.constexpr, FIT: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """Rows `at` [N] of a factor of a low-rank fit, x [rows, rank], as [N, FIT].

    WIDTH, a power of two, are read; zeros lie between them, in all factors alike.
    """
    r = tl.arange(0, WIDTH)
    mask = inside(there, r, rank, WIDTH)
    found = tl.load(x + at[:, None] * rank + r[None, :], mask=mask, other=0.0).to(PRODUCT)
    for _ in tl.static_range(8):
        if found.shape[1] < FIT:
            wide = tl.join(found, tl.zeros_like(found))
            found = tl.reshape(wide, [found.shape[0], found.shape[1] * 2])
    return found


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
