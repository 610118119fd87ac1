"""GEAR's codes (arXiv:2403.05527): groups, grids, packing, rotation and two-sided scales."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest

from tests.oracles import codes, gear
from tests.oracles.checks import BACKBONES, CLOSE, SMALL, assert_close, draw


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("meta", [None, "float16"])
def test_quantization(backbone: str, role: codes.Role, bits: int, meta: str | None) -> None:
    """Half a step of error; minimum and maximum at the ends; the same codes a second time."""
    x = draw(0, 2, 16, 8)
    q = codes.quantize(x, role, backbone, bits, 8, meta)
    # A rounded step can fall short of the range by q_max times its rounding.
    slack = 0 if meta is None else 2**-10 * np.abs(x).max() * 2
    assert np.all(np.abs(x - codes.dequantize(q)) <= q.step / 2 + slack + CLOSE)
    if meta is None:
        for at in codes.groups(x.shape, role, backbone, 8):
            assert q.codes[at].ravel()[x[at].argmin()] == 0
            assert q.codes[at].ravel()[x[at].argmax()] == 2**bits - 1
    again = codes.quantize(codes.dequantize(q), role, backbone, bits, 8)
    if meta is None:
        assert np.array_equal(again.codes, q.codes)


@pytest.mark.parametrize(
    ("role", "backbone", "shared_by"),
    [
        ("k", "kivi", (1, 4, 1)),
        ("v", "kivi", (1, 1, 4)),
        ("k", "kcvt", (1, 8, 1)),
        ("v", "kcvt", (2, 1, 8)),
        ("k", "token", (1, 1, 4)),
        ("v", "token", (1, 1, 4)),
    ],
)
def test_groups_are_as_large_as_they_should(
    role: codes.Role, backbone: str, shared_by: tuple[int, int, int]
) -> None:
    """Each entry is in one group, and one group is a box of a known shape."""
    count = np.zeros((2, 8, 8), int)
    for at in codes.groups((2, 8, 8), role, backbone, 4):
        count[at] += 1
        assert count[at].size == np.prod(shared_by)
    assert np.all(count == 1)
    q = codes.quantize(draw(0, 2, 8, 8), role, backbone, 2, 4)
    box = tuple(slice(0, side) for side in shared_by)
    assert len(np.unique(q.step[box])) == 1


def test_step_is_taken_from_unrounded_extremes() -> None:
    """Minimum 1000.3 is stored as 1000.5 in fp16, the step is not: it comes from 3 exactly."""
    got, m, step = codes.quantize_group(np.array([1000.3, 1003.3]), 2, "float16")
    assert (m, step) == (1000.5, 1.0)
    assert got.tolist() == [0, 3]
    assert codes.quantize_group(np.array([1000.3, 1003.3]), 2, "float16", None)[1] == 1000.3


@pytest.mark.parametrize("x", [[5.0, 5.0], [1.0, 1.0 + 1e-8]])
def test_constant_groups(x: list[float]) -> None:
    """No step, or one which rounds to 0: codes 0 and the minimum."""
    got, m, step = codes.quantize_group(np.array(x), 2, "float16")
    assert (got.tolist(), m, step) == ([0, 0], x[0], 1.0)


def test_half_goes_to_even() -> None:
    """Halves of a step: 0.5 and 1.5 and 2.5 steps become 0, 2, 2."""
    assert codes.quantize_group(np.array([0, 0.5, 1.5, 2.5, 3]), 2)[0].tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", range(1, 34))
def test_pack_round_trip(bits: int, n: int) -> None:
    """Every remainder; rows are whole words; what is left over is 0."""
    row = np.random.default_rng(n).integers(0, 2**bits, n)
    words = codes.pack_row(row, bits)
    assert codes.unpack_row(words, bits, n) == row.tolist()
    assert len(words) == ceil(n * bits / 32) == codes.n_words(n, bits)
    assert codes.unpack_row(words, bits, len(words) * 32 // bits)[n:] == [0] * (
        len(words) * 32 // bits - n
    )


def test_pack_is_little_endian_and_by_role() -> None:
    """Element j at bits [j b, (j+1) b); K along tokens, V along channels."""
    assert codes.pack_row([1, 2, 3], 4) == [0x321]
    assert codes.pack_row([0] * 15 + [3, 1], 2) == [0xC0000000, 1]
    x = np.random.default_rng(0).integers(0, 4, (2, 20, 6))
    k, v = codes.pack(x, "k", 2), codes.pack(x, "v", 2)
    assert (k.shape, v.shape) == ((2, 6, 2), (2, 20, 1))
    assert np.array_equal(codes.unpack(k, "k", 2, 20), x)
    assert np.array_equal(codes.unpack(v, "v", 2, 6), x)


@pytest.mark.parametrize(("head_dim", "block"), [(1, 1), (8, 8), (64, 64), (96, 32), (80, 16)])
def test_hadamard(head_dim: int, block: int) -> None:
    """Orthonormal, symmetric, entries of one size inside its blocks."""
    turn = codes.hadamard(head_dim)
    assert_close(turn @ turn.T, np.eye(head_dim))
    assert np.array_equal(turn, turn.T)
    assert_close(np.abs(turn[:block, :block]), block**-0.5)
    assert np.count_nonzero(turn) == head_dim * block


def test_rotation_keeps_scores_and_the_lossless_limit() -> None:
    """Scores of rotated q and k are the same; at full rank nothing is lost."""
    q, x, turn = draw(0, 5, 16), draw(1, 2, 16, 16), codes.hadamard(16)
    assert_close((q @ turn) @ (x[0] @ turn).T, q @ x[0].T)
    for scales in (None, "dual"):
        s = replace(SMALL, rotate="hadamard", scales=scales, variant="gear_l")
        assert_close(gear.compress(x, "k", s, 16).x, x)
        assert_close(gear.compress(x, "v", replace(s, variant="gear", outliers=1.0), 2).x, x)


def test_dual_scales_balance_rows_and_columns() -> None:
    """Deviation 1 both ways; permuting rows or columns permutes r or c; scaling moves with c."""
    x = draw(0, 24, 16) * np.exp(draw(1, 16)) * np.exp(draw(2, 24, 1)) + draw(3, 16)
    mu, r, c = codes.dual_scales(x)
    z = (x - mu) / (r[:, None] * c)
    assert_close(np.std(z, axis=1), 1.0)
    # A row's deviation leaves its mean out, so that columns end at a common one, a little off 1.
    assert_close(np.std(z, axis=0), np.std(z[:, 0]), 1e-6)
    assert_close(np.std(z, axis=0), 1.0, 0.05)
    rows, columns = (
        np.random.default_rng(4).permutation(24),
        np.random.default_rng(5).permutation(16),
    )
    got = codes.dual_scales(x[rows][:, columns])
    for moved, expected in zip(got, (mu[columns], r[rows], c[columns]), strict=True):
        assert_close(moved, expected)
    # The running sum in log space, as the algorithm is told, where no floor is touched.
    log_r, log_c = np.zeros(24), np.zeros(16)
    for _ in range(16):
        log_c += np.log(np.std((x - mu) / np.exp(log_r[:, None] + log_c), axis=0))
        log_r += np.log(np.std((x - mu) / np.exp(log_r[:, None] + log_c), axis=1))
    assert_close(r, np.exp(log_r))
    assert_close(c, np.exp(log_c))


def test_fixed_grids() -> None:
    """Mid-rise and clipped: four levels at 2 bits, eight at 3."""
    got, levels = codes.grid_codes([-9, -0.6, -0.1, 0.1, 0.9, 1.1, 9], 2)
    assert got.tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert_close(levels, (got - 1.5) * 0.9957)
    assert_close(codes.grid_codes([-9, 9], 3)[1], [-3.5 * 0.586, 3.5 * 0.586])
    x = draw(0, 200, 8)
    chunk = codes.dual_quantize(x, 2)
    inside = np.abs((x - chunk.mu) / (chunk.r[:, None] * chunk.c)) < 2 * 0.9957
    error = np.abs(x - chunk.x) / (chunk.r[:, None] * chunk.c)
    assert np.all(error[inside] <= 0.9957 / 2 + CLOSE)
    # With factors of 1 it is the plain grid.
    rebuilt = replace(chunk, r=np.ones(200), c=np.ones(8), mu=np.zeros(8))
    assert np.array_equal(rebuilt.x, chunk.grid)


def test_dual_from_four_bits_is_min_max_per_channel() -> None:
    """The extremes of a channel of z are restored exactly."""
    x = draw(0, 32, 8)
    chunk = codes.dual_quantize(x, 4)
    z = (x - chunk.mu) / (chunk.r[:, None] * chunk.c)
    for d in range(8):
        for at in (z[:, d].argmin(), z[:, d].argmax()):
            assert_close(chunk.x[at, d], x[at, d])
    assert set(chunk.codes.ravel()) == set(range(16))


def test_dual_beats_groups_on_outlier_channels_and_tokens() -> None:
    """At 2 bits, 64 tokens: the reason for it. Tiles have scales of their own."""
    x = draw(0, 1, 64, 32) * np.exp(draw(1, 32)) * np.exp(0.7 * draw(2, 64, 1))
    plain = replace(SMALL, variant="quant", k_group=64, buffer=64)
    dual = replace(plain, scales="dual", rotate="hadamard")
    assert np.linalg.norm(gear.compress(x, "k", dual).x - x) < np.linalg.norm(
        gear.compress(x, "k", plain).x - x
    )
    tiled = gear.compress(x, "k", replace(plain, scales="dual", tile=32))
    alone = gear.compress(x[:, 32:], "k", replace(plain, scales="dual"))
    assert np.array_equal(tiled.x[:, 32:], alone.x)
