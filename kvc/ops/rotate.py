"""Rotation of the channels, which spreads what one of them holds over all.

SAW-INT4 (2026, arXiv:2604.19157): q k^T = (q Hd) (k Hd)^T, as the matrix is orthogonal.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from kvc.backends.base import Array, ops_of


@lru_cache
def signs(head_dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The signs of Sylvester's Hadamard matrix, [head_dim, head_dim].

    Where head_dim is no power of two: blocks of the largest one that divides it, zeros elsewhere.
    """
    block = np.ones((1, 1), np.float32)
    while head_dim % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    matrix = np.kron(np.eye(head_dim // len(block), dtype=np.float32), block)
    matrix.flags.writeable = False  # one array for all callers
    return matrix


_uploaded: dict[tuple[str, str, int], Array] = {}


def _signs_beside(x: Array) -> Array:
    """The signs on the device of `x` [..., head_dim]; sent there once."""
    xp, size = ops_of(x), x.shape[-1]
    key = xp.name, str(getattr(x, "device", "")), size
    if key not in _uploaded:
        _uploaded[key] = xp.from_numpy(signs(size), x)
    return _uploaded[key]


def hadamard(x: Array) -> Array:
    """X Hd over the last axis; Hd is symmetric and orthogonal, so it is its own inverse.

    Shapes: x [..., head_dim]; the same comes back, in the type that sums are taken in.
    """
    xp = ops_of(x)
    x, size = xp.promote(x), x.shape[-1]
    turned = x @ xp.astype(_signs_beside(x), x.dtype)
    return turned * float(size & -size) ** -0.5
