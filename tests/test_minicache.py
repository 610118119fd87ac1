"""MiniCache in the store against the loops: pairs, retention, decode policies, coded directions."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvc.errors import ConfigError, KVCError
from kvc.methods import MiniCache, parse
from kvc.store.pair import Pair
from kvc.store.store import KVStore
from tests.oracles import gear as gear_oracle
from tests.oracles.minicache_cache import MiniCachePair, pair_bytes
from tests.tolerances import TOLERANCES

HQ, H, D, SCALE = 4, 2, 8, 0.35
LAYERS = 4  # of which the last two are a pair
VARIANTS: list[dict[str, Any]] = [
    {},
    {"t": 0.3, "gamma": 0.2},
    {"retention": "cosine", "gamma": 0.3},
    {"retention": "ratio", "gamma": 0.25},
    {"retention": "literal", "gamma": 0.3, "always_keep": 0},
    {"retention": "none", "always_keep": 0},
    {"granularity": "token", "gamma": 0.2, "always_keep": 3},
    {"how": "mean"},
    {"how": "max-norm"},
    {"decode_policy": "keep"},
    {"decode_policy": "buffer", "buffer": 4},
]


def tokens(n: int, seed: int = 0, rows: int = 1) -> Any:
    """K and V of a pair's layers, alike as adjacent layers are; [2 layers, 2, B, H, n, D]."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((1, 2, rows, H, n, D))
    return common + 0.7 * rng.standard_normal((2, 2, rows, H, n, D))


def kind(xp: ModuleType) -> str:
    return "float64" if xp.name == "numpy" else "float32"


def put(xp: ModuleType, x: Any, dtype: str | None = None) -> Any:
    return xp.from_numpy(np.ascontiguousarray(x.astype(dtype or kind(xp))))


def step(xp: ModuleType, store: KVStore, x: Any, q: Any = None, pads: Any = None) -> Any:
    """Appends tokens to both layers of the pair, and lets both attend."""
    outs = []
    for layer, (k, v) in enumerate(x, 2):
        store.append(layer, put(xp, k), put(xp, v), pads)
        if q is not None:
            outs.append(np.asarray(xp.to_numpy(store.attend(layer, put(xp, q), SCALE))))
    return outs


def close(xp: ModuleType, got: Any, want: Any) -> None:
    rtol, atol = TOLERANCES[kind(xp)]
    np.testing.assert_allclose(got, want, rtol=rtol * 10, atol=atol * 10)


def loops(settings: dict[str, Any], **kwargs: Any) -> MiniCachePair:
    given = {"rule" if name == "retention" else name: x for name, x in settings.items()}
    return MiniCachePair(scale=SCALE, **given, **kwargs)


@pytest.mark.parametrize("prompt", [1, 2, 9, 24])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_steps_equal_the_loops(xp: ModuleType, settings: dict[str, Any], prompt: int) -> None:
    want, store = loops(settings), KVStore(parse("minicache", settings), LAYERS)
    x = tokens(prompt + 12, seed=prompt)
    q = np.random.default_rng(1).standard_normal((12, 1, HQ, 1, D))
    step(xp, store, x[..., :prompt, :])
    want.prefill(*(part[0] for part in x[..., :prompt, :].reshape(4, 1, H, prompt, D)))
    for i, t in enumerate(range(prompt, prompt + 12)):
        new = x[..., t : t + 1, :]
        got = step(xp, store, new, q[i])
        (ka, va), (kb, vb) = new[:, :, 0, :, 0]
        out = want.step(q[i, 0, :, 0], ka, va, q[i, 0, :, 0], kb, vb)
        for which in (0, 1):
            close(xp, got[which][0, :, 0], out[which])
    # the last token waits until the next one comes
    step(xp, store, x[..., -1:, :])
    unit = store._slot_of[2].groups[0][1]
    assert isinstance(unit, Pair)
    for name, merged in (("k", unit.k), ("v", unit.v)):
        assert merged is not None
        assert merged.n == want.n_merged
        live = 0 if merged.originals is None else merged.originals.live()
        assert live == want.n_retained(name)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_bytes_are_the_formula(xp: ModuleType, settings: dict[str, Any]) -> None:
    want, store = loops(settings), KVStore(parse("minicache", settings), LAYERS)
    x = tokens(40)
    for layer, (k, v) in enumerate(x, 2):
        store.append(layer, put(xp, k[..., :30, :], "float16"), put(xp, v[..., :30, :], "float16"))
    half = x.astype(np.float16).astype(np.float64)
    want.prefill(*(part[0] for part in half[..., :30, :].reshape(4, 1, H, 30, D)))
    for t in range(30, 40):
        for layer, (k, v) in enumerate(x[..., t : t + 1, :], 2):
            store.append(layer, put(xp, k, "float16"), put(xp, v, "float16"))
        if t < 39:
            (ka, va), (kb, vb) = half[:, :, 0, :, t]
            want.step(ka[[0, 0, 1, 1]], ka, va, ka[[0, 0, 1, 1]], kb, vb)
    n_dense = want.tail["a"].k.shape[1] + 1  # the newest token waits
    m_k, m_v = want.n_retained("k"), want.n_retained("v")
    formula = pair_bytes(
        want.n_merged, H, D, m_k, m_v, granularity=want.granularity, how=want.how, n_dense=n_dense
    )
    if settings.get("retention") == "none":
        formula["thresholds"] = 0
    parts = store.report().parts
    slack = parts.pop("slack", 0)
    assert parts.pop("directions") == formula["direction"]
    assert parts.pop("norms", 0) == formula["norms"]
    assert parts.pop("thresholds", 0) == formula["thresholds"]
    assert parts.pop("window") == formula["dense"]
    assert parts.pop("retained", 0) == formula["retained"]
    assert not parts
    assert store.nbytes == sum(formula.values()) + slack


@pytest.mark.parametrize("decode_policy", ["buffer", "keep"])
@pytest.mark.parametrize("codec", ["kivi", "gear", "gear-l"])
def test_coded_directions_equal_the_loops(xp: ModuleType, codec: str, decode_policy: str) -> None:
    """Whole blocks are merged, and their directions, sqrt(D) times as long, are coded."""
    gear = {"gear.group_size": 8, "gear.buffer": 8, "gear.outliers": 0.25, "gear.prefill_rank": 2}
    if codec != "gear":
        gear = {key: value for key, value in gear.items() if codec == "gear-l" or "rank" not in key}
        gear.pop("gear.outliers")
    settings = {"minicache.decode_policy": decode_policy, **gear}
    method = parse(f"minicache+{codec}", settings)
    assert method.codec is not None
    fields = method.codec
    variant = {"kivi": "quant", "gear": "gear", "gear-l": "gear_l"}[codec]

    def coded(e: Any, role: str, index: int) -> Any:
        options = gear_oracle.Settings(
            variant=variant, k_group=8, v_group=8, buffer=8, outliers=fields.outliers, layer=2
        )
        rank = fields.prefill_rank if index == 0 else fields.rank
        x = e.swapaxes(0, 1) * math.sqrt(D)
        return gear_oracle.compress(x, role, options, rank, index).x.swapaxes(0, 1) / math.sqrt(D)

    want = MiniCachePair(scale=SCALE, decode_policy=decode_policy, buffer=8, codec=coded)
    store = KVStore(method, LAYERS)
    x = tokens(60)
    q = np.random.default_rng(1).standard_normal((40, 1, HQ, 1, D))
    step(xp, store, x[..., :20, :])
    want.prefill(*(part[0] for part in x[..., :20, :].reshape(4, 1, H, 20, D)))
    for i, t in enumerate(range(20, 60)):
        new = x[..., t : t + 1, :]
        got = step(xp, store, new, q[i])
        (ka, va), (kb, vb) = new[:, :, 0, :, 0]
        out = want.step(q[i, 0, :, 0], ka, va, q[i, 0, :, 0], kb, vb)
        for which in (0, 1):
            if xp.name == "numpy":
                rtol, atol = TOLERANCES["float32"]  # the power iteration starts in float32
                np.testing.assert_allclose(got[which][0, :, 0], out[which], rtol, atol)
            else:  # a code may flip on a tie
                assert np.abs(got[which][0, :, 0] - out[which]).mean() < 0.03
    assert store.report().parts["codes"] > 0


def test_retention_of_all_is_exact(xp: ModuleType) -> None:
    """gamma = 1 retains all, bit for bit, with tokens after the prompt left as they came."""
    x = tokens(20)
    q = np.random.default_rng(1).standard_normal((1, HQ, 1, D))
    method = parse("minicache", {"gamma": 1, "decode_policy": "keep"})
    stores = [KVStore(method, LAYERS), KVStore(parse("none"), LAYERS)]
    for store in stores:
        step(xp, store, x[..., :19, :])
    got, want = (step(xp, store, x[..., 19:, :], q) for store in stores)
    close(xp, got, want)
    assert stores[0].dense(2) is None
    for layer in (2, 3):
        for a, b in zip(stores[0].read(layer), stores[1].read(layer), strict=True):
            np.testing.assert_array_equal(xp.to_numpy(a), xp.to_numpy(b))


@pytest.mark.parametrize("prefill", ["exact", "stream"])
@pytest.mark.parametrize("text", ["minicache", "minicache+gear"])
def test_rows_and_padding_change_nothing(xp: ModuleType, text: str, prefill: str) -> None:
    gear = {"gear.group_size": 8, "gear.buffer": 8} if "gear" in text else {}
    pads, n = [0, 5, 17], 30
    x = tokens(n + 20, rows=3)
    q = np.random.default_rng(1).standard_normal((20, 3, HQ, 1, D))

    def run(rows: list[int], cut: int) -> Any:
        store = KVStore(parse(text, gear), LAYERS, prefill=prefill)
        part = x[:, :, rows]
        step(xp, store, part[..., cut:22, :], pads=[pads[row] - cut for row in rows])
        step(xp, store, part[..., 22:n, :], q=None)
        for t in range(n, n + 20):
            outs = step(xp, store, part[..., t : t + 1, :], q[t - n][rows])
        return outs

    together = run([0, 1, 2], 0)
    for row, pad in enumerate(pads):
        alone = run([row], pad)
        for which in (0, 1):
            close(xp, alone[which][0], together[which][row])


def test_trim_and_reorder(xp: ModuleType) -> None:
    x = tokens(40, rows=2)
    q = np.random.default_rng(1).standard_normal((1, 2, HQ, 1, D))

    def run(guess: int, rows: list[int]) -> Any:
        store = KVStore(parse("minicache"), LAYERS)
        step(xp, store, x[..., :20, :])
        step(xp, store, x[..., 20:21, :])
        store.reorder(rows)
        part = x[:, :, rows]
        for t in range(21, 35):
            at = [t, *range(39, 39 - guess, -1)]
            outs = step(xp, store, part[..., at, :], q[0][rows][:, :, [0] * len(at)])
            if guess:
                store.trim(guess)
        with pytest.raises(ConfigError, match="expected at most 1"):
            store.trim(2)
        return [out[:, :, :1] for out in outs]

    plain = run(0, [0, 1])
    for got, want in zip(run(3, [0, 1]), plain, strict=True):
        close(xp, got, want)
    for got, want in zip(run(0, [1, 1]), plain, strict=True):
        close(xp, got, want[[1, 1]])


def test_later_layers_alone_are_merged(xp: ModuleType) -> None:
    assert MiniCache().pairs(8) == ((4, 5), (6, 7))
    assert MiniCache().pairs(7) == ((3, 4), (5, 6))
    assert MiniCache(start=2).pairs(7) == ((2, 3), (4, 5))
    assert MiniCache(start=3).pairs(4) == ()
    store = KVStore(parse("minicache"), LAYERS)
    x = tokens(20)
    for t in (slice(0, 19), slice(19, 20)):
        for layer in range(LAYERS):
            k, v = x[layer % 2][..., t, :]
            store.append(layer, put(xp, k), put(xp, v))
    assert store.dense(0) is not None
    assert store.dense(1) is not None
    assert store.dense(2) is None
    assert store.dense(3) is None


def test_bad_numbers_name_their_layer(xp: ModuleType) -> None:
    x = tokens(20)
    x[1, 1, 0, 0, 3, 3] = np.nan
    store = KVStore(parse("minicache"), LAYERS)
    step(xp, store, x)
    with pytest.raises(KVCError, match="layer 3: expected finite numbers in v"):
        step(xp, store, x[..., :1, :])


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("minicache", {"t": "1.5"}, "t must be in 0 to 1, got 1.5"),
        ("minicache", {"how": "sum"}, "how must be slerp, mean, max-norm, got 'sum'"),
        ("minicache", {"decode_policy": "never"}, "decode_policy must be frozen, keep, buffer"),
        ("minicache+gear", {"minicache.decode_policy": "frozen"}, "set minicache.decode_policy"),
        ("minicache+kvsharer", {"kvsharer.map": "1:0"}, "both fill the seam layout"),
        ("minicache+kivi", {"gear.value_window": "sliding"}, "merged in whole blocks"),
    ],
)
def test_bad_methods(text: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, settings)


def test_start_must_be_a_layer() -> None:
    with pytest.raises(ConfigError, match="start must be below the model's 4 layers, got 4"):
        KVStore(parse("minicache", {"start": "4"}), 4)
