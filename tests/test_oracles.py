"""The oracles' own checks: what the papers' algorithms imply, and figures worked out by hand.

GEAR arXiv:2403.05527, LESS arXiv:2402.09398, MiniCache arXiv:2405.14366, KVSharer
arXiv:2410.18517. Only an oracle that passes these is fit to judge the library.
"""

import ast
from collections.abc import Iterable
from dataclasses import replace
from math import acos, ceil, pi, sin
from pathlib import Path

import numpy as np
import pytest

from tests.oracles import (
    attention,
    codes,
    gear,
    gear_cache,
    kvsharer,
    less,
    less_features,
    minicache,
    minicache_cache,
)
from tests.oracles.attention import Array

CLOSE = 1e-10  # float64 against float64
BACKBONES = ("kivi", "kcvt", "token")


def draw(seed: int, *shape: int) -> Array:
    """Gaussian numbers."""
    return np.random.default_rng(seed).standard_normal(shape)


def assert_close(got: object, expected: object, atol: float = CLOSE) -> None:
    """Elementwise within atol, finite or not alike."""
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=0, atol=atol
    )


def test_oracles_import_nothing_of_the_library() -> None:
    """The independent truth stands on NumPy and itself alone."""
    for path in (Path(__file__).parent / "oracles").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not [name for name in names if name.split(".")[0] == "kvc"], path


# Attention


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_join_of_disjoint_sets_is_attention_over_all(softcap: float | None) -> None:
    """Halves, an empty set and the sinks, joined, are the whole."""
    q, k, v, sinks = draw(0, 4, 3, 8), draw(1, 2, 7, 8), draw(2, 2, 7, 5), draw(3, 4)
    whole = attention.attend(q, k, v, softcap=softcap, sinks=sinks)
    parts = [
        attention.attend(q, k[:, a:b], v[:, a:b], softcap=softcap)
        for a, b in ((0, 3), (3, 3), (3, 7))
    ]
    joined = attention.join([*parts, attention.sink_partial(sinks, 3, 5)])
    assert_close(joined.out, whole.out)
    assert_close(joined.lse, whole.lse)


def test_attention_by_hand() -> None:
    """Two keys with logits 0 and log 3: weights 1/4 and 3/4, denominator 4."""
    q, k = np.array([[[1.0]]]), np.array([[[0.0], [np.log(3)]]])
    v = np.array([[[4.0], [8.0]]])
    got = attention.attend(q, k, v)
    assert_close(got.out, [[[7.0]]])
    assert_close(got.lse, [[np.log(4)]])
    with_sink = attention.attend(q, k, v, sinks=[np.log(4)])
    assert_close(with_sink.out, [[[3.5]]])
    capped = attention.attend(q, k, v, softcap=2.0).lse
    assert_close(capped, [[np.log(1 + np.exp(2 * np.tanh(np.log(3) / 2)))]])


def test_causal_is_every_query_alone_over_its_own_past() -> None:
    """With more keys than queries, the last query sees all keys."""
    q, k, v = draw(0, 4, 3, 8), draw(1, 2, 7, 8), draw(2, 2, 7, 8)
    whole = attention.attend(q, k, v, causal=True)
    for l in range(3):
        alone = attention.attend(q[:, l : l + 1], k[:, : 5 + l], v[:, : 5 + l])
        assert_close(whole.out[:, l], alone.out[:, 0])
        assert_close(whole.lse[:, l], alone.lse[:, 0])


def test_grouped_heads_are_repeated_key_heads() -> None:
    """Query head j reads key head j // G."""
    q, k, v = draw(0, 6, 2, 8), draw(1, 2, 5, 8), draw(2, 2, 5, 8)
    repeated = attention.attend(q, np.repeat(k, 3, axis=0), np.repeat(v, 3, axis=0))
    assert_close(attention.attend(q, k, v).out, repeated.out)


def test_attention_mass() -> None:
    """Every query gives one unit; the given denominator is honoured."""
    q, k = draw(0, 4, 5, 8), draw(1, 2, 5, 8)
    mass = attention.attention_mass(q, k, causal=True)
    assert_close(mass.sum(axis=1), [10, 10])
    p = attention.probs(q, k, causal=True)
    assert_close(mass[1], p[2:].sum(axis=(0, 1)))
    lse = attention.attend(q, k, k).lse
    halves = [attention.attention_mass(q, k[:, a:b], lse=lse) for a, b in ((0, 2), (2, 5))]
    assert_close(np.concatenate(halves, axis=1), attention.attention_mass(q, k))


# GEAR: codes


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


# GEAR: outliers and low rank


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


# GEAR: chunks

SMALL = gear.Settings(
    k_group=8, v_group=8, buffer=16, prefill_rank=4, rank=2, outliers=0.2, k_bits=2, v_bits=2
)


def spiky(seed: int, *shape: int) -> Array:
    """Gaussian numbers with a few wide channels and a few large entries."""
    x = draw(seed, *shape)
    x[..., :: shape[-1] // 2] *= 6
    return x + 8 * draw(seed + 1, *shape) * (draw(seed + 2, *shape) > 2.2)


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


# GEAR: rotation and two-sided scales


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


# GEAR: the streaming cache


def stream(s: gear.Settings, prompt: int, steps: int, seed: int = 0) -> gear_cache.GearCache:
    """A cache after a prompt and some steps."""
    k, v = spiky(seed, 2, prompt + steps, 16), spiky(seed + 9, 2, prompt + steps, 16)
    q = draw(seed + 20, 4, prompt + steps, 16)
    cache = gear_cache.GearCache(s)
    if prompt:
        cache.prefill(k[:, :prompt], v[:, :prompt])
    for t in range(prompt, prompt + steps):
        cache.step(k[:, t], v[:, t], q[:, t])
    return cache


@pytest.mark.parametrize("prompt", [0, 1, 15, 16, 17, 33])
def test_chunk_policy(prompt: int) -> None:
    """One prompt chunk of whole buffers at r_p, then one per filled buffer at r_d."""
    cache = stream(SMALL, prompt, 20)
    first = prompt // 16 * 16
    n_later = (prompt + 20 - first) // 16
    expected = ([first] if first else []) + [16] * n_later
    ranks = ([4] if first else []) + [2] * n_later
    for role, exact, read in (("k", cache.k, cache.keys()), ("v", cache.v, cache.values())):
        chunks = cache.chunks(role)  # type: ignore[arg-type]
        assert [chunk.n for chunk in chunks] == expected
        assert [chunk.rank for chunk in chunks] == ranks
        assert cache.dense(role) == (prompt + 20) % 16  # type: ignore[arg-type]
        at = 0
        for index, (n, rank) in enumerate(zip(expected, ranks, strict=True)):
            alone = gear.compress(exact[:, at : at + n], role, SMALL, rank, index)  # type: ignore[arg-type]
            assert np.array_equal(read[:, at : at + n], alone.x)
            at += n
        assert np.array_equal(read[:, at:], exact[:, at:])


def test_steps_are_exact_until_the_buffer_has_been_full() -> None:
    """The step that fills the buffer still attends at full precision; the next one does not."""
    k, v, q = spiky(0, 2, 17, 16), spiky(9, 2, 17, 16), draw(2, 4, 17, 16)
    cache = gear_cache.GearCache(SMALL)
    prompt_out = cache.prefill(k[:, :10], v[:, :10], q[:, :10])
    whole = attention.attend(q, k, v, causal=True).out
    assert prompt_out is not None
    assert_close(prompt_out, whole[:, :10])
    for t in range(10, 17):
        out = cache.step(k[:, t], v[:, t], q[:, t])
        assert (np.abs(out - whole[:, t]).max() < CLOSE) == (t < 16)


def test_lossless_settings_are_exact_attention() -> None:
    """All entries outliers, or full rank."""
    k, v, q = spiky(0, 2, 40, 16), spiky(9, 2, 40, 16), draw(2, 4, 40, 16)
    whole = attention.attend(q, k, v, causal=True).out
    every = replace(SMALL, outliers=1.0)
    full = replace(SMALL, variant="gear_l", prefill_rank=16, rank=16, rotate="hadamard")
    for s in (every, full, replace(every, scales="dual", sink=3, window=5)):
        cache = gear_cache.GearCache(s)
        cache.prefill(k[:, :20], v[:, :20])
        for t in range(20, 40):
            assert_close(cache.step(k[:, t], v[:, t], q[:, t]), whole[:, t])
        assert cache.compressed("k") >= 16


def test_sink_and_window() -> None:
    """The first and the newest tokens stay as they came, between chunks of n_b."""
    s = replace(SMALL, sink=3, window=5)
    for prompt, steps in ((23, 0), (24, 0), (8, 16), (2, 38), (0, 24)):
        cache = stream(s, prompt, steps)
        n = prompt + steps
        assert cache.compressed("k") == cache.compressed("v") == max(0, n - 8) // 16 * 16
        assert np.array_equal(cache.keys()[:, :3], cache.k[:, :3])
        assert np.array_equal(cache.values()[:, n - 5 :], cache.v[:, n - 5 :])


def test_sliding_value_window() -> None:
    """The last n_b values exact; K in chunks as ever; quantized values as in chunk mode."""
    s = replace(SMALL, variant="quant", value_window="sliding")
    for prompt, steps in ((0, 10), (0, 20), (20, 7), (40, 9)):
        cache = stream(s, prompt, steps)
        n = prompt + steps
        assert cache.dense("v") == min(n, 16)
        assert cache.compressed("k") == n // 16 * 16
        coded = cache.compressed("v")
        assert np.array_equal(cache.values()[:, coded:], cache.v[:, coded:])
        if coded:
            once = gear.compress(cache.v[:, :coded], "v", s).x
            assert np.array_equal(cache.values()[:, :coded], once)
    with pytest.raises(ValueError, match="low-rank"):
        replace(s, variant="gear_l")
    with pytest.raises(ValueError, match="buffer"):
        replace(SMALL, buffer=12)


# GEAR: bytes

LLAMA = gear.Settings(variant="gear", buffer=1024)  # with H = 32, D = 128


def llama_bytes(s: gear.Settings, n: int, rank: int) -> dict[str, int]:
    """One chunk, no dense tokens."""
    return gear_cache.cache_bytes(32, 128, s, [(n, rank)], [(n, rank)], 0, 0)


def test_gear_bytes_by_hand() -> None:
    """2 bits, g = 64, 1024 tokens, rank 4, 2 % outliers, all in fp16."""
    got = llama_bytes(LLAMA, 1024, 4)
    assert got == {
        "codes": 2_097_152,
        "k_meta": 262_144,
        "v_meta": 262_144,
        "lowrank": 589_824,
        "sparse": 2 * 327_680,
        "buffer": 0,
    }
    full = 2 * 32 * 128 * 1024 * 2
    assert full == 16_777_216
    ratios = [
        sum(llama_bytes(replace(LLAMA, variant=v), 1024, 4).values()) / full
        for v in ("quant", "gear_l", "gear")
    ]
    assert [f"{100 * ratio:.2f}" for ratio in ratios] == ["15.62", "19.14", "23.05"]
    later = llama_bytes(LLAMA, 64, 2)["lowrank"]
    assert later == 49_152
    assert f"{100 * later / (full / 16):.2f}" == "4.69"


def test_packed_rows_are_whole_words() -> None:
    """Keys of kcvt, 20 tokens at 2 bits: 40 bits a row are two words."""
    s = replace(LLAMA, backbone="kcvt", buffer=20)
    assert gear_cache.role_bytes("k", 20, 32, 128, s, 0)["codes"] == 32_768
    assert gear_cache.role_bytes("v", 20, 32, 128, s, 0)["codes"] == 20_480
    assert gear_cache.role_bytes("k", 20, 32, 128, s, 0)["meta"] == 2 * 2 * 32 * 128
    assert gear_cache.role_bytes("v", 20, 32, 128, s, 0)["meta"] == 2 * 2 * 20
    assert gear_cache.role_bytes("v", 20, 32, 128, s, 0, ez=4)["meta"] == 6 * 20
    wide = gear_cache.role_bytes("v", 20, 513, 128, s, 0)["sparse"]
    assert wide == 20 * 2 * gear.outlier_count(0.02, 513 * 128) * 6


def test_dual_bytes() -> None:
    """(T + 2 D) es per head, tile and tensor."""
    s = replace(LLAMA, scales="dual", tile=128, k_bits=4)
    assert gear_cache.role_bytes("v", 128, 1, 128, s, 0)["meta"] == 3 * 128 * 2
    assert gear_cache.role_bytes("v", 256, 1, 128, s, 0)["meta"] == 2 * 3 * 128 * 2
    assert gear_cache.role_bytes("k", 128, 1, 128, s, 0)["meta"] == 5 * 128 * 2
    # 2.375 bits per element at 128 x 128 tiles.
    part = gear_cache.role_bytes("v", 128, 1, 128, replace(s, variant="quant"), 0)
    assert 8 * sum(part.values()) / 128**2 == 2.375


@pytest.mark.parametrize("changes", [{}, {"sink": 2, "window": 3}, {"backbone": "kcvt"}])
def test_bytes_are_the_sizes_of_what_is_held(changes: dict[str, object]) -> None:
    """The formula against the arrays of a cache."""
    cache = stream(replace(SMALL, **changes), 35, 20)  # type: ignore[arg-type]
    chunks = cache.k_chunks + cache.v_chunks
    got = gear_cache.nbytes(cache)
    assert got["codes"] == sum(c.words.nbytes for c in chunks if c.words is not None)
    assert got["lowrank"] == sum(2 * (c.a.size + c.c.size) for c in chunks)
    assert got["sparse"] == sum(4 * int(c.outlier.sum()) for c in chunks)
    assert got["buffer"] == 2 * 2 * 16 * (cache.dense("k") + cache.dense("v"))
    meta = 0
    for chunk in chunks:
        backbone = str(changes.get("backbone", "kivi"))
        meta += 4 * len(list(codes.groups(chunk.codes.shape, chunk.role, backbone, 8)))
    assert got["k_meta"] + got["v_meta"] == meta
    held = gear_cache.nbytes(cache, allocated=True)["buffer"]
    assert held == 2 * 2 * 2 * 16 * (16 + cache.settings.sink + cache.settings.window)


# LESS


def run_less(
    policy: str,
    features: less_features.Features | None,
    prompt: int = 9,
    n: int = 16,
    heavy: int = 3,
    recent: int = 2,
    **options: object,
) -> tuple[less.LessCache, list[Array], tuple[Array, Array, Array]]:
    """A cache after a prompt and steps, with its outputs and inputs: 4 query heads on 2."""
    q, k, v = 2 * draw(0, 4, n, 8), draw(1, 2, n, 8), draw(2, 2, n, 8)
    cache = less.LessCache(policy, heavy, recent, features, **options)  # type: ignore[arg-type]
    outs = list(cache.prefill(q[:, :prompt], k[:, :prompt], v[:, :prompt]).swapaxes(0, 1))
    outs += [cache.step(q[:, t], k[:, t], v[:, t]) for t in range(prompt, n)]
    return cache, outs, (q, k, v)


WEIGHTS = less_features.random_weights(4, 2, 8, 16, 4, s1=0.5, s2=0.3)


def test_gelu_and_features() -> None:
    """GELU(1) = Phi(1); features are never negative; s1 = 0 turns psi off."""
    assert_close(
        less_features.gelu([0.0, 1.0, -1.0]), [0, 0.8413447460685429, -0.15865525393145707]
    )
    q, k = draw(0, 8), draw(1, 8)
    assert np.all(WEIGHTS.phi(3, q) >= 0)
    assert np.all(WEIGHTS.psi(1, k) >= 0)
    assert WEIGHTS.rank == 4
    one = np.ones((1, 1))
    g = less_features.gelu(less_features.gelu(1.0))
    assert_close(less_features.phi(np.ones(1), one, one), [g])
    # u = |s1| g, then |u + 3 u s2|.
    by_hand = less_features.psi(np.ones(1), one, one, 3 * one, np.array([-0.5]), np.array([-2.0]))
    assert_close(by_hand, [2.5 * g])
    assert np.all(replace(WEIGHTS, s1=np.zeros((2, 4))).psi(1, k) == 0)


def test_combined_attention() -> None:
    """The stable form is the naive one; logits far out do no harm; it is not shift-invariant."""
    q, keys, values, state = draw(0, 8), draw(1, 5, 8), draw(2, 5, 8), draw(3, 4, 8)
    norm, features = np.abs(draw(4, 4)), np.abs(draw(5, 4))
    weights = np.exp(keys @ q / np.sqrt(8))
    naive = (weights @ values + features @ state) / (weights.sum() + features @ norm)
    got = less.combine(q, keys, values, state, norm, features)
    assert_close(got.out, naive)
    assert_close(got.lse, np.log(weights.sum() + features @ norm))
    far = less.combine(q, keys - 1e5 * q, values, state, norm, features)
    assert_close(far.out, features @ state / (features @ norm))
    near = less.combine(q, keys + 1e5 * q, values, state, norm, features)
    assert_close(near.out, less.combine(q, keys, values, 0 * state, 0 * norm, features).out, 1e-6)
    none = less.combine(q, keys, values, state, norm, np.zeros(4))
    assert_close(none.out, attention.attend(q[None, None], keys[None], values[None]).out[0, 0])


@pytest.mark.parametrize("policy", less.POLICIES)
def test_large_budget_is_exact(policy: str) -> None:
    """Nothing evicted: exact attention whatever the weights."""
    _, outs, (q, k, v) = run_less(policy, WEIGHTS, heavy=10, recent=6)
    assert_close(np.array(outs).swapaxes(0, 1), attention.attend(q, k, v, causal=True).out)


@pytest.mark.parametrize("policy", less.POLICIES)
def test_no_features_is_the_bare_policy(policy: str) -> None:
    """Bit for bit, with psi = 0."""
    _, zero, _ = run_less(policy, replace(WEIGHTS, s1=np.zeros((2, 4))))
    _, bare, _ = run_less(policy, None)
    assert np.array_equal(zero, bare)


class OneHot:
    """Maps by which the state holds every key exactly: psi(k_i) = e_i, phi_i = exp(q k_i)."""

    def __init__(self, k: Array) -> None:
        """Keys of the whole run, [H, T, D]."""
        self.k, self.rank = k, int(k.shape[1])

    def phi(self, head: int, q: Array) -> Array:
        """The true weight of every key."""
        return np.asarray(np.exp(self.k[head // 2] @ q / np.sqrt(len(q))))

    def psi(self, head: int, k: Array) -> Array:
        """Which key it is."""
        return np.asarray(np.all(self.k[head] == k, axis=1), np.float64)


@pytest.mark.parametrize("policy", less.POLICIES)
def test_exact_kernel_is_full_attention(policy: str) -> None:
    """Evicted tokens answer through the state as if they had stayed."""
    _, outs, (q, k, v) = run_less(policy, OneHot(draw(1, 2, 16, 8)))
    assert_close(np.array(outs).swapaxes(0, 1), attention.attend(q, k, v, causal=True).out)


@pytest.mark.parametrize("policy", less.POLICIES)
@pytest.mark.parametrize(("heavy", "recent"), [(3, 2), (4, 0), (0, 4)])
@pytest.mark.parametrize("prompt", [1, 4, 9])
def test_tokens_are_conserved_and_the_state_is_their_sum(
    policy: str, heavy: int, recent: int, prompt: int
) -> None:
    """Kept and evicted are all, once; the state equals one batch fold."""
    cache, _, (_, k, v) = run_less(policy, WEIGHTS, prompt, heavy=heavy, recent=recent)
    for g, head in enumerate(cache.heads):
        assert sorted(head.positions + head.evicted) == list(range(16))
        assert head.positions == sorted(head.positions)
        assert len(head.positions) == heavy + recent
        if policy != "tova":
            assert head.positions[heavy:] == list(range(16 - recent, 16))
        if policy == "sink":
            assert head.positions[:heavy] == list(range(heavy))
        features = np.array([WEIGHTS.psi(g, k[g, i]) for i in head.evicted])
        assert_close(head.norm, features.sum(axis=0))
        assert_close(head.state, features.T @ v[g, head.evicted])


def heaviest(positions: Iterable[int], score: list[float], count: int) -> list[int]:
    """The positions of the largest scores, in order."""
    return sorted(sorted(positions, key=lambda at: -score[at])[:count])


def test_h2o_by_hand() -> None:
    """Prompt scores are the full softmax summed over queries; later only kept tokens share."""
    cache, _, (q, k, _) = run_less("h2o", None, prompt=9, n=10)
    for g in range(2):
        probs = attention.probs(q[:, :9], k[:, :9], causal=True)[2 * g : 2 * g + 2]
        score = probs.sum(axis=(0, 1)).tolist()
        seen = [*heaviest(range(7), score, 3), 7, 8, 9]
        probs = attention.probs(q[2 * g : 2 * g + 2, 9:], k[g : g + 1, seen])
        total = [*score, 0.0]
        for position, new in zip(seen, probs[:, 0].sum(axis=0), strict=True):
            total[position] += new
        assert cache.heads[g].positions == [*heaviest(seen[:4], total, 3), 8, 9]
        assert_close(cache.heads[g].scores, [total[p] for p in cache.heads[g].positions])


def test_tova_by_hand() -> None:
    """The last query decides, averaged over all heads; the newest may go."""
    cache, _, (q, k, _) = run_less("tova", None, prompt=9, n=9)
    share = attention.probs(q[:, 8:9], k[:, :9])[:, 0].mean(axis=0)
    expected = sorted(np.argsort(-share)[:5].tolist())
    assert [head.positions for head in cache.heads] == [expected, expected]
    assert less.select("tova", [0, 1, 2], [0.5, 0.4, 0.1], 3, 1, 1) == [0, 1]
    cache, _, (q, k, _) = run_less("tova", None, prompt=9, n=10)
    share = attention.probs(q[:, 8:9], k[:, :9])[:, 0].mean(axis=0)
    seen = [*sorted(np.argsort(-share)[:5].tolist()), 9]
    share = attention.probs(q[:, 9:], k[:, seen])[:, 0].mean(axis=0)
    expected = [position for i, position in enumerate(seen) if i != share.argmin()]
    assert [head.positions for head in cache.heads] == [expected, expected]


def test_ties_go_to_the_older() -> None:
    """In every policy that has scores."""
    assert less.select("h2o", [0, 1, 2, 3], [1.0, 1.0, 1.0, 0.0], 4, 2, 1) == [0, 1, 3]
    assert less.select("tova", [0, 1, 2], [1.0, 1.0, 1.0], 3, 2, 0) == [0, 1]
    assert less.select("sink", [0, 1, 5, 6], [0.0] * 4, 7, 2, 1) == [0, 1, 3]


def test_equal_values_give_that_value() -> None:
    """Numerator and denominator agree."""
    q, k = draw(0, 4, 12, 8), draw(1, 2, 12, 8)
    v = np.broadcast_to(draw(2, 8), (2, 12, 8))
    cache = less.LessCache("h2o", 2, 2, WEIGHTS)
    cache.prefill(q[:, :6], k[:, :6], v[:, :6])
    for t in range(6, 12):
        assert_close(cache.step(q[:, t], k[:, t], v[:, t]), np.broadcast_to(v[0, 0], (4, 8)))


def test_grouped_query_heads() -> None:
    """Equal heads of a group, with equal query maps, answer alike."""
    twice = [0, 0, 2, 2]
    weights = replace(WEIGHTS, a1=WEIGHTS.a1[twice], a2=WEIGHTS.a2[twice])
    q, k, v = draw(0, 4, 12, 8)[twice], draw(1, 2, 12, 8), draw(2, 2, 12, 8)
    cache = less.LessCache("h2o", 2, 2, weights)
    cache.prefill(q[:, :6], k[:, :6], v[:, :6])
    for t in range(6, 12):
        out = cache.step(q[:, t], k[:, t], v[:, t])
        assert np.array_equal(out[0], out[1])
        assert np.array_equal(out[2], out[3])


def test_state_only_grows() -> None:
    """Its norm z is never negative and never falls."""
    q, k, v = draw(0, 4, 20, 8), draw(1, 2, 20, 8), draw(2, 2, 20, 8)
    cache, before = less.LessCache("h2o", 2, 2, WEIGHTS), np.zeros((2, 4))
    for t in range(20):
        cache.step(q[:, t], k[:, t], v[:, t])
        now = np.array([head.norm for head in cache.heads])
        assert np.all(now >= before)
        before = now
    assert before.min() > 0


def test_quantized_kept_tokens() -> None:
    """Exact in the window, coded behind it; psi takes the key that is stored."""
    quantizer = less.KeptQuantizer(2, 4)
    cache, _, (_, k, v) = run_less("h2o", WEIGHTS, quantizer=quantizer)
    for g, head in enumerate(cache.heads):
        assert head.coded == [True] * 3 + [False] * 2
        for i, position in enumerate(head.positions):
            expected = quantizer(k[g, position]) if head.coded[i] else k[g, position]
            assert np.array_equal(head.keys[i], expected)
        norm = np.zeros(4)
        for i, position in enumerate(head.evicted):
            # The prompt's evictions are the first 4. Step i - 4 evicts before it quantizes what
            # leaves the window of 2, which is token i + 3.
            exact = i < 4 or position == i + 3
            norm += WEIGHTS.psi(g, k[g, position] if exact else quantizer(k[g, position]))
        assert_close(head.norm, norm)
    whole = codes.dequantize(codes.quantize(v[:1, :1], "v", "token", 2, 4))
    assert np.array_equal(quantizer(v[0, 0]), whole[0, 0])


def test_less_bytes_by_hand() -> None:
    """Llama-2-7B at c = 204, R = 8, M = 512."""
    got = less.nbytes(32, 128, 204, 8, "h2o", n_kept=204)
    assert got["kept"] == 3_342_336 == 204 * 16_384
    assert got["state"] == 132_096
    assert less.nbytes(32, 128, 204, 8, "h2o", state_bytes=2)["state"] == 66_048
    assert got["positions"] == got["scores"] == 32 * 205 * 4
    assert less.nbytes(32, 128, 204, 8, "sink")["scores"] == 0
    assert less.nbytes(32, 128, 204, 8, "tova")["kept"] == 205 * 16_384
    assert f"{132_096 / 16_384:.2f} {66_048 / 16_384:.2f}" == "8.06 4.03"
    assert less_features.n_weights(32, 32, 128, 512, 8) == 4_459_008
    assert 32 * 4_459_008 == 142_688_256
    w = WEIGHTS
    sizes = sum(x.size for x in (w.a1, w.a2, w.b1, w.b2, w.b3, w.s1, w.s2))
    assert sizes == less_features.n_weights(4, 2, 8, 16, 4)
    assert less.kept_bytes_quantized(1, 128, 1, 1, 2, 64) == 2 * (256 + 32 + 8)


# MiniCache


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


def two_layers(n: int, near: float = 0.3) -> dict[str, Array]:
    """Queries, keys and values of a pair: q [4, n, 8], k and v [2, n, 8]."""
    x = {name: draw(i, 2, n, 8) for i, name in enumerate(("ka", "va"))}
    x |= {f"{s}b": 1.5 * x[f"{s}a"] + near * draw(5 + i, 2, n, 8) for i, s in enumerate("kv")}
    return x | {"qa": draw(8, 4, n, 8), "qb": draw(9, 4, n, 8)}


def run_pair(
    pair: minicache_cache.MiniCachePair, x: dict[str, Array], prompt: int
) -> tuple[Array, Array]:
    """Outputs of the decode steps of both layers, [n - prompt, Hq, D]."""
    pair.prefill(*(x[name][:, :prompt] for name in ("ka", "va", "kb", "vb")))
    names = ("qa", "ka", "va", "qb", "kb", "vb")
    outs = [pair.step(*(x[name][:, t] for name in names)) for t in range(prompt, x["ka"].shape[1])]
    return np.array([a for a, _ in outs]), np.array([b for _, b in outs])


def exact_pair(x: dict[str, Array], prompt: int) -> tuple[Array, Array]:
    """The same, with full caches."""
    a = attention.attend(x["qa"], x["ka"], x["va"], causal=True).out[:, prompt:]
    b = attention.attend(x["qb"], x["kb"], x["vb"], causal=True).out[:, prompt:]
    return a.swapaxes(0, 1), b.swapaxes(0, 1)


def test_pair_is_exact_where_it_should_be() -> None:
    """Exact: gamma = 1 with nothing merged in decode; proportional layers."""
    x = two_layers(14)
    pair = minicache_cache.MiniCachePair(gamma=1.0, decode_policy="keep")
    for got, expected in zip(run_pair(pair, x, 9), exact_pair(x, 9), strict=True):
        assert_close(got, expected)
    assert pair.n_retained("k") == 18
    assert np.array_equal(pair.restored("a")[0], x["ka"])
    x = two_layers(14, near=0.0)
    pair = minicache_cache.MiniCachePair(t=0.2)
    for got, expected in zip(run_pair(pair, x, 9), exact_pair(x, 9), strict=True):
        assert_close(got, expected)


def test_pair_merges_after_the_step_by_frozen_thresholds() -> None:
    """The first step reads merged prompt and its own exact token; later ones merged tokens."""
    x = two_layers(14)
    pair = minicache_cache.MiniCachePair(gamma=0.3)
    outs = run_pair(pair, x, 9)
    prompt = {s: minicache.merge_block(x[f"k{s}"][:, :9], x[f"k{s}"][:, :9]) for s in "ab"}
    assert prompt["a"].angles.max() < 1e-7
    blocks = {
        s: minicache.merge_block(x[f"{s}a"][:, :9], x[f"{s}b"][:, :9], gamma=0.3, always_keep=1)
        for s in "kv"
    }
    k, v = (
        np.concatenate([minicache.restore(blocks[s], "b", 2), x[f"{s}b"][:, 9:10]], axis=1)
        for s in "kv"
    )
    assert_close(outs[1][0], attention.attend(x["qb"][:, 9:10], k, v).out[:, 0])
    assert pair.n_merged == 14
    d = blocks["k"].angles / pi
    for i, block in enumerate(pair.blocks["k"][1:]):
        w = minicache.angle(x["ka"][0, 9 + i], x["kb"][0, 9 + i]) / pi
        assert_close(block.angles[0, 0] / pi, w)
        assert block.kept[0, 0] == (d.max() - w <= 0.3 * (d.max() - d.min()))


def test_frozen_ratio_threshold_is_the_smallest_retained_angle() -> None:
    """Later entries are retained from there on."""
    angles = np.array([0.1, 0.5, 0.4, 0.2])
    limits = minicache.thresholds(angles, "ratio", 0.5)
    assert_close(limits.low, 0.4 / pi)
    later = minicache.retained([0.39, 0.4, 1.0], "ratio", 0.5, limits)
    assert later.tolist() == [False, True, True]


def test_decode_policies_and_whole_blocks() -> None:
    """How many tokens are merged, and when; a codec sees the directions of whole blocks."""
    x, seen = two_layers(30), []

    def codec(e: Array, tensor: str, index: int) -> Array:
        seen.append((e.shape, tensor, index))
        return e

    make = minicache_cache.MiniCachePair
    for pair, merged in (
        (make(), 30),
        (make(decode_policy="keep"), 18),
        (make(decode_policy="buffer", buffer=8), 26),
        (make(decode_policy="buffer", buffer=8, codec=codec), 24),
        (make(decode_policy="keep", buffer=8, whole_blocks=True), 16),
    ):
        run_pair(pair, x, 18)
        assert pair.n_merged == merged
        for layer in "ab":
            k, v = pair.restored(layer)
            assert k.shape == v.shape == (2, 30, 8)
            assert np.array_equal(k[:, merged:], x[f"k{layer}"][:, merged:])
        assert pair.nbytes()["dense"] == 4 * 2 * 8 * 2 * (30 - merged)
        assert pair.nbytes()["direction"] == 2 * merged * 2 * 8 * 2
        assert pair.blocks["k"][0].kept[0].all()
    assert seen == [
        ((16, 2, 8), "k", 0),
        ((16, 2, 8), "v", 0),
        ((8, 2, 8), "k", 1),
        ((8, 2, 8), "v", 1),
    ]


def test_pair_without_prompt() -> None:
    """Thresholds come from the first merged token."""
    x = two_layers(5)
    pair = minicache_cache.MiniCachePair()
    assert np.all(np.isfinite(run_pair(pair, x, 0)))
    assert pair.n_merged == 5


def test_pairs() -> None:
    """From the middle on; an odd last layer stays alone."""
    assert minicache.pairs(8) == [(4, 5), (6, 7)]
    assert minicache.pairs(7) == [(3, 4), (5, 6)]
    assert minicache.pairs(8, 5) == [(5, 6)]
    assert minicache.pairs(8, 7) == minicache.pairs(1) == []


def test_minicache_bytes_by_hand() -> None:
    """Llama-2-7B, 1024 tokens: one pair, and the whole model from layer 16 on."""
    pair = sum(minicache_cache.pair_bytes(1024, 32, 128).values())
    full = 4 * 1024 * 32 * 128 * 2
    assert (pair, full) == (17_039_376, 33_554_432)
    assert f"{100 * pair / full:.2f}" == "50.78"
    assert f"{16 * full / (8 * full + 8 * pair):.3f}" == "1.326"
    m = 1024 * 32 // 20
    kept = sum(minicache_cache.pair_bytes(1024, 32, 128, m, m).values())
    assert kept - pair == 2 * (2 * m * 128 * 2 + 4 * m)
    assert f"{16 * full / (8 * full + 8 * kept):.2f}" == "1.28"
    token = minicache_cache.pair_bytes(1024, 32, 128, 3, 0, granularity="token")
    assert token["norms"] == 2 * 2 * 1024 * 2
    assert token["retained"] == 3 * (2 * 32 * 128 * 2 + 4)
    assert minicache_cache.pair_bytes(1024, 32, 128, how="mean")["norms"] == 0
    # 4 bits at g = 32 with fp16 scale and zero are 5 bits an element; norms stay fp16.
    coded = full / 2 * 5 / 16 + 262_144
    assert f"{16 / 5:.2f} {16 * full / (8 * full * 5 / 16 + 8 * coded):.2f}" == "3.20 4.20"


# KVSharer


def test_maps() -> None:
    """Owners below, no chains, layer 0 its own."""
    assert kvsharer.why_invalid((0, 0, 2, 2), 2) is None
    assert kvsharer.why_invalid((0, 0, 1)) is not None
    assert kvsharer.why_invalid((1, 1)) is not None
    assert kvsharer.why_invalid((0, 0, 0), 1) is not None
    assert kvsharer.compress_paths((0, 1, 2, 1, 4, 3)) == (0, 1, 2, 1, 4, 1)
    assert kvsharer.share((0, 1, 2, 3, 3, 5), 3, 1) == (0, 1, 2, 1, 1, 5)
    assert kvsharer.share((0, 1, 1, 3), 3, 2) == (0, 1, 1, 1)
    assert kvsharer.sharers((0, 0, 2, 2)) == [1, 3]


def test_share_count_rounds_half_up() -> None:
    """Of 12.5 %, in decimals, and never all layers."""
    assert [kvsharer.share_count(0.125, n) for n in (32, 40, 4, 12)] == [4, 5, 1, 2]
    assert kvsharer.share_count(0.375, 12) == 5
    assert kvsharer.share_count("0.29", 50) == 15  # 14.5; in binary a little less
    assert kvsharer.share_count(1.0, 8) == 7
    assert kvsharer.share_count(0.0, 8) == 0


def test_distances_by_hand() -> None:
    """Three layers, one head, two positions, two channels."""
    k = np.array([[[[0, 0], [0, 0]]], [[[3, 4], [0, 0]]], [[[0, 0], [6, 8]]]], float)
    v = np.array([[[[1, 0], [0, 0]]], [[[1, 0], [0, 0]]], [[[1, 0], [0, 2]]]], float)
    d = kvsharer.distances(k, v)
    # K: 5/2, 10/2, (5+10)/2; V: 0, 2/2, 2/2; half their sums.
    assert_close([d[1, 0], d[2, 0], d[2, 1]], [1.25, 3.0, 4.25])
    assert np.array_equal(d, d.T)
    assert np.all(np.diag(d) == 0)
    assert kvsharer.rank_pairs(d) == [(2, 1), (2, 0), (1, 0)]
    assert kvsharer.rank_pairs(d, "ascending") == [(1, 0), (2, 0), (2, 1)]
    flat = kvsharer.distances(k, v, "flat")
    assert_close([flat[1, 0], flat[2, 0]], [2.5, np.sqrt(9 + 25)])
    assert_close(flat[2, 1], np.sqrt(9 + 25 + 1.5**2 + 2**2))


def test_ranking_ties_and_scale() -> None:
    """Equal to six digits: the smaller i, then the smaller j; a common factor changes nothing."""
    d = np.ones((3, 3)) + 1e-8 * draw(0, 3, 3)
    assert kvsharer.rank_pairs(d) == [(1, 0), (2, 0), (2, 1)]
    k, v = draw(1, 6, 2, 4, 8), draw(2, 6, 2, 4, 8)
    for how in ("positionwise", "flat"):
        once = kvsharer.rank_pairs(kvsharer.distances(k, v, how))
        assert once == kvsharer.rank_pairs(kvsharer.distances(3 * k, 3 * v, how))


def test_mean_states_and_similarity() -> None:
    """Averages of equal lengths; both readings of likeness."""
    assert_close(kvsharer.mean_states([np.ones((1, 1, 2, 2)), np.zeros((1, 1, 2, 2))]), 0.5)
    with pytest.raises(ValueError, match="as long as"):
        kvsharer.mean_states([np.ones((1, 1, 2, 2)), np.ones((1, 1, 3, 2))])
    x, y = (
        [np.array([[1.0, 0]]), np.array([[0, 2.0]])],
        [np.array([[1.0, 0]]), np.array([[2.0, 0]])],
    )
    assert_close(kvsharer.similarity(x, y), 0.5)
    assert_close(kvsharer.similarity(x, y, "mean_repr"), 1 / np.sqrt(5))
    assert_close(kvsharer.similarity(x, x), 1)


def test_greedy() -> None:
    """Rank order, strict threshold, sharers passed over, partial results, no needless call."""
    ranked = [(5, 3), (5, 1), (3, 1), (4, 2), (2, 0), (1, 0)]
    got = kvsharer.greedy(ranked, 6, 3, lambda m: 1.0, -1)
    assert got.accepted == [(5, 3), (3, 1), (4, 2)] == got.tried
    assert got.map == (0, 1, 2, 1, 2, 1)
    assert got.complete
    none = kvsharer.greedy(ranked, 6, 3, lambda m: 1.0, 1.01)
    assert (none.map, none.accepted, none.complete) == (tuple(range(6)), [], False)
    assert none.tried == ranked
    assert kvsharer.greedy(ranked, 6, 1, lambda m: 0.5).accepted == []  # not above T
    picky = kvsharer.greedy(ranked, 6, 2, lambda m: 0.9 if m[3] == 3 else 0.1)
    assert picky.accepted == [(5, 3), (4, 2)]
    assert kvsharer.greedy(ranked, 6, 0, lambda m: 1.0) == (tuple(range(6)), [], [], True)
    with pytest.raises(ValueError, match="cannot share"):
        kvsharer.greedy(ranked, 6, 6, lambda m: 1.0)


def test_greedy_maps_are_valid() -> None:
    """Whatever the order and the acceptances."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        d = rng.uniform(size=(9, 9))
        found = kvsharer.greedy(kvsharer.rank_pairs(d), 9, 4, lambda m, r=rng: r.uniform(), 0.3)  # type: ignore[misc]
        assert kvsharer.why_invalid(found.map, 4) is None
        assert len(kvsharer.sharers(found.map)) == len(found.accepted)


def test_kvsharer_bytes_by_hand() -> None:
    """Per token: Llama-2-7B sharing 8 of 32 layers, Llama-2-13B sharing 10 of 40."""
    assert kvsharer.cache_bytes(32, 0, 32, 128, 1) == 524_288
    assert kvsharer.cache_bytes(32, 8, 32, 128, 1) == 393_216
    assert kvsharer.cache_bytes(40, 0, 40, 128, 1) == 819_200
    assert kvsharer.cache_bytes(40, 10, 40, 128, 1) == 614_400
