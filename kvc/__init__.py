"""kvc: small KV caches for language models, on MLX and PyTorch."""

from kvc import errors
from kvc.api import load_cache, load_engine, make_cache, presets, report, save_cache
from kvc.hub import load_artifact
from kvc.methods import Gear, KVSharer, Less, Method, MiniCache, parse
from kvc.version import __version__

__all__ = [
    "Gear",
    "KVSharer",
    "Less",
    "Method",
    "MiniCache",
    "__version__",
    "errors",
    "load_artifact",
    "load_cache",
    "load_engine",
    "make_cache",
    "parse",
    "presets",
    "report",
    "save_cache",
]
