"""The methods: frozen dataclasses whose fields are the hyper-parameters of the papers."""

from kvc.methods.base import PRESETS, Method, parse
from kvc.methods.gear import Gear
from kvc.methods.kvsharer import KVSharer

__all__ = ["PRESETS", "Gear", "KVSharer", "Method", "parse"]
