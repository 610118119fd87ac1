"""MiniCache's merge against its oracle, and what the paper's algorithm implies."""

from math import pi
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvc.errors import ConfigError
from kvc.ops.merge import (
    Merged,
    Thresholds,
    angle,
    merge_pair,
    restore,
    retained,
    slerp,
    thresholds,
)
from tests.oracles import minicache

B, H, T, D = 2, 3, 7, 6
RULES = ("angle", "cosine", "ratio", "literal", "none")


def draw(xp: ModuleType, *shape: int, seed: int = 0) -> Any:
    """Gaussian numbers; float64 in NumPy, float32 elsewhere."""
    return np.random.default_rng(seed).standard_normal(shape).astype(kind(xp))


def kind(xp: ModuleType) -> str:
    return "float64" if xp.name == "numpy" else "float32"


def close(xp: ModuleType, got: Any, want: Any, atol: float = 2e-6) -> None:
    atol = 1e-12 if xp.name == "numpy" else atol
    np.testing.assert_allclose(xp.to_numpy(got), want, rtol=0, atol=atol)


def odd_pairs(xp: ModuleType) -> tuple[Any, Any]:
    """Random pairs, among them zero, parallel, antipodal and equally long vectors."""
    xa, xb = draw(xp, B, H, T, D), draw(xp, B, H, T, D, seed=1)
    xa[0, 0, 1] = 0
    xb[0, 1, 2] = 0
    xa[0, 2, 3] = xb[0, 2, 3] = 0
    xa[1, 0, 0] = -2 * xb[1, 0, 0]
    xa[1, 1, 1] = 3 * xb[1, 1, 1]
    xa[1, 2, 2] = xb[1, 2, 2][::-1]
    return xa, xb


def merged(xp: ModuleType, xa: Any, xb: Any, *args: Any) -> Merged:
    return merge_pair(xp.from_numpy(xa), xp.from_numpy(xb), *args)


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("how", ["slerp", "mean", "max-norm"])
def test_merges_as_the_oracle(xp: ModuleType, how: Any, granularity: Any) -> None:
    xa, xb = odd_pairs(xp)
    got = merged(xp, xa, xb, 0.6, how, granularity)
    for b in range(B):
        want = minicache.merge_block(xa[b], xb[b], 0.6, how, granularity=granularity)
        e = want.e.reshape(T, H, D).swapaxes(0, 1)
        close(xp, got.e[b], e)
        close(xp, got.norm_a[b], want.norm_a.T)
        close(xp, got.norm_b[b], want.norm_b.T)
        close(xp, got.angle[b], want.angles.T)


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_norms_are_kept_and_directions_are_units(xp: ModuleType, granularity: Any) -> None:
    xa, xb = odd_pairs(xp)
    got = merged(xp, xa, xb, 0.3, "slerp", granularity)
    axes = (-1,) if granularity == "head" else (1, 3)
    close(xp, got.norm_a, norms(xa, axes))
    np.testing.assert_allclose(norms(xp.to_numpy(got.e), axes), 1, atol=1e-6)
    np.testing.assert_allclose(
        norms(xp.to_numpy(restore(got.e, got.norm_b)), axes), norms(xb, axes), atol=5e-6
    )


def norms(x: Any, axes: tuple[int, ...]) -> Any:
    n = np.sqrt((x**2).sum(axes))
    return n if axes == (-1,) else n[:, None]


@pytest.mark.parametrize("t", [0.0, 0.25, 0.6, 1.0])
def test_the_error_law(xp: ModuleType, t: float) -> None:
    xa, xb = draw(xp, B, H, T, D), draw(xp, B, H, T, D, seed=1)
    got = merged(xp, xa, xb, t)
    w = xp.to_numpy(got.angle)
    for x, norm, share in ((xa, got.norm_a, t), (xb, got.norm_b, 1 - t)):
        error = np.linalg.norm(xp.to_numpy(restore(got.e, norm)) - x, axis=-1)
        want = 2 * np.linalg.norm(x, axis=-1) * np.sin(share * w / 2)
        np.testing.assert_allclose(error, want, atol=5e-6)


@pytest.mark.parametrize("w", [0.0, 1e-6, 5e-4, 2e-3, 1.0, pi - 2e-3, pi - 5e-4, pi])
def test_angles_and_slerp_at_both_ends(xp: ModuleType, w: float) -> None:
    u, v = np.array([1.0, 0.0]), np.array([np.cos(w), np.sin(w)])
    ua, ub = (xp.from_numpy(x.astype(kind(xp))[None]) for x in (u, v))
    close(xp, angle(ua, ub), [w], atol=1e-6)
    wobble = 1e-4 if w > 3 else 2e-6  # dividing by a small sine
    close(xp, slerp(ua, ub, 0.6), [minicache.slerp(u, v, 0.6)], atol=wobble)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.29, 1.0])
@pytest.mark.parametrize("always_keep", [0, 2])
def test_retains_as_the_oracle(xp: ModuleType, rule: Any, gamma: float, always_keep: int) -> None:
    xa, xb = odd_pairs(xp)
    later_a, later_b = draw(xp, B, H, T, D, seed=2), draw(xp, B, H, T, D, seed=3)
    w = merged(xp, xa, xb, 0.6).angle
    later = merged(xp, later_a, later_b, 0.6).angle
    limits = thresholds(w, rule, gamma)
    own = xp.to_numpy(retained(w, rule, gamma, None, always_keep))
    frozen = xp.to_numpy(retained(later, rule, gamma, limits))
    for b in range(B):
        angles = xp.to_numpy(w)[b].T
        want = minicache.retained(angles, rule, gamma) | (angles > pi - minicache.EPS_ANTIPODAL)
        want |= np.arange(T)[:, None] < always_keep
        np.testing.assert_array_equal(own[b], want.T)
        known = minicache.thresholds(angles, rule, gamma)
        if np.isfinite(known.low):
            np.testing.assert_allclose(xp.to_numpy(limits.low)[b], known.low, atol=1e-6)
        np.testing.assert_allclose(xp.to_numpy(limits.high)[b], known.high, atol=1e-6)
        want_later = minicache.retained(xp.to_numpy(later)[b], rule, gamma, known)
        np.testing.assert_array_equal(frozen[b], want_later)


@pytest.mark.parametrize("rule", RULES)
def test_equal_angles(xp: ModuleType, rule: Any) -> None:
    w = xp.from_numpy(np.full((1, 2, 5), 0.7, kind(xp)))
    n = {"angle": 10, "cosine": 10, "ratio": 3, "literal": 0, "none": 0}[rule]
    got = xp.to_numpy(retained(w, rule, 0.29))
    assert got.sum() == n
    if rule == "ratio":  # the earlier: token 0 of both heads, then token 1 of the first
        assert np.argwhere(got[0].T).tolist() == [[0, 0], [0, 1], [1, 0]]


def test_gamma_one_retains_all_and_antipodal_is_always_retained(xp: ModuleType) -> None:
    w = np.random.default_rng(6).uniform(0, 3, (2, 3, 50)).astype(kind(xp))
    for rule in ("angle", "cosine", "ratio"):
        assert xp.to_numpy(retained(xp.from_numpy(w), rule, 1.0)).all()
    w[1, 2, 3] = pi
    never = Thresholds(xp.from_numpy(np.zeros(2, w.dtype)), xp.from_numpy(np.zeros(2, w.dtype)))
    for limits in (None, never):
        got = xp.to_numpy(retained(xp.from_numpy(w), "none", 0.05, limits))
        assert np.argwhere(got).tolist() == [[1, 2, 3]]


def test_heads_and_rows_do_not_meet(xp: ModuleType) -> None:
    xa, xb = odd_pairs(xp)
    whole = merged(xp, xa, xb, 0.6)
    turned = merged(xp, xa[::-1, [2, 0, 1]].copy(), xb[::-1, [2, 0, 1]].copy(), 0.6)
    for a, b in zip(whole, turned, strict=True):
        close(xp, b, xp.to_numpy(a)[::-1, [2, 0, 1]])


def test_half_precision_is_merged_in_single(xp: ModuleType) -> None:
    xa, xb = (draw(xp, B, H, T, D, seed=s).astype("float16") for s in (0, 1))
    got = merged(xp, xa, xb, 0.6)
    want = merged(xp, xa.astype("float32"), xb.astype("float32"), 0.6)
    assert xp.dtype_name(got.e) == xp.dtype_name(got.norm_a) == "float32"
    np.testing.assert_array_equal(xp.to_numpy(got.e), xp.to_numpy(want.e))


def test_unknown_names_are_refused() -> None:
    x: Any = np.ones((1, 1, 1, 2))
    bad: Any = "sum"
    with pytest.raises(ConfigError, match="merge: expected one of slerp"):
        merge_pair(x, x, 0.5, bad)
    with pytest.raises(ConfigError, match="granularity: expected one of head"):
        merge_pair(x, x, 0.5, "mean", bad)
    with pytest.raises(ConfigError, match="retention: expected one of angle"):
        retained(x[0], bad, 0.5)
