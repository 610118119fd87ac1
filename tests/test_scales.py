"""Rotation and two-sided scales: the laws they obey, and the error that they lower."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from kvc.methods import Gear
from kvc.ops.codec import decode, encode, turn
from kvc.ops.quant import Role
from kvc.ops.residual import Seed
from kvc.ops.rotate import hadamard
from kvc.ops.scales import dual_scales
from tests.oracles import codes
from tests.oracles.checks import spiky
from tests.tolerances import TOLERANCES

H, D = 2, 32


@pytest.mark.parametrize("head_dim", [1, 8, 64, 80, 96])
def test_rotation_is_its_own_inverse(xp: ModuleType, head_dim: int) -> None:
    rtol, atol = TOLERANCES["float32"]
    x = np.random.default_rng(0).standard_normal((2, 3, 5, head_dim)).astype(np.float32)
    turned = hadamard(xp.from_numpy(x))
    np.testing.assert_allclose(
        xp.to_numpy(turned), x @ codes.hadamard(head_dim), rtol=rtol, atol=atol
    )
    np.testing.assert_allclose(xp.to_numpy(hadamard(turned)), x, rtol=rtol, atol=atol)


def test_no_rotation_returns_its_argument(xp: ModuleType) -> None:
    x = xp.from_numpy(np.ones((1, 2, 4, D), np.float16))
    assert turn(x, Gear().spec("k", 4, D)) is x


def test_scales_follow_their_rows_and_columns() -> None:
    x, rng = spiky(0, H, 40, D), np.random.default_rng(1)
    rows, columns = rng.permutation(40), rng.permutation(D)
    mu, r, c = dual_scales(x)
    moved = dual_scales(x[:, rows][..., columns])
    wanted = (mu[..., columns], r[:, rows], c[..., columns])
    rtol, atol = TOLERANCES["float64"]
    for got, want in zip(moved, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def test_a_constant_channel_scales_nothing_up(xp: ModuleType) -> None:
    """What rounding leaves of it in float32 must not reach the tokens' factors."""
    x = spiky(0, H, 48, D).astype(np.float32)
    x[:, 11] *= 50
    x[..., 7], x[..., 9] = 1234.567, 0.1
    got = [xp.to_numpy(part) for part in dual_scales(xp.from_numpy(x))]
    for head in range(H):
        mu, r, c = codes.dual_scales(x[head])
        np.testing.assert_allclose(got[0][head, 0], mu, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got[1][head, :, 0], r, rtol=1e-3)
        some = c > 1e-6
        np.testing.assert_allclose(got[2][head, 0, some], c[some], rtol=1e-3)


@pytest.mark.parametrize("role", ["k", "v"])
def test_rotation_and_dual_scales_lower_the_error(role: Role) -> None:
    """At 2 bits, on Gaussian numbers with outlier channels and outlier tokens."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 128, 128))
    x[..., :4] *= 10
    x[:, :, ::37] *= 3
    errors = []
    for more in ({}, {"rotate": "hadamard", "scales": "dual", "buffer": 128}):
        spec = Gear(**more).spec(role, 128, 128)  # type: ignore[arg-type]
        code = encode(x, spec, rank=0, outliers=0.0, n_iter=3, seed=Seed(0, 0, 0))
        errors.append(np.linalg.norm(turn(decode(code, spec), spec) - x))
    assert errors[1] < errors[0]
