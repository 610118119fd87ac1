"""Fused CUDA kernels for PyTorch, one module per op."""

from types import ModuleType

FUSED: dict[str, ModuleType] = {}  # op name -> module with `why_not` and `run`
