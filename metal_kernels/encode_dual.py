"""Two-sided scales: one launch, a tile of tokens in the registers of a threadgroup."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from kvc.metal_kernels.kernel import launch
from kvc.ops.codec import Code, Spec, decode
from kvc.ops.quant import n_words
from kvc.ops.scales import GRID_STEP, ROUNDS, Dual, dual_quantize

EACH = 8  # tokens of a simdgroup
TOKENS = 128  # of a tile, at most


def run(
    x: mx.array, spec: Spec, scale: mx.Dtype, zero: mx.Dtype, *, fit: bool
) -> tuple[Dual, mx.array | None]:
    """The codes of `dual_quantize`, and with `fit` what they leave of x [B, H, n, D], in float32.

    Tiles that are too large, or end amid a word, are left to MLX's own ops.
    """
    B, H, n, D = x.shape
    tile, per = min(spec.tile, n), 32 // spec.bits
    if tile > TOKENS or D % 16 or D > 256 or (tile < n and tile % per):
        code = dual_quantize(x, spec.bits, spec.role, spec.tile, scale, zero)
        rest = x.astype(mx.float32) - decode(Code(code, None, None), spec) if fit else None
        return code, rest
    grid_step = GRID_STEP.get(spec.bits)
    tiles = (B, H, math.ceil(n / tile), D)
    words = (D, n_words(n, spec.bits)) if spec.role == "k" else (n, n_words(D, spec.bits))
    outputs: dict[str, tuple[tuple[int, ...], Any]] = {
        "codes": ((B, H, *words), mx.uint32),
        "mu": (tiles, scale),
        "c": (tiles, scale),
        "r": ((B, H, n), scale),
    }
    if grid_step is None:
        outputs |= {"step": (tiles, scale), "low": (tiles, zero)}
    if fit:
        outputs["rest"] = (tuple(x.shape), mx.float32)
    simds = math.ceil(tile / EACH)
    found = launch(
        "encode_dual",
        {
            "x": x, "tile": tile, "rounds": ROUNDS, "grid_step": grid_step,
            "fit": 1 if fit else None,
        },
        outputs,
        template={
            "S": scale, "Z": zero, "BITS": spec.bits, "KEYS": spec.role == "k", "D": D,
        },
        grid=(tiles[2] * 32 * simds, B * H, 1),
        threadgroup=(32 * simds, 1, 1),
        include=("code_of", "tokens"),
    )  # fmt: skip
    named = dict(zip(outputs, found, strict=True))
    rest = named.pop("rest", None)
    return Dual(**{"step": None, "low": None, **named}), rest
