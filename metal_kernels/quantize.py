"""Codes, step and low of a block in one reading of it, packed as they are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from kvc.metal_kernels.kernel import DTYPES, launch
from kvc.ops.quant import Backbone, Quantized, Role, n_words

TILE = 16896  # bytes of a threadgroup's tile: 64 lines of 128 numbers of 16 bits, and their padding
GROUPS = 512  # groups of a tile
THREADS = 256


class Tiling(NamedTuple):
    """How much a threadgroup takes, in entries."""

    lines: int  # channels, where groups run along tokens; else tokens
    span: int  # of each line
    piece: int  # of the span, as much as the tile holds at a time


def why_not(
    x: mx.array, bits: int, role: Role, backbone: Backbone, group_size: int, scale: Any, zero: Any
) -> str | None:
    """Why the kernel cannot take these arguments; None if it can."""
    if not {x.dtype, scale, zero} <= set(DTYPES):
        return "takes float16, bfloat16 and float32"
    return unfit(x.shape, x.itemsize, bits, role, backbone, group_size)


def unfit(
    shape: Sequence[int], itemsize: int, bits: int, role: Role, backbone: Backbone, group_size: int
) -> str | None:
    """Why no tile can hold a block of this shape; None if one can."""
    if shape[3] % 16:
        return f"takes a head_dim that is a multiple of 16, got {shape[3]}"
    if tiling(shape, itemsize, bits, role, backbone, group_size) is None:
        return f"takes groups that fill whole words within {TILE} bytes, got {group_size} entries"
    return None


def run(
    x: mx.array, bits: int, role: Role, backbone: Backbone, group_size: int, scale: Any, zero: Any
) -> Quantized:
    """The codes of `quantize`, from the kernel."""
    return sweep(x, bits, role, backbone, group_size, scale, zero)[0]


def sweep(
    x: mx.array,
    bits: int,
    role: Role,
    backbone: Backbone,
    group_size: int,
    scale: Any,
    zero: Any,
    *,
    index: mx.array | None = None,
    mean: mx.array | None = None,
    fit: bool = False,
) -> tuple[Quantized, mx.array | None]:
    """The codes of a block, and with `fit` what they leave of it, 0 at outliers.

    Shapes: x [B, H, n, D]; index, the places of outliers in ascending order, keys [B, H, D, m] and
    values [B, n, m]; mean, which stands for them, [B, H, D] and [B, n]; the rest is float32
    [B, H, n, D].
    """
    B, H, n, D = x.shape
    along, width, group = layout(x.shape, role, backbone, group_size)
    size = tiling(x.shape, x.itemsize, bits, role, backbone, group_size)
    assert size is not None  # as why_not says
    planes = H * D // width
    words = (D, n_words(n, bits)) if role == "k" else (n, n_words(D, bits))
    scales = (B, H, n // group, 1, D) if along else (B, planes, n, width // group, 1)
    length, across = (n, width) if along else (width, n)
    outputs: dict[str, tuple[tuple[int, ...], Any]] = {
        "codes": ((B, H, *words), mx.uint32),
        "step": (scales, scale),
        "low": (scales, zero),
    }
    if fit:
        outputs["rest"] = (tuple(x.shape), mx.float32)
    inputs = {
        "x": x, "width": width, "group": group, **size._asdict(),
        "index": index, "mean": mean, "fit": 1 if fit else None,
    }  # fmt: skip
    codes, step, low, *rest = launch(
        "quantize",
        inputs,
        outputs,
        template={
            "T": x.dtype, "S": scale, "Z": zero, "BITS": bits, "KEYS": role == "k", "ALONG": along,
            "TILE": TILE, "GROUPS": GROUPS,
        },
        grid=(
            math.ceil(across / size.lines) * THREADS, math.ceil(length / size.span), B * planes,
        ),
        threadgroup=(THREADS, 1, 1),
        include=("tokens", "code_of"),
    )  # fmt: skip
    return Quantized(codes, step, low), rest[0] if rest else None


def layout(
    shape: Sequence[int], role: Role, backbone: Backbone, group_size: int
) -> tuple[bool, int, int]:
    """Whether groups run along tokens, channels that lie side by side, and a group's entries."""
    _, H, n, D = shape
    if backbone == "kcvt":
        return (True, D, n) if role == "k" else (False, H * D, H * D)
    return role == "k" and backbone == "kivi", D, group_size


def tiling(
    shape: Sequence[int], itemsize: int, bits: int, role: Role, backbone: Backbone, group_size: int
) -> Tiling | None:
    """What a threadgroup takes of x, None if groups and words do not fit in one.

    A tile has whole groups, whole words and whole reads of 16 bytes, or all there is of a line.
    """
    n, per = shape[2], 32 // bits
    along, width, group = layout(shape, role, backbone, group_size)
    length, across = (n, width) if along else (width, n)
    room, pad = TILE // itemsize, 4 // itemsize  # numbers, and those between lines
    unit = math.lcm(group, per if along else 16)
    unit = length if unit >= length else unit
    least = min(across, 16 // itemsize if along else per if role == "k" else 1)  # lines
    if least * (unit + pad) > room:  # too long: a piece at a time
        if group != length:
            return None
        lines = min(across, 64)
        return Tiling(lines, length, (room // lines - pad) // 16 * 16)
    span = unit * max(1, min(length, 128) // unit)
    lines = min(across, room // (span + pad), GROUPS * group // span)
    if lines < least:
        return None
    return Tiling(lines if lines == across else lines // least * least, span, span)
