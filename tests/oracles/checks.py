"""What the checks of the oracles share: draws and a comparison."""

import numpy as np

from tests.oracles import gear
from tests.oracles.attention import Array

CLOSE = 1e-10  # float64 against float64
BACKBONES = ("kivi", "kcvt", "token")
SMALL = gear.Settings(
    k_group=8, v_group=8, buffer=16, prefill_rank=4, rank=2, outliers=0.2, k_bits=2, v_bits=2
)


def draw(seed: int, *shape: int) -> Array:
    """Gaussian numbers."""
    return np.random.default_rng(seed).standard_normal(shape)


def assert_close(got: object, expected: object, atol: float = CLOSE) -> None:
    """Elementwise within atol, finite or not alike."""
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=0, atol=atol
    )


def spiky(seed: int, *shape: int) -> Array:
    """Gaussian numbers with a few wide channels and a few large entries."""
    x = draw(seed, *shape)
    x[..., :: shape[-1] // 2] *= 6
    return x + 8 * draw(seed + 1, *shape) * (draw(seed + 2, *shape) > 2.2)
