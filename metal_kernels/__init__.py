"""Fused Metal kernels for MLX, one module and one shader per op."""

from __future__ import annotations

FUSED = frozenset(
    {
        "attend_coded",
        "attend_dense",
        "attend_state",
        "attention_mass",
        "encode",
        "fold_evicted",
        "join",
        "merge_pair",
        "quantize",
    }
)  # each is a module with `why_not` and `run`


def unavailable() -> str | None:
    """Why no kernel of this package can run here; None if they can."""
    import mlx.core as mx

    if not mx.metal.is_available():
        return "there is no Metal GPU"
    if mx.default_device() != mx.gpu:
        return "MLX's default device is the CPU"
    return None
