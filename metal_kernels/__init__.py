"""Fused Metal kernels for MLX, one module and one shader per op."""

from types import ModuleType

FUSED: dict[str, ModuleType] = {}  # op name -> module with `why_not` and `run`
