"""Weighted sums of a tile of coded values, as Triton functions; steps are folded.

Values have a step for each group of GROUP channels of a token. Groups are taken in pairs: the rows
of a product are p step of one group, and behind them those of the other; of the sums each group's
columns count in its own rows. A group by itself is stacked. Sums are a tuple of [W, 2 ROWS, N]: of
pair s those of code i of each half word, by s and then by i; `channels` says which they are.
"""

# Triton compiles no unpacking, nor what follows a constant branch that returns
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.attend_coded_codes import (
    ROWS,
    code,
    columns,
    inverse,
    pair,
    power,
    stacked,
    summed,
    twice,
    weight,
)


@triton.jit
def channels(
    s: tl.constexpr, i: tl.constexpr, N: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The channels [N] of code i in pair s, and their groups in the pair; behind them D."""
    per: tl.constexpr = 16 // BITS
    word = tl.arange(0, N)
    first: tl.constexpr = 2 * s * GROUP
    own = first + word * per + i
    return tl.where((word * per < 2 * GROUP) & (own < D), own, D), word * per // GROUP


@triton.jit
def add_tile(
    sums, rests, size, factor, p, codes, step, low, row, base, token, there,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Sums * factor + p (step code + low) of a tile's tokens, p [W, ROWS, TILE].

    p (step code + low) = (p step) code + p low. `sums` are of p step code, in units of size [W], a
    power of two that grows with the steps so that p step is a float16 number of a good size;
    `rests` are of p low, of each group. The tile's half words are the rows row [W] + token
    [W, TILE], and its steps and lows the rows base + token of [tokens, D / GROUP].
    """
    per: tl.constexpr = 16 // BITS
    groups: tl.constexpr = D // GROUP
    words: tl.constexpr = GROUP // per  # of a group
    steps = columns(step, base, token, there, groups)
    lows = columns(low, base, token, there, groups)
    most = tl.max(steps[0], 1)
    now = ()
    for g in tl.static_range(groups):
        most = tl.maximum(most, tl.max(steps[g], 1))
        now = now + (rests[g] * factor + tl.sum(p * lows[g][:, None, :], 2),)
    larger = tl.maximum(size, power(most) * 2.0**-10)
    each = inverse(larger)
    shrink = twice(factor * (size * each)[:, None])
    weights = p * each[:, None, None]
    column = tl.arange(0, N)
    row_words: tl.constexpr = (D * BITS + 31) // 32 * 2
    found = ()
    for s in tl.static_range((groups + 1) // 2):
        folded = weights * steps[2 * s][:, None, :]
        if 2 * s + 1 < groups:
            other = weights * steps[2 * s + 1][:, None, :]
            y = pair(folded.to(tl.float16), other.to(tl.float16))
        else:
            y = stacked(folded)
        place = (token * row_words)[:, :, None] + (2 * s * words + column)[None, None, :]
        mask = tl.broadcast_to(there[:, :, None], place.shape)
        if (2 if 2 * s + 1 < groups else 1) * words != N:
            mask = mask & (column < (groups - 2 * s) * words)[None, None, :]
            mask = mask & (column < 2 * words)[None, None, :]
        x = tl.load(codes + (row * row_words)[:, None, None] + place, mask=mask, other=0)
        for i in tl.static_range(per):
            before = sums[s * per + i] * shrink[:, :, None]
            found = found + (tl.dot(y, code(x, i, BITS, PACKED), before),)
    return found, now, larger


@triton.jit
def add_fit(
    sums, size, of_a, c, base, live,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Sums + (p A) C^T of a block's low-rank fit; of_a = p A [W, 2 ROWS, FIT]; c [D, RANK]."""
    per: tl.constexpr = 16 // BITS
    row, column = tl.arange(0, 2 * ROWS), tl.arange(0, of_a.shape[2])
    of_a = summed(of_a)
    apart: tl.constexpr = of_a.shape[2] // triton.next_power_of_2(RANK)
    for r in tl.range(RANK, num_stages=1):
        share = tl.sum(tl.where((column == r * apart)[None, None, :], of_a, 0.0), 2)
        share = twice(share * inverse(size)[:, None])
        found = ()
        for s in tl.static_range(len(sums) // per):
            for i in tl.static_range(per):
                channel, _ = channels(s, i, N, D, GROUP, BITS)
                mask = live[:, None] & (channel < D)[None, :]
                at = base[:, None] + (channel * RANK + r)[None, :]
                of_c = tl.load(c + at, mask=mask, other=0.0).to(tl.float32) / weight(i, BITS)
                own = share
                if 2 * s * GROUP + GROUP == D:  # what rounding cut off is in the other rows
                    own = tl.where((row < ROWS)[None, :], share, 0.0)
                found = found + (sums[s * per + i] + own[:, :, None] * of_c[:, None, :],)
        sums = found
    return sums


@triton.jit
def joined(
    sums, rests, size, share, s: tl.constexpr, i: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The sums [ROWS, N] of all teams' tokens for code i in pair s; share [W, ROWS] is a team's."""
    _, group = channels(s, i, N, D, GROUP, BITS)
    scaled = twice(share * size[:, None])[:, :, None]
    halves = tl.reshape(tl.sum(sums[s * (16 // BITS) + i] * scaled, 0), [2, ROWS, N])
    rest = tl.sum(rests[2 * s] * share, 0)[:, None]
    if 2 * s * GROUP + GROUP < D:
        half = tl.arange(0, 2)
        halves = tl.where((half[:, None] == group[None, :])[:, None, :], halves, 0.0)
        other = tl.sum(rests[2 * s + 1] * share, 0)[:, None]
        rest = tl.where((group == 0)[None, :], rest, other)
    return tl.sum(halves, 0) * weight(i, BITS) + rest
