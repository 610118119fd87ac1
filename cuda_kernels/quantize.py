"""Codes, step and low of a block in one reading of it, packed as they are made.

A program takes a tile [TOKENS, CHANNELS] of whole groups and whole words. Groups that no tile
holds, kcvt's keys above all, are walked through twice: for their range, then for their codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from kvc.cuda_kernels.launch import (
    TYPES,
    Traffic,
    Variant,
    off_device,
    off_types,
    type_name,
)
from kvc.cuda_kernels.quantize_kernel import sweep
from kvc.ops.quant import Backbone, Quantized, Role, n_words

TOKENS = 64  # of a tile, where groups run along tokens
ENTRIES = 4096  # of a tile, where groups run along channels
LONGEST = 256  # tokens of groups that no words end with
WIDEST = 16384  # channels of a tile
SHAPES: tuple[tuple[str, int, int, int, Role, Backbone, int], ...] = (  # one for every tiling
    ("keys", 8192, 128, 2, "k", "kivi", 64),
    ("keys", 8192, 256, 8, "k", "kivi", 32),
    ("long-groups", 8192, 128, 4, "k", "kivi", 128),
    ("odd-groups", 8000, 128, 2, "k", "kivi", 40),
    ("odd-groups", 8000, 80, 2, "v", "kivi", 40),
    ("kcvt-keys", 8192, 128, 4, "k", "kcvt", 64),
    ("token-keys", 8192, 128, 4, "k", "token", 64),
    ("token-keys", 8192, 256, 2, "k", "token", 64),
    ("values", 8192, 128, 2, "v", "kivi", 64),
    ("values", 8192, 256, 8, "v", "kivi", 64),
    ("values", 8192, 80, 4, "v", "kivi", 80),
    ("one-value", 1, 128, 2, "v", "kivi", 64),
    ("kcvt-values", 8192, 128, 4, "v", "kcvt", 64),
)


class Tiling(NamedTuple):
    """What a program takes."""

    along: bool  # whether groups run along tokens
    width: int  # channels that lie side by side
    group: int  # entries of a group
    span: int  # tokens
    walk: bool  # whether that is one group, taken a tile at a time
    spread: bool  # whether the groups of a tile are found one after the other
    tokens: int  # of a tile
    channels: int  # of a tile
    across: int  # of these in use
    groups: int  # in a tile

    @property
    def num_warps(self) -> int:
        """Warps of a program: 16 entries for each thread, 8 where it keeps more of them."""
        entries = self.tokens * self.channels * (2 if self.walk or self.spread else 1)
        return min(16, max(1, entries // 512))


def why_not(
    x: torch.Tensor,
    bits: int,
    role: Role,
    backbone: Backbone,
    group_size: int,
    scale: torch.dtype,
    zero: torch.dtype,
) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    reason = off_device(x) or off_types(x)
    for dtype in (scale, zero):
        if reason is None and dtype not in TYPES:
            reason = f"stores steps in float16, bfloat16 or float32, not {type_name(dtype)}"
    if reason is None and x.shape[3] % 16:
        reason = f"takes a head_dim that is a multiple of 16, not {x.shape[3]}"
    if reason is None and tiling(x.shape, bits, role, backbone, group_size) is None:
        reason = (
            f"takes groups of up to {LONGEST} tokens, or that fill whole words, not {group_size}"
        )
    return reason


def run(
    x: torch.Tensor,
    bits: int,
    role: Role,
    backbone: Backbone,
    group_size: int,
    scale: torch.dtype,
    zero: torch.dtype,
) -> Quantized:
    """The codes of `quantize`, from the kernel."""
    return code_block(x, bits, role, backbone, group_size, scale, zero)[0]


def code_block(
    x: torch.Tensor,
    bits: int,
    role: Role,
    backbone: Backbone,
    group_size: int,
    scale: torch.dtype,
    zero: torch.dtype,
    *,
    bounds: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    fit: bool = False,
) -> tuple[Quantized, torch.Tensor | None]:
    """The codes of a block, and with `fit` what they leave of it, 0 at outliers.

    Shapes: x [B, H, n, D]; bounds of outliers int32, keys [B, H, D, 4], values [B, n, 4]; mean,
    float32, what stands for them, [B, H, D] or [B, n]; the rest is float32 [B, H, n, D].
    """
    B, H, n, D = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    tile = tiling(x.shape, bits, role, backbone, group_size)
    assert tile is not None  # as why_not says
    planes, groups = H * D // tile.width, (n if tile.along else tile.width) // tile.group
    words = (D, n_words(n, bits)) if role == "k" else (n, n_words(D, bits))
    shape = (B, H, groups, 1, D) if tile.along else (B, planes, n, groups, 1)
    codes = x.new_empty((B, H, *words), dtype=torch.int32)
    step, low = x.new_empty(shape, dtype=scale), x.new_empty(shape, dtype=zero)
    rest = x.new_empty((B, H, n, D), dtype=torch.float32) if fit else None
    grid = (triton.cdiv(n, tile.span), triton.cdiv(tile.width, tile.across), B * planes)
    sweep[grid](
        x, codes, step, low, rest, bounds, mean, *x.stride()[:3], n, tile.span, groups,
        **constants(tile, H, D, bits, role), num_warps=tile.num_warps,
    )  # fmt: skip
    return Quantized(codes, step, low), rest


def constants(tile: Tiling, H: int, D: int, bits: int, role: Role) -> dict[str, Any]:
    """What `sweep` is compiled for."""
    return {
        "H": H, "D": D, "W": tile.width, "BITS": bits, "KEYS": role == "k",
        "ALONG": tile.along, "WALK": tile.walk, "SPREAD": tile.spread, "TOKENS": tile.tokens,
        "CHANNELS": tile.channels, "ACROSS": tile.across, "GROUPS": tile.groups,
    }  # fmt: skip


@lru_cache  # asked for several times by every call
def tiling(
    shape: tuple[int, ...], bits: int, role: Role, backbone: Backbone, group_size: int
) -> Tiling | None:
    """How a block [B, H, n, D] is cut up; None if words lie across groups that no tile holds."""
    _, H, n, D = shape
    per, width = 32 // bits, H * D if backbone == "kcvt" and role == "v" else D
    along = role == "k" and backbone != "token"
    group = (n if along else width) if backbone == "kcvt" else group_size
    whole = group & (group - 1) == 0  # a power of two: a tile is cut into such groups
    unit = math.lcm(group, per)  # entries of whole groups and whole words
    if along:
        channels = min(64, triton.next_power_of_2(D))
        if whole and group <= TOKENS:
            return Tiling(
                True, D, group, TOKENS, False, False, TOKENS, channels, channels, TOKENS // group
            )
        channels = min(16 if group == n else 32, channels)  # few programs have long groups
        if group % per == 0 or group == n:
            return Tiling(True, D, group, group, True, False, TOKENS, channels, channels, 1)
        if unit > LONGEST:
            return None
        tokens = triton.next_power_of_2(unit)
        return Tiling(True, D, group, unit, False, True, tokens, channels, channels, unit // group)
    if whole:
        across, groups = width, triton.next_power_of_2(width) // group
    elif role == "k" or group % per == 0:
        across, groups = group, 1
    else:
        across, groups = unit, unit // group
    channels = triton.next_power_of_2(across)
    if channels > WIDEST:
        return None
    tokens = min(max(1, ENTRIES // channels), triton.next_power_of_2(n))
    tokens = max(tokens, per if role == "k" else 1)
    spread = not whole and groups > 1
    return Tiling(False, width, group, tokens, False, spread, tokens, channels, across, groups)


def traffic(
    shape: tuple[int, ...],
    size: int,
    bits: int,
    role: Role,
    backbone: Backbone,
    group_size: int,
    *,
    scales: int = 0,
) -> Traffic:
    """With numbers of `size` bytes each, and steps and lows of `scales`, or else as many.

    A group that is walked is read twice.
    """
    B, H, n, D = shape
    tile = tiling(shape, bits, role, backbone, group_size)
    assert tile is not None
    x, steps = B * H * n * D, 2 * B * H * n * D // tile.group
    words = B * H * (D * n_words(n, bits) if role == "k" else n * n_words(D, bits))
    least = size * x + (scales or size) * steps + 4 * words
    return Traffic(least + (size * x if tile.walk else 0), least)


def variants() -> Iterator[Variant]:
    """Every way of cutting, with outliers and what is left."""
    for name, n, D, bits, role, backbone, group in SHAPES:
        for dtype in ("fp16", "fp32"):
            tile = tiling((1, 8, n, D), bits, role, backbone, group)
            assert tile is not None
            yield Variant(
                f"{name}-{bits}-{D}-{dtype}",
                sweep,
                {
                    **dict.fromkeys(("x", "step", "low"), f"*{dtype}:16"),
                    "codes": "*i32:16",
                    "rest": "*fp32:16",
                    "bounds": "*i32:16",
                    "mean": "*fp32:16",
                    **dict.fromkeys(("batch", "head", "token"), "i32:16"),
                    **dict.fromkeys(("n", "span", "groups"), "i32"),
                },
                constants(tile, 8, D, bits, role),
                tile.num_warps,
                3,
            )
