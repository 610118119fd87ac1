"""The error of each layer alone: against hand-made ones, at limits, and where nobody can ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvc
import kvc.demo
from kvc.errors import ConfigError
from kvc.measure.layers import check_layers, layer_errors
from kvc.measure.maps import layer_distances, retained_shares
from kvc.methods import Method
from tests.run_cli import need_backend
from tests.search_text import TEXT
from tests.tolerances import LOGITS

P, T = 60, 66


@pytest.fixture(scope="module")
def engine() -> Any:
    need_backend("cpu")
    return kvc.load_engine("cpu", str(kvc.demo.path()))


@pytest.fixture(scope="module")
def ids(engine: Any) -> Any:
    tokens = engine.encode(TEXT)
    return np.asarray([tokens[at : at + T] for at in (0, 80)], np.int32)


def dense(engine: Any, ids: Any) -> list[tuple[Any, Any]]:
    """K and V of every layer of the full model. [B, H, T, D]."""
    cache = engine.make_cache(kvc.parse("none"))
    engine.logits(ids, cache)
    return [tuple(x.numpy() for x in engine.store(cache).dense(layer)) for layer in range(8)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("none", {}), ("gear", {"outliers": 1}), ("h2o", {"heavy": 99, "recent": 99}),
     ("minicache", {"gamma": 1, "decode_policy": "keep"})],
    ids=str,
)  # fmt: skip
def test_nothing_is_lost_at_the_limits(
    engine: Any, ids: Any, name: str, settings: dict[str, Any]
) -> None:
    found = layer_errors(engine, ids, kvc.parse(name, settings), P)
    assert max(found.attention) < LOGITS["exact"]
    for errors in (found.k, found.v):
        assert errors is None or max(errors) < LOGITS["exact"]


def test_codes_cost_every_layer_the_more_the_fewer_bits(engine: Any, ids: Any) -> None:
    coarse, fine = (
        layer_errors(engine, ids, kvc.parse("kivi", {"bits": bits, "group_size": 16,
                                                     "buffer": 16}), P)
        for bits in (2, 8)
    )  # fmt: skip
    for name in ("attention", "k", "v"):
        pairs = zip(getattr(coarse, name), getattr(fine, name), strict=True)
        assert all(a > 20 * b > 0 for a, b in pairs)


def test_the_error_of_values_by_hand(engine: Any, ids: Any) -> None:
    """One-sided groups of 16 channels: 2 bits are four levels from the least to the largest."""
    method = kvc.parse("token", {"bits": 2, "group_size": 16, "buffer": T - 1})
    found = layer_errors(engine, ids[:, :T], method, T - 1)
    assert found.v is not None
    for layer, (_, v) in enumerate(dense(engine, ids)):
        x = v.astype("f8").reshape(*v.shape[:3], 4, 16)
        x, rest = x[:, :, : T - 1], x[:, :, T - 1 :]
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        step = (high - low) / 3
        off = np.rint((x - low) / step) * step + low - x
        want = np.sqrt((off**2).sum() / ((x**2).sum() + (rest**2).sum()))
        assert found.v[layer] == pytest.approx(want, rel=1e-4)


def test_a_sharer_reads_its_owner(engine: Any, ids: Any) -> None:
    found = layer_errors(engine, ids, kvc.parse("kvsharer", {"map": "7:0"}), P)
    (k0, _), (k7, _) = (dense(engine, ids)[layer] for layer in (0, 7))
    assert found.k is not None
    assert found.k[7] == pytest.approx(np.linalg.norm(k0 - k7) / np.linalg.norm(k7), rel=1e-4)
    assert max(found.k[:7]) < LOGITS["exact"] < found.attention[7]


def test_evicted_tokens_have_no_keys_to_compare(engine: Any, ids: Any) -> None:
    found = layer_errors(engine, ids, kvc.parse("h2o", {"heavy": 4, "recent": 4}), P)
    assert (found.k, found.v) == (None, None)
    assert min(found.attention) > 0.001


def test_attention_that_cannot_be_reached_is_refused() -> None:
    need_backend("cpu")
    from kvc.backends.torch.engine import Engine
    from tests.families_torch import tiny

    other: Any = Engine(tiny("falcon"), None, "cpu")
    with pytest.raises(ConfigError, match="layers: expected a model whose attention asks"):
        check_layers(other, np.arange(3, 11).reshape(1, 8))


def test_layers_distances_and_map(engine: Any, ids: Any) -> None:
    found = layer_distances(engine, ids, kvc.parse("kvsharer", {"map": "5:2"}))
    assert found is not None
    assert found["map"] == {"5": 2}
    apart = np.array(found["distances"])
    np.testing.assert_array_equal(apart, apart.T)
    assert (np.diag(apart) == 0).all()
    states = [[x[:, :, :64].mean(0, dtype="f8") for x in kv] for kv in dense(engine, ids[:, :64])]
    gaps = [np.linalg.norm(a - b, axis=-1).mean() for a, b in zip(*states[1:3], strict=True)]
    assert apart[1, 2] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert layer_distances(engine, ids, kvc.parse("gear")) is None


def test_retained_shares_are_those_of_the_store(engine: Any, ids: Any) -> None:
    method = kvc.parse("minicache", {"gamma": 0.3, "decode_policy": "keep"})
    found = retained_shares(engine, ids, method)
    assert found is not None
    assert found["pairs"] == [[4, 5], [6, 7]]
    shares = np.array(found["retained"])
    assert shares.shape == (2, 32)
    assert (shares[:, 0] > 1 / 3).all()  # the first token always stays, of two or three
    sizes = np.diff(np.linspace(0, T, 33).round())
    assert held(engine, ids, method) == round(float((shares * sizes).sum()) * 2 * 2 * 2)
    assert retained_shares(engine, ids, kvc.parse("gear")) is None


def held(engine: Any, ids: Any, method: Method) -> int:
    """Originals in the store, of keys and values of all rows, heads and pairs; [2, 2, 2] each."""
    cache = engine.make_cache(method)
    engine.logits(ids, cache)
    store = engine.store(cache)
    store.trim(0)
    engine.logits(ids[:, :1], cache)  # compresses the prompt
    entry = 4 + 2 * 64 * 4  # an index, and two vectors in float32
    return int(store.report().parts["retained"]) // entry
