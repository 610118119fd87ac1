"""The methods: frozen dataclasses whose fields are the hyper-parameters of the papers."""

from kvc.methods.base import Method, method_of
from kvc.methods.gear import Gear
from kvc.methods.kvsharer import KVSharer
from kvc.methods.less import Less
from kvc.methods.minicache import MiniCache
from kvc.methods.part import Part
from kvc.methods.presets import PRESETS, parse

__all__ = [
    "PRESETS",
    "Gear",
    "KVSharer",
    "Less",
    "Method",
    "MiniCache",
    "Part",
    "method_of",
    "parse",
]
