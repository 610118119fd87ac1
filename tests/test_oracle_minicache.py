"""MiniCache's oracle (arXiv:2405.14366): directions, angles and what is retained."""

from math import acos, pi, sin

import numpy as np
import pytest

from tests.oracles import minicache
from tests.oracles.attention import Array
from tests.oracles.checks import assert_close, draw


def turned(x: Array, w: float, length: float, seed: int = 7) -> Array:
    """A vector of a given length, at angle w from x."""
    u = x / np.linalg.norm(x)
    other = draw(seed, len(x))
    other -= (other @ u) * u
    other /= np.linalg.norm(other)
    return np.asarray(length * (np.cos(w) * u + np.sin(w) * other))


@pytest.mark.parametrize("w", [1e-7, 5e-4, 2e-3, 0.1, 1.0, pi / 2, 3.0, pi - 2e-3])
@pytest.mark.parametrize("t", [0.0, 0.5, 0.6, 1.0])
def test_slerp(w: float, t: float) -> None:
    """Unit direction; norms kept; the error law; the ends; symmetry."""
    a = 3 * draw(0, 16)
    b = turned(a, w, 2.0)
    got = minicache.merge(a, b, t)
    assert_close(got.angle, w)
    assert_close(np.linalg.norm(got.e), 1)
    assert_close(got.norm_a * np.linalg.norm(got.e), np.linalg.norm(a))
    expected = minicache.relative_errors(w, t)
    assert_close(np.linalg.norm(a - got.norm_a * got.e) / got.norm_a, expected[0])
    assert_close(np.linalg.norm(b - got.norm_b * got.e) / got.norm_b, expected[1])
    assert_close(got.e, minicache.merge(b, a, 1 - t).e, 1e-9)
    if t in (0, 1):
        assert_close(got.e, (b if t else a) / np.linalg.norm(b if t else a), 1e-9)


def test_error_law_at_the_published_cosine() -> None:
    """Cosine 0.65, t = 0.6: 0.51 in the shallow layer, 0.34 in the deep one."""
    shallow, deep = minicache.relative_errors(acos(0.65), 0.6)
    assert f"{shallow:.2f} {deep:.2f}" == "0.51 0.34"
    assert shallow == 2 * sin(0.3 * acos(0.65))


def test_zero_antipodal_and_other_modes() -> None:
    """Directions where SLERP has none."""
    x, zero = draw(0, 8), np.zeros(8)
    unit = x / np.linalg.norm(x)
    for a, b in ((x, zero), (zero, x)):
        got = minicache.merge(a, b)
        assert_close(got.e, unit)
        assert got.angle == 0
        assert_close([got.norm_a, got.norm_b], [np.linalg.norm(a), np.linalg.norm(b)])
    assert minicache.merge(zero, zero).e.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    far = minicache.merge(x, -2 * x)
    assert far.antipodal
    assert_close(far.e, -unit)
    other = draw(1, 8)
    longer = 2 * other * np.linalg.norm(x) / np.linalg.norm(other)
    assert_close(minicache.merge(x, longer, how="max-norm").e, other / np.linalg.norm(other))
    assert_close(minicache.merge(longer, x, how="max-norm").e, other / np.linalg.norm(other))
    assert np.array_equal(minicache.merge([3.0, 4], [4.0, 3], how="max-norm").e, [0.8, 0.6])
    mean = minicache.merge(x, other, how="mean")
    assert (mean.norm_a, mean.norm_b) == (1, 1)
    assert_close(mean.e, (x + other) / 2)


def planted() -> tuple[Array, Array]:
    """Two layers [H=2, n=20, D=8], close but for (token 3, head 1), which is antipodal."""
    a = draw(0, 2, 20, 8)
    b = 1.5 * a + 0.3 * draw(1, 2, 20, 8)
    b[1, 3] = -a[1, 3]
    return a, b


@pytest.mark.parametrize("rule", ["angle", "cosine", "ratio", "literal", "none"])
def test_retention(rule: str) -> None:
    """What each rule keeps, by its definition over (token, head) entries."""
    a, b = planted()
    block = minicache.merge_block(a, b, rule=rule, gamma=0.1, always_keep=0)
    d = block.angles / pi
    assert block.angles.shape == (20, 2)
    assert_close(d[3, 1], 1)
    assert block.kept[3, 1]  # under every rule: an antipodal pair has no direction
    chosen = minicache.retained(block.angles, rule, 0.1)
    expected = {
        "angle": d >= d.max() - 0.1 * (d.max() - d.min()),
        "cosine": np.cos(pi * d) <= -1 + 0.1 * (np.cos(pi * d).max() + 1),
        "ratio": d >= np.sort(d.ravel())[-4],
        "literal": d < d.min() + 0.1 * (d.max() - d.min()),
        "none": np.zeros_like(d, bool),
    }[rule]
    assert np.array_equal(chosen, expected)
    for layer, x in (("a", a), ("b", b)):
        restored = minicache.restore(block, layer, 2)
        for t, h in np.argwhere(block.kept):
            assert np.array_equal(restored[h, t], x[h, t])
        norms = np.linalg.norm(restored, axis=2), np.linalg.norm(x, axis=2)
        assert_close(*norms)


def test_retention_of_equal_angles() -> None:
    """All, all, ceil(gamma n), none; and gamma = 1 keeps all in spite of rounding."""
    same = np.full((5, 2), 0.3)
    counts = [minicache.retained(same, rule, 0.05).sum() for rule in minicache.RULES]
    assert counts == [10, 10, 1, 0, 0]
    angles = np.array([2.0, 1.0, 1.4, 1.6]) * pi / 4  # half way: 1.5
    assert minicache.retained(angles, "angle", 0.5).tolist() == [True, False, False, True]
    assert minicache.retained(angles, "literal", 0.5).tolist() == [False, True, True, False]
    # Cosines 0, 0.707, 0.454, 0.309: up to 0.354.
    assert minicache.retained(angles, "cosine", 0.5).tolist() == [True, False, False, True]
    assert minicache.by_ratio([0.0] * 100, 0.07) == list(range(7))  # 0.07 * 100 > 7 in binary
    for seed in range(50):
        angles = np.random.default_rng(seed).uniform(0, pi, 30)
        assert minicache.retained(angles, "angle", 1.0).all()
        assert minicache.retained(angles, "cosine", 1.0).all()
    assert not minicache.retained(np.zeros((0, 2)), "angle", 0.05).size


def test_always_keep_and_token_granularity() -> None:
    """The first tokens are kept in all heads, and are compared; one vector may span the heads."""
    a, b = planted()
    block = minicache.merge_block(a, b, always_keep=2, gamma=0.05)
    plain = minicache.merge_block(a, b, always_keep=0, gamma=0.05)
    assert block.kept[:2].all()
    assert np.array_equal(block.kept[2:], plain.kept[2:])
    wide = minicache.merge_block(a, b, granularity="token", rule="none")
    assert wide.e.shape == (20, 1, 16)
    one = minicache.merge(a[:, 5].ravel(), b[:, 5].ravel())
    assert_close(minicache.restore(wide, "b", 2)[:, 5].ravel(), one.norm_b * one.e)


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_parallel_layers_restore_exactly(granularity: str) -> None:
    """x^a = c x^b, c > 0, for any t and gamma."""
    a = draw(0, 2, 6, 8)
    block = minicache.merge_block(a, 3 * a, t=0.3, rule="none", granularity=granularity)
    assert_close(minicache.restore(block, "a", 2), a)
    assert_close(minicache.restore(block, "b", 2), 3 * a)


def test_merging_commutes_with_rotation_of_both_layers() -> None:
    """As of rotary embeddings: merge(rot x) = rot merge(x)."""
    a, b, turn = draw(0, 1, 6, 8), draw(1, 1, 6, 8), np.linalg.qr(draw(2, 8, 8))[0]
    plain = minicache.merge_block(a, b)
    moved = minicache.merge_block(a @ turn, b @ turn)
    assert_close(moved.e, plain.e @ turn)
    assert_close(moved.angles, plain.angles)


def test_pairs() -> None:
    """From the middle on; an odd last layer stays alone."""
    assert minicache.pairs(8) == [(4, 5), (6, 7)]
    assert minicache.pairs(7) == [(3, 4), (5, 6)]
    assert minicache.pairs(8, 5) == [(5, 6)]
    assert minicache.pairs(8, 7) == minicache.pairs(1) == []
