"""Power iteration with Gram-Schmidt, as functions of Triton: of a short block and of a long one.

Products with a few columns are sums of float32 numbers, a column at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.quantize_kernel import rounded


@triton.jit
def column(x, j):
    """Column j of x [N, RANKS]."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == j, x, 0.0), 1)


@triton.jit
def orthonormal(x, R: tl.constexpr):
    """An orthonormal basis of the R columns of x [N, RANKS].

    Gram-Schmidt, each column three times: what rounding has left of a column that adds nothing
    comes out orthogonal too, or else the last time shortens it, and it is set to zero.
    """
    top = tl.max(tl.max(tl.abs(x), 1), 0)
    x = x / tl.where(top > 0, top, 1.0)
    i = tl.arange(0, x.shape[1])[None, :]
    for j in tl.range(0, R):
        v = column(x, j)
        norm = tl.sqrt(tl.sum(v * v, 0))
        before = norm
        for _ in tl.range(0, 3):
            before = norm
            shares = tl.sum(tl.where(i < j, x, 0.0) * v[:, None], 0)
            v -= tl.sum(tl.where(i < j, x, 0.0) * shares[None, :], 1)
            norm = tl.sqrt(tl.sum(v * v, 0))
        v = tl.where(norm > 0.5 * before, v / tl.where(norm > 0, norm, 1.0), 0.0)
        x = tl.where(i == j, v[:, None], x)
    return x


@triton.jit
def times(e, c, R: tl.constexpr):
    """E C [N, RANKS] of e [N, D] and the R columns of c [D, RANKS]."""
    i = tl.arange(0, c.shape[1])[None, :]
    out = tl.zeros([e.shape[0], c.shape[1]], tl.float32)
    for j in tl.range(0, R):
        product = tl.sum(e * column(c, j)[None, :], 1)
        out = tl.where(i == j, product[:, None], out)
    return out


@triton.jit
def times_turned(e, a, R: tl.constexpr):
    """E^T A [D, RANKS] of e [N, D] and the R columns of a [N, RANKS]."""
    i = tl.arange(0, a.shape[1])[None, :]
    out = tl.zeros([e.shape[1], a.shape[1]], tl.float32)
    for j in tl.range(0, R):
        product = tl.sum(e * column(a, j)[:, None], 0)
        out = tl.where(i == j, product[:, None], out)
    return out


@triton.jit(do_not_specialize=["n", "n_iter"])
def iterate(
    e, c0, y, a, c, n, n_iter, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A [n, R] and C [D, R] of one head's block e [n, D], from c0 [H, D, R]; y [n, R] are notes.

    A block of one tile is read once. Of a longer one it reads e, which its caches hold, twice for
    each iteration.
    """
    program = tl.program_id(0).to(tl.int64)
    e, y = e + program * n * D, y + program * n * R
    row, i = tl.arange(0, ROWS)[:, None], tl.arange(0, RANKS)[None, :]
    t, d = tl.arange(0, TOKENS)[:, None], tl.arange(0, WIDTH)
    in_c, of_c = (d < D)[:, None] & (i < R), d[:, None] * R + i
    right = tl.load(c0 + program % H * D * R + of_c, mask=in_c, other=0.0)
    left = tl.zeros([ROWS, RANKS], tl.float32)
    if ROWS == TOKENS:
        mask = (t < n) & (d < D)[None, :]
        whole = tl.load(e + t * D + d[None, :], mask=mask, other=0.0)
    for _ in tl.range(0, n_iter):  # A = basis of E C, C = E^T A
        right = orthonormal(right, R)
        if ROWS == TOKENS:
            left = orthonormal(times(whole, right, R), R)
            right = times_turned(whole, left, R)
        else:
            for at in tl.range(0, n, TOKENS):
                mask = (at + t < n) & (d < D)[None, :]
                block = tl.load(e + (at + t) * D + d[None, :], mask=mask, other=0.0)
                tl.store(y + (at + t) * R + i, times(block, right, R), mask=(at + t < n) & (i < R))
            tl.debug_barrier()  # other threads read what has been written here
            left = tl.load(y + row * R + i, mask=(row < n) & (i < R), other=0.0)
            left = orthonormal(left, R)
            tl.debug_barrier()
            tl.store(y + row * R + i, left, mask=(row < n) & (i < R))
            tl.debug_barrier()
            right = tl.zeros([WIDTH, RANKS], tl.float32)
            for at in tl.range(0, n, TOKENS):
                mask = (at + t < n) & (d < D)[None, :]
                block = tl.load(e + (at + t) * D + d[None, :], mask=mask, other=0.0)
                some = tl.load(y + (at + t) * R + i, mask=(at + t < n) & (i < R), other=0.0)
                right += times_turned(block, some, R)
            tl.debug_barrier()
    TYPE: tl.constexpr = a.dtype.element_ty
    to = (program * n + row) * R + i
    tl.store(a + to, rounded(left, TYPE), mask=(row < n) & (i < R))
    tl.store(c + program * D * R + of_c, rounded(right, TYPE), mask=in_c)


@triton.jit(do_not_specialize=["n", "size", "of_head"])
def project(
    e, c, a, parts, n, size, of_head, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    RANKS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Of `size` tokens of e [n, D]: E C into a [n, R], and E^T (E C) into parts [splits, D, R].

    c [D, R] of each head or, if `of_head` is H, of every batch row alike. TURN: a holds A, and
    parts are those of E^T A. Either of a and parts may be left out.
    """
    program = tl.program_id(1).to(tl.int64)
    d, i = tl.arange(0, WIDTH), tl.arange(0, RANKS)[None, :]
    in_c, of_c = (d < D)[:, None] & (i < R), d[:, None] * R + i
    total = tl.zeros([WIDTH, RANKS], tl.float32)
    if not TURN:
        right = tl.load(c + program % of_head * D * R + of_c, mask=in_c, other=0.0)
    first = tl.program_id(0) * size
    for at in tl.range(first, tl.minimum(first + size, n), TOKENS):
        t = at + tl.arange(0, TOKENS)[:, None]
        mask = (t < n) & (d < D)[None, :]
        block = tl.load(e + (program * n + t) * D + d[None, :], mask=mask, other=0.0)
        of_a, in_a = (program * n + t) * R + i, (t < n) & (i < R)
        if TURN:
            left = tl.load(a + of_a, mask=in_a, other=0.0)
        else:
            left = times(block, right, R)
            if a is not None:
                tl.store(a + of_a, left, mask=in_a)
        if parts is not None:
            total += times_turned(block, left, R)
    if parts is not None:
        to = (program * tl.num_programs(0) + tl.program_id(0)) * D * R
        tl.store(parts + to + of_c, total, mask=in_c)


@triton.jit(do_not_specialize=["splits"])
def gather(
    parts, c, splits, D: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr,
    WIDTH: tl.constexpr, BASIS: tl.constexpr,
):  # fmt: skip
    """The sum of parts [splits, D, R] of one head, or an orthonormal BASIS of it, into c [D, R]."""
    program = tl.program_id(0).to(tl.int64)
    d, i = tl.arange(0, WIDTH)[:, None], tl.arange(0, RANKS)[None, :]
    in_c, of_c = (d < D) & (i < R), d * R + i
    total = tl.zeros([WIDTH, RANKS], tl.float32)
    for s in tl.range(0, splits):
        total += tl.load(parts + (program * splits + s) * D * R + of_c, mask=in_c, other=0.0)
    if BASIS:
        total = orthonormal(total, R)
    tl.store(c + program * D * R + of_c, rounded(total, c.dtype.element_ty), mask=in_c)


@triton.jit(do_not_specialize=["n"])
def tall(y, a, n, R: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr):
    """An orthonormal basis of the columns of one head's y [n, R], in place and rounded into a.

    As `orthonormal`, but y is read a few rows at a time.
    """
    base = tl.program_id(0).to(tl.int64) * n * R
    row, i = tl.arange(0, ROWS), tl.arange(0, RANKS)[None, :]
    for j in tl.range(0, R):
        before = 0.0
        norm = 0.0  # squared
        shares = tl.zeros([RANKS], tl.float32)  # of the columns before in column j
        for at in tl.range(0, n, ROWS):
            t = at + row
            v = tl.load(y + base + t * R + j, mask=t < n, other=0.0)
            older = tl.load(
                y + base + t[:, None] * R + i, mask=(t < n)[:, None] & (i < j), other=0.0
            )
            shares += tl.sum(older * v[:, None], 0)
            norm += tl.sum(v * v, 0)
        for _ in tl.range(0, 3):
            again = tl.zeros([RANKS], tl.float32)
            before = norm
            norm = 0.0
            for at in tl.range(0, n, ROWS):
                t = at + row
                v = tl.load(y + base + t * R + j, mask=t < n, other=0.0)
                older = tl.load(
                    y + base + t[:, None] * R + i, mask=(t < n)[:, None] & (i < j), other=0.0
                )
                v -= tl.sum(older * shares[None, :], 1)
                again += tl.sum(older * v[:, None], 0)
                norm += tl.sum(v * v, 0)
                tl.store(y + base + t * R + j, v, mask=t < n)
            shares = again
            tl.debug_barrier()  # other threads read what has been written here
        some = norm > 0.25 * before
        factor = tl.where(some, 1 / tl.sqrt(tl.where(some, norm, 1.0)), 0.0)
        for at in tl.range(0, n, ROWS):
            t = at + row
            v = tl.load(y + base + t * R + j, mask=t < n, other=0.0) * factor
            tl.store(y + base + t * R + j, v, mask=t < n)
            tl.store(a + base + t * R + j, rounded(v, a.dtype.element_ty), mask=t < n)
        tl.debug_barrier()
