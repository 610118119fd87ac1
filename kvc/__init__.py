"""kvc: small KV caches for language models, on MLX and PyTorch."""

from kvc import errors
from kvc.api import load_engine, make_cache, presets, report
from kvc.methods import Gear, KVSharer, Method, parse

__all__ = [
    "Gear",
    "KVSharer",
    "Method",
    "errors",
    "load_engine",
    "make_cache",
    "parse",
    "presets",
    "report",
]
