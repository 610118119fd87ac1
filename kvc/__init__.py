"""kvc: small KV caches for language models, on MLX and PyTorch."""

from kvc import errors
from kvc.api import load_engine, make_cache, presets, report
from kvc.methods import Gear, KVSharer, Less, Method, MiniCache, parse

__all__ = [
    "Gear",
    "KVSharer",
    "Less",
    "Method",
    "MiniCache",
    "errors",
    "load_engine",
    "make_cache",
    "parse",
    "presets",
    "report",
]
