"""The bytes that `encode` moves, told from shapes and sizes of elements alone.

A block of decoding is read for its codes; what they leave is written in float32, and read by the
fit once, or, of more numbers than a program holds, twice for each iteration, from caches. Two-sided
scales keep a tile in float32, at most 64 KiB that caches hold, and read it once for each round. A
prompt's block is longer than that: there a fit reads what the codes leave n_iter + 1 times.
"""

from __future__ import annotations

import triton

from kvc.cuda_kernels import encode_low_rank, quantize
from kvc.cuda_kernels.launch import Traffic, span
from kvc.ops.codec import Spec
from kvc.ops.quant import n_words
from kvc.ops.scales import GRID_STEP, ROUNDS


def traffic(shape: tuple[int, ...], size: int, spec: Spec, *, rank: int, n_iter: int) -> Traffic:
    """Bytes of a call without outliers, which take as many as their values ask for.

    Args:
        shape: Of x, [B, H, n, D].
        size: Bytes of a number of x and of what is stored but codes.
        spec: How it is coded; steps and factors are stored as x is.
        rank: Of the fit.
        n_iter: Its iterations.
    """
    B, H, n, D = shape
    x, r = B * H * n * D, min(rank, n, D)
    if spec.scales == "dual":
        touched, least = _dual(shape, size, spec)
    else:
        how = (spec.bits, spec.role, spec.backbone, spec.group_size)
        touched, least = quantize.traffic(shape, size, *how)
        if spec.rotate:  # first, into float32
            touched = (size + 4) * x + quantize.traffic(shape, 4, *how, scales=size).touched
        if r:
            touched += 4 * x
    if r:
        touched += _fit(shape, size, r, n_iter)
        least += 4 * H * D * r + size * B * H * (n + D) * r
    return Traffic(touched, least)


def _dual(shape: tuple[int, ...], size: int, spec: Spec) -> Traffic:
    """Of `scale_tile`: a reading for the mean, its rest, each round, the range and the codes."""
    B, H, n, D = shape
    x, tile = B * H * n * D, min(spec.tile, n)
    words = B * H * (D * n_words(n, spec.bits) if spec.role == "k" else n * n_words(D, spec.bits))
    of_channels = 2 if spec.bits in GRID_STEP else 4
    least = size * (x + B * H * (n + of_channels * D * n // tile)) + 4 * words
    # written and read, the rounds, range and codes, what is left; factors are read back
    return Traffic(least + 4 * x * (1 + 1 + ROUNDS + 1 + 1 + 1) + size * B * H * n, least)


def _fit(shape: tuple[int, ...], size: int, r: int, n_iter: int) -> int:
    """Of `fit`; notes of a program are in float32."""
    B, H, n, D = shape
    heads, e, stored = B * H, 4 * B * H * n * D, size * B * H * (n + D) * r
    if n <= encode_low_rank.SHORT:
        tile = encode_low_rank.tiling(n, D)
        notes = 4 * 4 * heads * n * r  # written and read for its basis, and as the basis
        each = e if tile["ROWS"] == tile["TOKENS"] else n_iter * (2 * e + notes)
        return each + 4 * heads * D * r + stored
    tokens = encode_low_rank.TILE // triton.next_power_of_2(D)
    splits = triton.cdiv(n, span(n, tokens, heads, 4 * tokens))
    part, y = 4 * heads * splits * D * r, 4 * heads * n * r
    # C read and parts written by `project`, parts read and C written by `gather`
    touched = (n_iter - 1) * (e + part + 2 * part + 4 * heads * D * r)
    touched += e + part + y  # E C
    older = r * (r - 1) // 2  # columns before one, of all columns
    touched += (1 + 3) * (y + 4 * heads * n * older) + 3 * y + 2 * y  # `tall`
    return touched + e + y + 2 * part + stored  # E^T A
