"""Fused Triton kernels for PyTorch, one module per op."""

from __future__ import annotations

import os
from importlib.util import find_spec

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
    import torch

    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "there is no CUDA GPU"
