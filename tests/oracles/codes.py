"""Quantization of one chunk: backbones, packing, rotation and two-sided scales.

Backbones: KIVI (arXiv:2402.02750) and the two others that GEAR (arXiv:2403.05527) is built on.
Two-sided scales: KVarN (arXiv:2606.03458). Used by the oracles of GEAR and of LESS.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.oracles.attention import Array, stored

Role = Literal["k", "v"]
Codes = NDArray[np.int64]

GRID_STEP = {2: 0.9957, 3: 0.586}  # of the fixed grids; from 4 bits on: min-max
EPS = 1e-8  # floor of a standard deviation


class Quantized(NamedTuple):
    """Codes of one chunk, each with its group's minimum and step beside it."""

    codes: Codes  # [H, n, D], 0 .. 2^bits - 1
    m: Array  # [H, n, D], as stored; one value throughout a group
    step: Array  # [H, n, D], as stored; 1 for a constant group


def groups(
    shape: tuple[int, int, int], role: Role, backbone: str, group: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Index of every group that shares one minimum and one step, in a tensor [H, n, D].

    kivi: K groups of g tokens per channel, V groups of g channels per token inside a head.
    kcvt: K one group per channel, V one group per token over all heads and channels.
    token: groups of g channels per token inside a head, for K and V.
    """
    n_heads, n, head_dim = shape
    everything = slice(None)
    if backbone == "kcvt" and role == "k":
        yield from ((h, everything, d) for h in range(n_heads) for d in range(head_dim))
    elif backbone == "kcvt":
        yield from ((everything, t, everything) for t in range(n))
    elif backbone == "kivi" and role == "k":
        if n % group:
            raise ValueError(f"kivi: {n} tokens are not whole groups of {group}")
        for h in range(n_heads):
            for d in range(head_dim):
                yield from ((h, slice(t, t + group), d) for t in range(0, n, group))
    elif backbone in ("kivi", "token"):
        if head_dim % group:
            raise ValueError(f"{backbone}: {head_dim} channels are not whole groups of {group}")
        for h in range(n_heads):
            for t in range(n):
                yield from ((h, t, slice(d, d + group)) for d in range(0, head_dim, group))
    else:
        raise ValueError(f"backbone: expected kivi, kcvt or token, got {backbone}")


def quantize_group(
    x: Array, bits: int, meta: str | None = None, zero: str | None = "same"
) -> tuple[Codes, float, float]:
    """Codes clip(round_half_even((x - m) / step), 0, q_max); q_max = 2^b - 1.

    step = (M - m) / q_max from the exact m and M; then both are rounded to the dtypes they are
    stored in, and the codes are taken with the rounded ones. A step that is, or rounds to, 0
    marks a constant group: step 1, codes 0.

    Shapes: x of any shape, one group; returns codes of that shape, m, step.
    """
    q_max = 2**bits - 1
    low, high = float(x.min()), float(x.max())
    m = float(stored(low, meta if zero == "same" else zero))
    step = float(stored((high - low) / q_max, meta))
    if step == 0:
        return np.zeros(x.shape, np.int64), m, 1.0
    # np.rint rounds half to even.
    return np.clip(np.rint((x - m) / step), 0, q_max).astype(np.int64), m, step


def quantize(
    x: ArrayLike,
    role: Role,
    backbone: str,
    bits: int,
    group: int = 64,
    meta: str | None = None,
    zero: str | None = "same",
) -> Quantized:
    """Asymmetric uniform quantization of a chunk, a group at a time.

    Shapes: x [H, n, D].
    """
    x = np.asarray(x, np.float64)
    out = Quantized(np.zeros(x.shape, np.int64), np.zeros(x.shape), np.ones(x.shape))
    for at in groups(x.shape, role, backbone, group):
        out.codes[at], out.m[at], out.step[at] = quantize_group(x[at], bits, meta, zero)
    return out


def dequantize(q: Quantized) -> Array:
    """Values code * step + m. Shapes: returns [H, n, D]."""
    return q.codes * q.step + q.m


def n_words(n: int, bits: int) -> int:
    """32-bit words of a row of n codes: ceil(n b / 32)."""
    return -(-n * bits // 32)


def pack_row(codes: ArrayLike, bits: int) -> list[int]:
    """Element j of a word occupies bits [j b, (j + 1) b); the last word is filled with zeros."""
    if bits not in (2, 4, 8):
        raise ValueError(f"only 2, 4 and 8 bits are packed, got {bits}")
    row = [int(code) for code in np.asarray(codes)]
    words = [0] * n_words(len(row), bits)
    per_word = 32 // bits
    for i, code in enumerate(row):
        words[i // per_word] |= code << (i % per_word * bits)
    return words


def unpack_row(words: ArrayLike, bits: int, n: int) -> list[int]:
    """The first n codes of a packed row."""
    row = [int(word) for word in np.asarray(words)]
    per_word = 32 // bits
    return [row[i // per_word] >> (i % per_word * bits) & (2**bits - 1) for i in range(n)]


def pack(codes: Codes, role: Role, bits: int) -> NDArray[np.uint32]:
    """K is packed along tokens, V along channels, whatever the backbone.

    Shapes: codes [H, n, D]; returns K [H, D, ceil(n b / 32)], V [H, n, ceil(D b / 32)].
    """
    rows = codes.swapaxes(1, 2) if role == "k" else codes
    words = [[pack_row(row, bits) for row in head] for head in rows]
    return np.array(words, np.uint32).reshape(*rows.shape[:2], n_words(rows.shape[2], bits))


def unpack(words: NDArray[np.uint32], role: Role, bits: int, n: int) -> Codes:
    """Inverse of `pack`; n is the number of tokens of K, of channels of V.

    Shapes: returns [H, T, D].
    """
    rows = [[unpack_row(row, bits, n) for row in head] for head in words]
    codes = np.array(rows, np.int64).reshape(*words.shape[:2], n)
    return codes.swapaxes(1, 2) if role == "k" else codes


def hadamard(head_dim: int) -> Array:
    """The normalized Hadamard matrix of Sylvester; Hd Hd^T = I, and it is symmetric.

    Where head_dim is no power of two: blocks, each of the largest power of two that divides it.
    """
    block = head_dim & -head_dim
    one = np.ones((1, 1))
    while len(one) < block:
        one = np.block([[one, one], [one, -one]])
    full = np.zeros((head_dim, head_dim))
    for at in range(0, head_dim, block):
        full[at : at + block, at : at + block] = one / np.sqrt(block)
    return full


@dataclass(frozen=True)
class Dual:
    """One tile of one head on a fixed grid: x ~ grid(code) r c + mu."""

    codes: Codes  # [T, D]
    grid: Array  # [T, D], the level of each code
    mu: Array  # [D]
    r: Array  # [T]
    c: Array  # [D]
    m: Array | None  # [D], of z, from 4 bits on
    step: Array | None  # [D], of z, from 4 bits on

    @property
    def x(self) -> Array:
        """Values grid(code) r c + mu. Shapes: [T, D]."""
        return self.grid * self.r[:, None] * self.c + self.mu


def dual_scales(x: ArrayLike, n_rounds: int = 16) -> tuple[Array, Array, Array]:
    """Means mu[d] = mean_t x; r, c that give rows and columns of (x - mu) / (r c) deviation 1.

    Alternating, columns (channels) first: log c += log std_t z, then log r += log std_d z, where
    z = (x - mu) / (r c) and std is that of the population. It leaves the mean of a row out; rows
    come last, so that theirs is 1 and the columns' a common number near 1.

    Because std_t(y / (r c)) c = std_t(y / r), the running sum is taken in one piece, log c =
    log max(std_t(y / r), 1e-8). A floor inside the running sum would multiply 16 times in a
    constant channel, and 1e-128 turns the rounding of its mean into the tile's largest number.

    Shapes: x [T, D]; returns mu [D], r [T], c [D].
    """
    x = np.asarray(x, np.float64)
    n, head_dim = x.shape
    mu = np.array([x[:, d].sum() / n for d in range(head_dim)])
    y = x - mu
    log_r, log_c = np.zeros(n), np.zeros(head_dim)
    for _ in range(n_rounds):
        for d in range(head_dim):
            log_c[d] = np.log(max(np.std(y[:, d] / np.exp(log_r)), EPS))
        for t in range(n):
            log_r[t] = np.log(max(np.std(y[t] / np.exp(log_c)), EPS))
    return mu, np.exp(log_r), np.exp(log_c)


def grid_codes(z: ArrayLike, bits: int) -> tuple[Codes, Array]:
    """Mid-rise grid: level(code) = (code - q_max / 2) step; the nearest level, clipped.

    2 bits: (code - 1.5) 0.9957; 3 bits: (code - 3.5) 0.586.
    Shapes: z of any shape; returns codes and levels of that shape.
    """
    z = np.asarray(z, np.float64)
    step, middle = GRID_STEP[bits], (2**bits - 1) / 2
    codes = np.clip(np.rint(z / step + middle), 0, 2**bits - 1).astype(np.int64)
    return codes, (codes - middle) * step


def dual_quantize(x: ArrayLike, bits: int, meta: str | None = None, n_rounds: int = 16) -> Dual:
    """Two-sided scales, then codes of z = (x - mu) / (r c), with mu, r, c as they are stored.

    Where a factor is stored as 0, z is 0. At 2 and 3 bits on the fixed grid; from 4 bits on
    min-max per channel of z, by the rule of `quantize_group`.

    Shapes: x [T, D], one tile of one head.
    """
    x = np.asarray(x, np.float64)
    mu, r, c = (stored(part, meta) for part in dual_scales(x, n_rounds))
    factor = r[:, None] * c
    z = np.divide(x - mu, factor, out=np.zeros_like(x), where=factor > 0)
    if bits in GRID_STEP:
        codes, grid = grid_codes(z, bits)
        return Dual(codes, grid, mu, r, c, None, None)
    codes = np.zeros(x.shape, np.int64)
    m, step = np.zeros(x.shape[1]), np.ones(x.shape[1])
    for d in range(x.shape[1]):
        codes[:, d], m[d], step[d] = quantize_group(z[:, d], bits, meta)
    return Dual(codes, codes * step + m, mu, r, c, m, step)
