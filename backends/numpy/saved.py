"""NumPy's arrays as the numbers of a cache file, and back; see `kvc.store.archive.Library`."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvc.errors import CacheFileError

Array = np.ndarray[Any, Any]


def raw(x: Array) -> Array:
    """The numbers of an array."""
    return x


def array(x: Array, dtype: str, like: Any = None) -> Array:
    """An array of such numbers, which are no bfloat16."""
    if dtype == "bfloat16":
        raise CacheFileError("numpy: expected numbers that it has, got bfloat16")
    return x
