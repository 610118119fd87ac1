"""GEAR's oracle (arXiv:2403.05527): outliers, low rank and whole chunks."""

from dataclasses import replace

import numpy as np
import pytest

from tests.oracles import codes, gear
from tests.oracles.attention import Array
from tests.oracles.checks import BACKBONES, CLOSE, SMALL, assert_close, draw, spiky


def test_outlier_counts_are_decimal() -> None:
    """In binary 0.58 * 100 / 2 is 28.999..."""
    assert gear.outlier_count(0.58, 100) == 29
    assert gear.outlier_count(0.02, 1024) == 10
    assert gear.outlier_count(0.02, 4096) == 40
    assert gear.outlier_count(0.02, 99) == 0


def test_outliers_of_equal_values() -> None:
    """The earlier first; never one entry on both sides."""
    assert gear.outliers_of_row([1, 0, 0, 2, 2, 1], 1) == [1, 3]
    assert gear.outliers_of_row([7, 7, 7, 7], 1) == [0, 1]
    assert sorted(gear.outliers_of_row([7, 7, 7, 7], 2)) == [0, 1, 2, 3]


@pytest.mark.parametrize("role", ["k", "v"])
def test_outlier_rows(role: codes.Role) -> None:
    """Exactly 2 k per row, the extremes, and the fill is the mean of all entries."""
    x = draw(0, 2, 20, 6)
    mask, filled = gear.split_outliers(x, role, 0.4)
    per_row = mask.sum(axis=1) if role == "k" else mask.sum(axis=(0, 2))
    assert np.all(per_row == (8 if role == "k" else 4))
    row = x[0, :, 0] if role == "k" else x[:, 0].ravel()
    marked = mask[0, :, 0] if role == "k" else mask[:, 0].ravel()
    fill = filled[0, :, 0] if role == "k" else filled[:, 0].ravel()
    k = per_row.ravel()[0] // 2
    assert set(row[marked]) == set(np.sort(row)[:k]) | set(np.sort(row)[-k:])
    assert_close(fill[marked], row.mean())
    assert np.array_equal(fill[~marked], row[~marked])


def test_start_is_a_prefix_of_16_columns() -> None:
    """Ranks below 16 share their columns; roles and chunks do not."""
    s = gear.Settings(seed=5, layer=3)
    four, two = (gear.start(s, "k", 1, (2, 8), r) for r in (4, 2))
    assert np.array_equal(four[..., :2], two)
    expected = np.random.default_rng([5, 3, 1, 7]).standard_normal((2, 8, 16))[..., :4]
    assert np.array_equal(gear.start(s, "v", 7, (2, 8), 4), expected)
    wide = np.random.default_rng([5, 3, 0, 0]).standard_normal((2, 32, 20))
    assert np.array_equal(gear.start(s, "k", 0, (2, 32), 20), wide)


@pytest.mark.parametrize("n_iter", [1, 2, 3])
def test_power_iteration(n_iter: int) -> None:
    """A orthonormal, A C^T a projection of E: never worse than 0, better with more rank."""
    e, start = draw(0, 20, 12), draw(1, 12, 12)
    errors = [float(np.linalg.norm(e))]
    for rank in range(1, 13):
        a, c = gear.power_iteration(e, start[:, :rank], n_iter)
        assert_close(a.T @ a, np.eye(rank))
        assert_close(a @ c.T, a @ a.T @ e)
        errors.append(float(np.linalg.norm(e - a @ c.T)))
        assert gear.best_error(e, rank) - CLOSE <= errors[-1] <= errors[-2] * 1.01
    assert errors[-1] < CLOSE


def test_power_iteration_reaches_the_best() -> None:
    """Ten rounds, sigma_r / sigma_{r+1} = 1.5: within 1 % of the SVD."""
    u, v = np.linalg.qr(draw(0, 30, 10))[0], np.linalg.qr(draw(1, 10, 10))[0]
    e = u @ np.diag(1.5 ** -np.arange(10.0)) @ v.T
    a, c = gear.power_iteration(e, draw(2, 10, 3), 10)
    assert np.linalg.norm(e - a @ c.T) <= 1.01 * gear.best_error(e, 3)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("role", ["k", "v"])
def test_variants(backbone: str, role: codes.Role) -> None:
    """Switches are limits of one another, and each part lowers the error."""
    x = spiky(0, 2, 32, 16)

    def of(variant: str, **changes: object) -> gear.Chunk:
        settings = replace(SMALL, variant=variant, backbone=backbone, **changes)  # type: ignore[arg-type]
        return gear.compress(x, role, settings, rank=4)

    assert np.array_equal(of("gear", outliers=0.0).x, of("gear_l").x)
    assert np.array_equal(
        gear.compress(x, role, replace(SMALL, backbone=backbone), 0).x, of("gear_s").x
    )
    assert np.array_equal(of("gear_s", outliers=0.0).x, of("quant").x)
    assert_close(of("gear", outliers=1.0).x, x)
    full = gear.compress(x, role, replace(SMALL, backbone=backbone, variant="gear_l"), 99)
    assert full.rank == 16
    assert_close(full.x, x)
    errors = [np.linalg.norm(of(name).x - x) for name in ("gear", "gear_l", "quant")]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("scales", [None, "dual"])
def test_outliers_are_exact_and_the_rest_is_base_and_low_rank(
    role: codes.Role, scales: str | None
) -> None:
    """X^ = deq(Q) + A C^T + Delta, Delta at outliers only, as they are stored."""
    x = spiky(3, 2, 32, 16)
    chunk = gear.compress(x, role, replace(SMALL, cache="float16", meta="float16", scales=scales))
    for h in range(2):
        smooth = chunk.base[h] + chunk.a[h] @ chunk.c[h].T
        assert_close(chunk.x[h], smooth + chunk.delta[h])
    assert np.all(chunk.delta[~chunk.outlier] == 0)
    sought = x - chunk.base if scales else x
    assert np.array_equal(chunk.outlier, gear.split_outliers(sought, role, 0.2)[0])
    # Delta, not the value, is what was rounded to fp16.
    assert_close(chunk.x[chunk.outlier], x[chunk.outlier], 2**-11 * np.abs(chunk.delta).max())
    for part in (chunk.a, chunk.c, chunk.delta):
        assert np.array_equal(part, part.astype(np.float16))
    assert chunk.words is not None
    length = 32 if role == "k" else 16
    assert np.array_equal(codes.unpack(chunk.words, role, 2, length), chunk.codes)


def test_batch_rows_do_not_meet_and_heads_do_where_they_should() -> None:
    """Permuting tokens permutes V's chunk; permuting heads permutes K's, but for C0."""
    x = spiky(5, 3, 16, 16)
    s = replace(SMALL, variant="gear_s")
    turned = gear.compress(x[:, ::-1], "v", s).x[:, ::-1]
    assert_close(gear.compress(x, "v", s).x, turned)
    assert_close(gear.compress(x, "k", s).x[::-1], gear.compress(x[::-1], "k", s).x)


@pytest.mark.parametrize("backbone", ["kcvt", "token"])
@pytest.mark.parametrize("scales", [None, "dual"])
@pytest.mark.parametrize(
    "x", [np.full((1, 1, 8), 0.1), np.full((2, 16, 8), 0.1), np.zeros((1, 3, 8))]
)
def test_constant_and_tiny_chunks_are_finite(backbone: str, scales: str | None, x: Array) -> None:
    """No division by 0; a constant is restored."""
    for bits in (2, 4):
        for role in ("k", "v"):
            s = replace(SMALL, backbone=backbone, scales=scales, k_bits=bits, v_bits=bits)
            assert_close(gear.compress(x, role, s).x, x, 1e-7)
            half = replace(s, meta="float16", cache="float16")  # where 1e-8 is stored as 0
            assert_close(gear.compress(x, role, half).x, x, 1e-4)


def test_chunk_too_short_for_key_outliers() -> None:
    """Fewer than 2 / s tokens: gear equals gear_l for K."""
    x, s = spiky(0, 2, 16, 16), replace(SMALL, outliers=0.1)
    pair = [gear.compress(x, "k", replace(s, variant=name)) for name in ("gear", "gear_l")]
    assert np.array_equal(pair[0].x, pair[1].x)
