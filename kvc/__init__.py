"""kvc: small KV caches for language models, on MLX and PyTorch."""

from kvc import errors
from kvc.api import make_cache, presets, report
from kvc.methods import parse

__all__ = ["errors", "make_cache", "parse", "presets", "report"]
