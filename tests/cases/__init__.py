"""Cases of ops for the kernels of every backend: sizes, and inputs of those sizes in NumPy.

Each module has `CASES`, and `args(case)`, the inputs in float32 by the names of the op's arguments.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 4, 8, 16)  # query heads of a head of K and V
TOKENS = (1, 63, 64, 65, 100, 1000)


def label(case: Any) -> str:
    """A case's own fields that are not the default, as a name."""
    plain = type(case)()
    fields = [(name, getattr(case, name)) for name in case.__dataclass_fields__]
    return "-".join(f"{n}={x}" for n, x in fields if x != getattr(plain, n)) or "plain"


class Sized:
    """A case, named by its own fields that are not the default."""

    @property
    def id(self) -> str:
        return label(self)


def array(xp: ModuleType, x: np.ndarray[Any, Any], dtype: str) -> Any:
    """`x` as an array of a backend, rounded to `dtype`."""
    return xp.astype(xp.from_numpy(x), xp.dtype(dtype))


def view(xp: ModuleType, x: np.ndarray[Any, Any], dtype: str, axis: int) -> Any:
    """The same as part of a buffer that is longer along `axis`, NaN before and behind it."""
    room = [(8, 8) if i == axis else (0, 0) for i in range(x.ndim)]
    part = tuple(slice(8, -8) if i == axis else slice(None) for i in range(x.ndim))
    return array(xp, np.pad(x, room, constant_values=np.nan), dtype)[part]


def exact(xp: ModuleType, x: Any) -> np.ndarray[Any, Any]:
    """What an array holds, in float64."""
    return np.asarray(xp.to_numpy(x), np.float64)


def assert_close(name: str, got: Any, want: Any, tolerance: tuple[float, float]) -> None:
    """Fails where a number is off by more than `rtol` of it and `atol` of the largest one."""
    rtol, atol = tolerance
    finite = np.abs(want[np.isfinite(want)])
    largest = max(1.0, float(finite.max(initial=0)))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * largest, err_msg=name)
