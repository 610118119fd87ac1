"""Fused Triton kernels for PyTorch, one module per op."""

from __future__ import annotations

FUSED: frozenset[str] = frozenset()  # each is a module with `why_not` and `run`


def unavailable() -> str | None:
    """Why no kernel of this package can run here; None if they can."""
    import torch

    return None if torch.cuda.is_available() else "there is no CUDA GPU"
