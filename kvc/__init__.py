"""kvc: small KV caches for language models, on MLX and PyTorch."""

from kvc.api import load_engine, make_cache, report
from kvc.errors import KVCError
from kvc.methods import PRESETS, Gear, KVSharer, Method, parse

__all__ = [
    "PRESETS",
    "Gear",
    "KVCError",
    "KVSharer",
    "Method",
    "load_engine",
    "make_cache",
    "parse",
    "report",
]
