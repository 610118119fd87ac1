"""GEAR's codec and its cache against the NumPy loops and the laws that the paper implies."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvc.errors import ConfigError, KVCError
from kvc.methods import Gear, parse
from kvc.ops.codec import Spec, decode, encode
from kvc.ops.quant import Role, n_words, pack, unpack
from kvc.ops.residual import Seed
from kvc.store.store import KVStore
from tests.oracles import gear as oracle
from tests.oracles.gear_cache import GearCache, cache_bytes, nbytes
from tests.tolerances import TOLERANCES

H, D, SEED = 2, 64, Seed(0, 0, 0)
PRESETS = ("none", "kivi", "gear-l", "gear-s", "gear", "gear2")


def tensor(n: int, seed: int = 0, heads: int = H, head_dim: int = D) -> np.ndarray[Any, Any]:
    """[1, heads, n, head_dim] with outlier channels, as keys have them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, heads, n, head_dim))
    x[..., :3] *= 8
    return x.astype(np.float32)


def error(x: np.ndarray[Any, Any], role: Role, **kwargs: Any) -> float:
    given = {"rank": 4, "outliers": 0.02, "bits": 2, "n_iter": 3, **kwargs}
    spec = Spec(role, given.pop("bits"), "kivi", 64, x.shape[2], x.shape[3])
    return float(np.linalg.norm(x - decode(encode(x, spec, seed=SEED, **given), spec)))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 64])
def test_codes_come_back_from_their_words(xp: ModuleType, bits: int, n: int) -> None:
    codes = np.random.default_rng(n).integers(0, 2**bits, (2, 3, n)).astype(np.int32)
    words = pack(xp.from_numpy(codes), bits)
    assert words.shape[-1] == n_words(n, bits)
    np.testing.assert_array_equal(xp.to_numpy(unpack(words, bits, n)), codes)


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("backbone", ["kivi", "kcvt", "token"])
def test_a_block_equals_the_loops(xp: ModuleType, role: Role, bits: int, backbone: Any) -> None:
    x = tensor(128)
    spec = Spec(role, bits, backbone, 64, 128, D)
    code = encode(xp.from_numpy(x), spec, rank=4, outliers=0.04, n_iter=3, seed=SEED)
    settings = oracle.Settings(
        variant="gear", backbone=backbone, k_bits=bits, v_bits=bits, outliers=0.04, meta="float32"
    )
    want = oracle.compress(x[0].astype(np.float64), role, settings, rank=4)
    got = xp.to_numpy(decode(code, spec))[0]
    off = np.abs(got - want.x) > 1e-3
    assert off.mean() < 1e-3, "a code may flip on a tie, no more"
    assert np.linalg.norm(got - want.x) < 1e-2 * np.linalg.norm(x)


@pytest.mark.parametrize("role", ["k", "v"])
def test_each_part_lowers_the_error(role: Role) -> None:
    x = tensor(256)
    quant = error(x, role, rank=0, outliers=0)
    assert error(x, role) < error(x, role, outliers=0) < quant


def test_lossless_limits(xp: ModuleType) -> None:
    x = tensor(64)
    for role in ("k", "v"):
        spec = Spec(role, 2, "kivi", 64, 64, D)
        for limit in ({"rank": 64, "outliers": 0.0}, {"rank": 0, "outliers": 1.0}):
            code = encode(xp.from_numpy(x), spec, n_iter=3, seed=SEED, **limit)  # type: ignore[arg-type]
            np.testing.assert_allclose(xp.to_numpy(decode(code, spec)), x, atol=1e-4 * abs(x).max())


def test_constant_blocks_are_finite_and_exact(xp: ModuleType) -> None:
    x = np.full((1, 1, 64, D), 3.0, np.float32)
    for role in ("k", "v"):
        spec = Spec(role, 2, "kivi", 64, 64, D)
        code = encode(xp.from_numpy(x), spec, rank=2, outliers=0.1, n_iter=3, seed=SEED)
        np.testing.assert_allclose(xp.to_numpy(decode(code, spec)), x)


SMALL = {"group_size": "8", "buffer": "16"}
CACHES: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("kivi", {}, {"variant": "quant"}),
    ("gear-l", {}, {"variant": "gear_l"}),
    ("gear-s", {}, {"variant": "gear_s"}),
    ("gear", {}, {}),
    ("gear", {**SMALL, "sink": "5", "window": "9"},
     {"k_group": 8, "v_group": 8, "buffer": 16, "sink": 5, "window": 9}),
    ("gear", {"k_group": "16", "v_group": "32", "k_bits": "4", "v_bits": "8", "outliers": "0.1"},
     {"k_group": 16, "v_group": 32, "k_bits": 4, "v_bits": 8, "outliers": 0.1}),
    ("kivi", {**SMALL, "value_window": "sliding"},
     {"variant": "quant", "k_group": 8, "v_group": 8, "buffer": 16, "value_window": "sliding"}),
    ("kivi", {**SMALL, "value_window": "sliding", "sink": "3"},
     {"variant": "quant", "k_group": 8, "v_group": 8, "buffer": 16, "value_window": "sliding",
      "sink": 3}),
    ("kcvt", {"buffer": "20", "bits": "4"},
     {"variant": "quant", "backbone": "kcvt", "buffer": 20, "k_bits": 4, "v_bits": 4}),
    ("token", {**SMALL, "bits": "8"},
     {"variant": "quant", "backbone": "token", "k_group": 8, "v_group": 8, "buffer": 16,
      "k_bits": 8, "v_bits": 8}),
    ("gear2", {"buffer": "32", "sink": "4", "window": "8"},
     {"variant": "gear_l", "k_bits": 4, "v_bits": 2, "buffer": 32, "tile": 32, "sink": 4,
      "window": 8, "rotate": "hadamard", "scales": "dual", "prefill_rank": 2}),
]  # fmt: skip


@pytest.mark.parametrize("prompt", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("name", "settings", "same"), CACHES, ids=str)
def test_steps_equal_the_loops(
    name: str, settings: dict[str, str], same: dict[str, Any], prompt: int
) -> None:
    """Prompt and 70 steps in float64, against the cache written as loops."""
    loops = GearCache(oracle.Settings(scale=0.125, **same))
    store = KVStore(parse(name, settings), 1)
    rng = np.random.default_rng(prompt)
    k, v = rng.standard_normal((2, 1, H, prompt, D))
    store.append(0, k, v)
    loops.prefill(k[0], v[0])
    rtol, atol = TOLERANCES["float32"]  # the start of the power iteration is rounded to float32
    for _ in range(70):
        k, v = rng.standard_normal((2, 1, H, 1, D))
        q = rng.standard_normal((1, 2 * H, 1, D))
        store.append(0, k, v)
        got = store.attend(0, q, 0.125)[0, :, 0]
        want = loops.step(k[0, :, 0], v[0, :, 0], q[0, :, 0])
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    # what the last step left due is coded when the next one comes
    store.append(0, k, v)
    report, want_bytes = store.report(), nbytes(loops, e=8, es=8)
    slack = report.parts.get("slack", 0)
    newest = 2 * H * D * 8
    assert report.nbytes - slack - newest == sum(want_bytes.values())
    k_read, v_read = store.read(0)
    np.testing.assert_allclose(k_read[0, :, :-1], loops.keys(), rtol=rtol, atol=atol)
    np.testing.assert_allclose(v_read[0, :, :-1], loops.values(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", PRESETS)
def test_rows_and_padding_change_nothing(xp: ModuleType, name: str) -> None:
    """A left-padded batch gives each row what the row alone gives."""
    method, pads, n = parse(name), [0, 5, 70], 150
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 3, H, n, D)).astype(np.float32)
    steps = rng.standard_normal((3, 40, 3, H, 1, D)).astype(np.float32)

    def run(rows: list[int], cut: int) -> np.ndarray[Any, Any]:
        store = KVStore(method, 1)
        left = [pads[row] - cut for row in rows]
        store.append(0, xp.from_numpy(k[rows, :, cut:]), xp.from_numpy(v[rows, :, cut:]), left)
        for sk, sv, sq in steps.swapaxes(0, 1):
            store.append(0, xp.from_numpy(sk[rows]), xp.from_numpy(sv[rows]))
            out = store.attend(0, xp.from_numpy(sq[rows]), 0.125)
        return np.asarray(xp.to_numpy(out))

    together = run([0, 1, 2], 0)
    for row, pad in enumerate(pads):
        rtol, atol = TOLERANCES["float32"]
        np.testing.assert_allclose(run([row], pad)[0], together[row], rtol=rtol, atol=atol)


def test_bytes_equal_the_formula(xp: ModuleType) -> None:
    for name in PRESETS[1:5]:
        codec = parse(name).codec
        assert codec is not None
        store = KVStore(parse(name), 1)
        x = tensor(200).astype(np.float16)
        store.append(0, xp.from_numpy(x), xp.from_numpy(x))
        for _ in range(70):
            store.append(0, xp.from_numpy(x[:, :, :1]), xp.from_numpy(x[:, :, :1]))
        variant = {"kivi": "quant", "gear-l": "gear_l", "gear-s": "gear_s", "gear": "gear"}[name]
        chunks = [(192, codec.prefill_rank), (64, codec.rank)]
        want = cache_bytes(H, D, oracle.Settings(variant=variant), chunks, chunks, 14, 14)
        report = store.report()
        assert report.nbytes - report.parts["slack"] == sum(want.values())
        assert report.nbytes == store.nbytes == sum(x.nbytes for x in store.arrays())


def test_trim_and_reorder(xp: ModuleType) -> None:
    x = np.concatenate([tensor(100, seed) for seed in (0, 1)])
    store = KVStore(parse("gear"), 1)
    for piece in (x[:, :, :99], x[:, :, 99:]):
        store.append(0, xp.from_numpy(piece), xp.from_numpy(piece))
    before = [xp.to_numpy(part) for part in store.read(0)]
    store.reorder([1, 1, 0])
    for got, want in zip(store.read(0), before, strict=True):
        np.testing.assert_array_equal(xp.to_numpy(got), want[[1, 1, 0]])
    store.trim(36)
    assert store.length() == 64
    with pytest.raises(ConfigError, match=r"gear.window=1"):
        store.trim(1)


def test_bad_numbers_name_their_layer(xp: ModuleType) -> None:
    x = tensor(64)
    x[0, 0, 3, 3] = np.nan
    store = KVStore(parse("kivi"), 2)
    store.append(1, xp.from_numpy(x), xp.from_numpy(x))
    with pytest.raises(KVCError, match="layer 1: expected finite"):
        store.append(1, xp.from_numpy(x[:, :, :1]), xp.from_numpy(x[:, :, :1]))


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("geer", {}, "unknown method 'geer'; nearest: gear"),
        ("gear", {"bitz": "2"}, "unknown parameter 'bitz'; nearest: .*bits"),
        ("gear", {"bits": "3"}, "bits must be 2, 4 or 8, got 3"),
        ("gear", {"bits": "two"}, "bits must be int, got 'two'"),
        ("gear+kivi", {}, "gear and kivi both fill the seam codec"),
        ("kvsharer", {"map": "1:5"}, "shares with an earlier one, got 1:5"),
        ("gear+none", {"bits": "2"}, "no method takes the setting 'bits'"),
        ("gear", {"group_size": "48"}, "buffer must be a multiple of group_size"),
    ],
)
def test_bad_methods(text: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, settings)


def test_groups_must_fit_the_model() -> None:
    with pytest.raises(ConfigError, match="must divide the model's head_dim 80, got 64"):
        Gear().check(80)


def test_sharers_read_their_owner(xp: ModuleType) -> None:
    store = KVStore(parse("kvsharer+gear", {"kvsharer.map": "2:1,1:0"}), 3)
    x, zero = xp.from_numpy(tensor(70)), xp.from_numpy(tensor(70) * np.float32(np.nan))
    for layer in range(3):
        store.append(layer, x if layer == 0 else zero, x if layer == 0 else zero)
    assert [store.owner(i) for i in range(3)] == [0, 0, 0]
    out = [xp.to_numpy(store.attend(i, x, 0.125)) for i in range(3)]
    np.testing.assert_array_equal(out[0], out[2])
    assert store.report().layers[1:] == [0, 0]


def test_layers_are_coded_with_their_own_bits() -> None:
    """By the model's numbers, which are not the store's where some layers keep a window."""
    method = replace(parse("kivi", {"layer_bits": "1:8/4,5:4"}), numbers=(1, 3, 5))
    store = KVStore(method, 3)
    x = np.random.default_rng(0).standard_normal((1, 2, 129, 64)).astype("f4")
    for t in (slice(0, 128), slice(128, 129)):
        for layer in range(3):
            store.append(layer, x[:, :, t], x[:, :, t])
    plain = [
        KVStore(parse("kivi", given), 1) for given in ({"k_bits": 8, "v_bits": 4}, {}, {"bits": 4})
    ]
    for layer, other in enumerate(plain):
        for t in (slice(0, 128), slice(128, 129)):
            other.append(0, x[:, :, t], x[:, :, t])
        for a, b in zip(store.read(layer), other.read(0), strict=True):
            np.testing.assert_array_equal(a, b)
        assert store.report().layers[layer] == other.nbytes
