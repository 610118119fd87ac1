"""Settings of methods for short texts: lossy ones that compress them, and lossless limits."""

from __future__ import annotations

from typing import Any

FEW = {"less.heavy": 6, "less.recent": 6}
ALL = {"less.heavy": 200, "less.recent": 200}
_LOSSLESS: dict[str, dict[str, Any]] = {
    "none": {},
    "gear": {"gear.outliers": 1.0},
    "minicache": {"minicache.gamma": 1.0, "minicache.decode_policy": "keep"},
    "kvsharer": {"kvsharer.map": "0:0"},
    "h2o": ALL,
    "tova": {"less.heavy": 300},
    "streaming": {"less.recent": 300},
    "less": {**ALL, "less.kernels": "KERNELS"},
}
SHARED = {"kvsharer.map": "3:1"}
_LOSSY: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("kivi", "kcvt", "token", "gear-l", "gear-s", "gear")},
    "gear2": {"gear.sink": 4, "gear.window": 4},
    "streaming": {"less.recent": 8},
    "h2o": FEW,
    "tova": {"less.heavy": 10},
    "less": {**FEW, "less.kernels": "KERNELS"},
    "minicache": {},
    "minicache+gear": {},
    "h2o+token": FEW,
    "kvsharer": SHARED,
    "kvsharer+gear": SHARED,
}
_CODECS = {"kivi", "kcvt", "token", "gear-l", "gear-s", "gear", "gear2"}


def lossless(size: int) -> dict[str, dict[str, Any]]:
    """Limits at which nothing is lost, with groups and blocks of `size` in what codes."""
    return _in_groups(_LOSSLESS, size)


def lossy(size: int) -> dict[str, dict[str, Any]]:
    """Settings at which a few tokens are compressed already, with groups and blocks of `size`."""
    return _in_groups(_LOSSY, size)


def _in_groups(table: dict[str, dict[str, Any]], size: int) -> dict[str, dict[str, Any]]:
    groups = {"gear.group_size": size, "gear.buffer": size}
    return {
        name: {**groups, **given} if _CODECS & {*name.split("+")} else given
        for name, given in table.items()
    }
