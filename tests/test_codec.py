"""The codec's blocks, in every variant, against the NumPy loops; ranges, stacks and bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest

from kvc.methods import Gear
from kvc.ops.codec import Code, Spec, arrays, decode, encode, map_code, turn
from kvc.ops.quant import Backbone, Role
from kvc.ops.residual import Seed
from kvc.ops.scales import Dual
from tests.oracles import gear as oracle
from tests.oracles.gear_cache import role_bytes
from tests.tolerances import TOLERANCES

H, D, SEED = 2, 32, Seed(0, 0, 0)
ROLES: tuple[Role, ...] = ("k", "v")
PLAIN = {"prefill_rank": 0, "rank": 0, "outliers": 0.0, "group_size": 32}
HALF = {"scale_dtype": "float16", "zero_dtype": "float16"}


def plain(**fields: Any) -> Gear:
    """A codec of groups of 32, without a low-rank fit and without outliers but for `fields`."""
    return Gear(**{**PLAIN, **fields})


CASES = {
    **{
        f"{backbone} {bits}": plain(backbone=backbone, bits=bits)
        for backbone in get_args(Backbone)
        for bits in (2, 4, 8)
    },
    "groups apart": plain(k_group=8, v_group=16, k_bits=4),
    "groups that cut words": plain(k_group=12, buffer=36),
    "groups apart, by token": plain(backbone="token", k_group=8),
    "half": plain(**HALF),
    "half, zeros not": plain(scale_dtype="float16", zero_dtype="float32"),
    "zeros half": plain(zero_dtype="float16"),
    "low rank": plain(rank=4),
    "outliers": plain(outliers=0.1),
    "gear": plain(rank=4, outliers=0.1),
    "gear kcvt": plain(backbone="kcvt", rank=2, outliers=0.1),
    "rotate": plain(rotate="hadamard"),
    "rotate gear": plain(rotate="hadamard", rank=2, outliers=0.1),
    **{f"dual {bits}": plain(scales="dual", bits=bits) for bits in (2, 4, 8)},
    "dual half": plain(scales="dual", bits=4, **HALF),
    "dual outliers": plain(scales="dual", outliers=0.1),
    "all": plain(rotate="hadamard", scales="dual", k_bits=4, rank=2, outliers=0.1),
}
FULL = {name: g for name, g in CASES.items() if "gear" in name or name in ("all", "dual outliers")}
each_case = pytest.mark.parametrize("name", CASES)
each_role = pytest.mark.parametrize("role", ROLES)


def tensor(n: int, seed: int = 0, heads: int = H, head_dim: int = D) -> np.ndarray[Any, Any]:
    """[heads, n, head_dim] with wide channels, a shifted one and single large entries."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((heads, n, head_dim))
    x[..., :3] *= 8
    x[..., 5] += 20
    return x + 6 * rng.standard_normal(x.shape) * (rng.standard_normal(x.shape) > 2.3)


def coded(x: Any, codec: Gear, role: Role, rank: int | None = None) -> tuple[Code, Spec]:
    """A block [B, H, n, D] as the codec's fields say."""
    spec = codec.spec(role, x.shape[2], x.shape[3])
    rank = codec.rank if rank is None else rank
    code = encode(x, spec, rank=rank, outliers=codec.outliers, n_iter=codec.n_iter, seed=SEED)
    return code, spec


def settings(codec: Gear) -> oracle.Settings:
    """The same for the loops."""
    return oracle.Settings(
        backbone=codec.backbone,
        k_bits=codec.bits_of("k"),
        v_bits=codec.bits_of("v"),
        k_group=codec.group_of("k"),
        v_group=codec.group_of("v"),
        buffer=codec.buffer,
        rank=codec.rank,
        outliers=codec.outliers,
        meta=codec.scale_dtype or None,
        zero=codec.zero_dtype or None,
        rotate=codec.rotate or None,
        scales=codec.scales or None,
        tile=codec.buffer,
    )


@lru_cache
def loops(codec: Gear, role: Role, n: int, heads: int, head_dim: int) -> oracle.Chunk:
    return oracle.compress(tensor(n, 0, heads, head_dim), role, settings(codec))


def assert_nearly_all(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> None:
    """In float32 a code may flip on a tie, no more."""
    assert got.shape == want.shape
    assert (np.abs(got - want) > 1e-3 * max(1, np.abs(want).max())).mean() < 2e-3
    assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


@each_role
@each_case
def test_a_block_equals_the_loops_in_float64(name: str, role: Role) -> None:
    codec = CASES[name]
    x = tensor(2 * codec.buffer)[None]
    x.flags.writeable = False
    code, spec = coded(x, codec, role)
    want = loops(codec, role, x.shape[2], H, D)
    # the start of the power iteration is rounded to float32, as are sums of narrower scales
    exact = codec.rank == 0 and not codec.scale_dtype and not codec.zero_dtype
    rtol, atol = TOLERANCES["float64" if exact else "float32"]
    np.testing.assert_allclose(turn(decode(code, spec), spec)[0], want.x, rtol=rtol, atol=atol)
    assert want.words is not None
    np.testing.assert_array_equal(code.d.codes[0], want.words)
    if isinstance(code.d, Dual):
        tile = np.arange(x.shape[2]) // codec.buffer
        stored = {
            "mu": code.d.mu[0][:, tile],
            "c": code.d.c[0][:, tile],
            "r": code.d.r[0, ..., None],
        }
        for part, got in stored.items():
            wanted = want.meta[part] if part != "r" else want.meta[part][..., :1]
            np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol)


@each_role
@each_case
def test_a_block_equals_the_loops(xp: ModuleType, name: str, role: Role) -> None:
    codec = CASES[name]
    x = tensor(2 * codec.buffer)[None].astype(np.float32)
    code, spec = coded(xp.from_numpy(x), codec, role)
    got = xp.to_numpy(turn(decode(code, spec), spec))[0]
    assert_nearly_all(got, loops(codec, role, x.shape[2], H, D).x)


@pytest.mark.parametrize("head_dim", [8, 80])
@each_role
def test_other_widths_equal_the_loops(xp: ModuleType, role: Role, head_dim: int) -> None:
    for name in ("all", "dual 2", "rotate gear"):
        codec = replace(CASES[name], group_size=8)
        x = tensor(64, 0, H, head_dim)[None].astype(np.float32)
        code, spec = coded(xp.from_numpy(x), codec, role)
        got = xp.to_numpy(turn(decode(code, spec), spec))[0]
        assert_nearly_all(got, loops(codec, role, 64, H, head_dim).x)


@each_role
@each_case
def test_a_range_is_a_part_of_the_whole(xp: ModuleType, name: str, role: Role) -> None:
    codec = CASES[name]
    n = 2 * codec.buffer
    code, spec = coded(xp.from_numpy(tensor(n)[None].astype(np.float32)), codec, role)
    full = xp.to_numpy(decode(code, spec))
    rtol, atol = TOLERANCES["float32"]
    half = n // 2
    for start, stop in ((0, 1), (1, n - 1), (5, 6), (17, 50), (half - 1, half + 1), (n - 1, n)):
        got = xp.to_numpy(decode(code, spec, start, stop))
        np.testing.assert_allclose(got, full[:, :, start:stop], rtol=rtol, atol=atol)
    np.testing.assert_array_equal(xp.to_numpy(decode(code, spec, 0)), full)


@each_role
@pytest.mark.parametrize("name", [*FULL, "kivi 2", "kcvt 4", "dual 4"])
def test_stacked_blocks_are_more_rows(xp: ModuleType, name: str, role: Role) -> None:
    codec, n = CASES[name], CASES[name].buffer
    blocks = [np.stack([tensor(n, 10 * p + row) for row in range(3)]) for p in range(2)]
    parts = [coded(xp.from_numpy(x.astype(np.float32)), codec, role) for x in blocks]
    spec = parts[0][1]
    stacked = map_code(lambda *xs: xp.stack(xs, 0), *(code for code, _ in parts))
    assert {x.shape[:2] for _, x in arrays(stacked)} == {(2, 3)}
    got = decode(map_code(lambda x: x.reshape(6, *x.shape[2:]), stacked), spec)
    rtol, atol = TOLERANCES["float32"]
    for p, (code, _) in enumerate(parts):
        alone = xp.to_numpy(decode(code, spec))
        np.testing.assert_allclose(xp.to_numpy(got)[3 * p : 3 * p + 3], alone, rtol, atol)
    row, _ = coded(xp.from_numpy(blocks[0][1:2].astype(np.float32)), codec, role)
    assert_nearly_all(xp.to_numpy(decode(row, spec)), xp.to_numpy(got)[1:2])


@each_role
@each_case
def test_constant_blocks_are_finite_and_kept(xp: ModuleType, name: str, role: Role) -> None:
    codec = CASES[name]
    for dtype in (np.float16, np.float32):
        x = np.full((1, H, codec.buffer, D), 3.0, dtype)
        code, spec = coded(xp.from_numpy(x), codec, role)
        got = xp.to_numpy(turn(decode(code, spec), spec))
        np.testing.assert_allclose(got, x, atol=3e-3)


@each_role
@each_case
def test_blocks_of_one_token(xp: ModuleType, name: str, role: Role) -> None:
    codec = CASES[name]
    if codec.backbone == "kivi" and role == "k" and not codec.scales:
        codec = replace(codec, k_group=1)
    x = tensor(1)[None].astype(np.float32)
    code, spec = coded(xp.from_numpy(x), codec, role)
    got = xp.to_numpy(turn(decode(code, spec), spec))
    assert got.shape == x.shape
    if spec.scales or (codec.backbone != "token" and role == "k") or codec.rank:
        np.testing.assert_allclose(got, x, atol=2e-2)  # its own mean, group or direction
    assert np.isfinite(got).all()


@pytest.mark.parametrize("name", ["rotate", "dual 2", "all", "dual half"])
@each_role
def test_lossless_limits(xp: ModuleType, name: str, role: Role) -> None:
    x = tensor(64)[None].astype(np.float32)
    spec = CASES[name].spec(role, 64, D)
    for rank, outliers in ((64, 0.0), (0, 1.0)):
        code = encode(xp.from_numpy(x), spec, rank=rank, outliers=outliers, n_iter=3, seed=SEED)
        got = xp.to_numpy(turn(decode(code, spec), spec))
        np.testing.assert_allclose(got, x, atol=1e-4 * np.abs(x).max())


@each_role
@each_case
def test_bytes_equal_the_formula(xp: ModuleType, name: str, role: Role) -> None:
    codec = CASES[name]
    n = 2 * codec.buffer
    code, _ = coded(xp.from_numpy(tensor(n)[None].astype(np.float16)), codec, role)
    es, ez = (4 if kept == "float32" else 2 for kept in (codec.scale_dtype, codec.zero_dtype))
    want = role_bytes(role, n, H, D, settings(codec), codec.rank, es=es, ez=ez)
    got = dict.fromkeys(("codes", "scales", "low rank", "outliers"), 0)
    for part, x in arrays(code):
        got[part] += x.nbytes
    assert list(got.values()) == [want[part] for part in ("codes", "meta", "lowrank", "sparse")]


@pytest.mark.parametrize("zero_dtype", ["float16", "float32"])
def test_bytes_of_dual_scales(xp: ModuleType, zero_dtype: str) -> None:
    """Scales in float32 and zeros of their own, which part 7's formula has from 4 bits on."""
    codec = plain(scales="dual", bits=4, scale_dtype="float32", zero_dtype=zero_dtype)
    code, _ = coded(xp.from_numpy(tensor(128)[None].astype(np.float16)), codec, "k")
    ez = 2 if zero_dtype == "float16" else 4
    want = role_bytes("k", 128, H, D, settings(codec), 0, es=4, ez=ez)
    assert sum(x.nbytes for part, x in arrays(code) if part == "scales") == want["meta"]


def test_bfloat16_scales(xp: ModuleType) -> None:
    if xp.name == "numpy":
        pytest.skip("NumPy has no bfloat16")
    codec = plain(scale_dtype="bfloat16", zero_dtype="bfloat16", bits=8)
    x = tensor(64)[None].astype(np.float32)
    code, spec = coded(xp.from_numpy(x), codec, "v")
    assert {xp.dtype_name(part) for kind, part in arrays(code) if kind == "scales"} == {"bfloat16"}
    np.testing.assert_allclose(xp.to_numpy(decode(code, spec)), x, atol=2e-2 * np.abs(x).max())


def test_places_beyond_a_signed_16_bit_number(xp: ModuleType) -> None:
    """A row of 40000 entries has places of two bytes; they lead back to where they came from."""
    n = 40000
    x = np.random.default_rng(0).uniform(-1, 1, (1, 1, n, 1)).astype(np.float32)
    x[0, 0, [7, 35000, n - 1], 0] = (50, 60, -70)
    spec = Spec("k", 2, "kivi", 40, n, 1)
    code = encode(xp.from_numpy(x), spec, rank=0, outliers=2e-4, n_iter=1, seed=SEED)
    assert code.s is not None
    assert code.s.index.nbytes == 2 * 8
    got = xp.to_numpy(decode(code, spec))
    np.testing.assert_allclose(got[0, 0, [7, 35000, n - 1], 0], (50, 60, -70), rtol=1e-5)
    np.testing.assert_allclose(
        xp.to_numpy(decode(code, spec, 34999, 35001)), got[:, :, 34999:35001]
    )
