"""The join of partial answers in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kvc.metal_kernels.kernel import DTYPES, launch
from kvc.ops.attention import Partial

PARTS = 6  # stacks of answers in a launch
SIMDS = 4  # simdgroups that share the answers of a row


def why_not(
    parts: Sequence[Partial], *, sinks: mx.array | None = None, dtype: mx.Dtype | None = None
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    return why_not_answers(parts[0].out.shape[-1], parts, dtype)


def run(
    parts: Sequence[Partial], *, sinks: mx.array | None = None, dtype: mx.Dtype | None = None
) -> Partial:
    """As `kvc.ops.attention.join`; more answers than a launch takes are joined by several."""
    while len(parts) > PARTS:
        parts = [run(parts[:PARTS]), *parts[PARTS:]]
    alone = len(parts) == 1 and parts[0].out.ndim == 4
    if alone and sinks is None and dtype in (None, mx.float32):
        return parts[0]
    B, Hq, L, D = parts[0].out.shape[-4:]
    threads = 32 * SIMDS
    out, lse = launch(
        "join",
        inputs(parts, sinks),
        {"out": ((B, Hq, L, D), dtype or mx.float32), "lse": ((B, Hq, L), mx.float32)},
        template={"D": D, "SIMDS": SIMDS},
        grid=(threads * B * Hq * L, 1, 1),
        threadgroup=(threads, 1, 1),
        include=("softmax",),
    )
    return Partial(out, lse)


def why_not_answers(D: int, parts: Sequence[Partial], dtype: mx.Dtype | None) -> str | None:
    """Why kernels cannot join answers of D elements to one in `dtype`, or None."""
    if any(x.dtype != mx.float32 for part in parts for x in part):
        return "takes answers in float32"
    if dtype is not None and dtype not in DTYPES:
        return f"gives float16, bfloat16 or float32, not {dtype}"
    if D % 16 or not 16 <= D <= 256:
        return f"takes a head_dim that is a multiple of 16 up to 256, not {D}"
    return None


def inputs(parts: Sequence[Partial], sinks: mx.array | None) -> dict[str, mx.array | None]:
    """Answers as out0, lse0, out1, ..., [stack, B, Hq, L, D] and without D; all contiguous."""
    found = {"sinks": None if sinks is None else mx.contiguous(sinks)}
    for i, (out, lse) in enumerate(parts):
        found[f"out{i}"] = mx.contiguous(out if out.ndim == 5 else out[None])
        found[f"lse{i}"] = mx.contiguous(lse if lse.ndim == 4 else lse[None])
    return found
