"""What `kvc tune` is made of: allocation against all choices, bytes against the model's own."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import numpy as np
import pytest

import kvc
from kvc import demo
from kvc.calibrate.rows import read_rows
from kvc.calibrate.tune import allocate, quality, sizes
from kvc.calibrate.tune.allocate import BITS, Item, Width, best_within, plans, settings_of
from kvc.calibrate.tune.quality import Level, Quality
from kvc.calibrate.tune.sizes import Sizes
from kvc.measure.choice import read_choice
from kvc.measure.divergence import divergence
from kvc.measure.held import hold
from kvc.measure.results import Results
from kvc.measure.tasks import DECODED
from kvc.methods import Gear
from tests.broken import break_codec
from tests.run_cli import both, need_backend
from tests.tolerances import LOGITS

T = 256
TEXT = demo.path() / "text.txt"


def engine_of(backend: str) -> Any:
    need_backend(backend)
    return kvc.load_engine(backend, str(demo.path()), "float32")


@pytest.fixture(scope="module")
def engine() -> Any:
    return engine_of("cpu")


@pytest.fixture(scope="module")
def ids(engine: Any) -> Any:
    return read_rows(engine, [TEXT], 2, T).ids


def random_items(seed: int, n: int) -> dict[Item, list[Width]]:
    rng = random.Random(seed)
    every: list[Item] = [(layer, role) for layer in range(n) for role in ("k", "v")]  # type: ignore[misc]
    return {
        item: [Width(bits, bits * rng.randint(5, 9), rng.random() / bits) for bits in BITS]
        for item in every
    }


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_bits_is_better(seed: int) -> None:
    items = random_items(seed, 3)
    front = plans(items, 10)
    every = [
        (10 + sum(w.nbytes for w in widths), sum(w.loss for w in widths))
        for widths in product(*items.values())
    ]
    for budget in range(40, 500, 7):
        fits = [loss for nbytes, loss in every if nbytes <= budget]
        found = best_within(front, budget)
        if not fits:
            assert found is None
            continue
        assert found is not None
        assert found.loss == pytest.approx(min(fits))
        bits = found.bits
        chosen = [next(w for w in items[item] if w.bits == bits[item]) for item in items]
        assert 10 + sum(w.nbytes for w in chosen) == found.nbytes <= budget
        assert sum(w.loss for w in chosen) == pytest.approx(found.loss)


def test_many_sums_are_thinned_and_stay_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(1, 8)
    best = plans(items)
    monkeypatch.setattr(allocate, "STEPS", 64)
    few = plans(items)
    assert len(few) <= 64 < len(best)
    for budget in range(best[0].nbytes, best[-1].nbytes, 50):
        exact, near = best_within(best, budget), best_within(few, budget)
        assert exact
        assert near
        assert near.loss <= 1.2 * exact.loss


@pytest.mark.parametrize("seed", range(20))
def test_bits_as_settings_come_back(seed: int) -> None:
    rng = random.Random(seed)
    layers = sorted(rng.sample(range(12), 7))
    bits: dict[Item, int] = {}
    for layer in layers:
        pair = rng.choice([(2, 2), (4, 2), (8, 4)])
        bits[layer, "k"], bits[layer, "v"] = pair
    codec = kvc.parse("kivi", settings_of(bits)).codec
    assert codec is not None
    for layer in layers:
        assert (codec.of(layer).k_bits, codec.of(layer).v_bits) == (
            bits[layer, "k"],
            bits[layer, "v"],
        )


CHOICES = (
    "none",
    "kivi k_bits=4 v_bits=2 layer_bits=0-2:8/4,5:2",
    "gear sink=4 window=16",
    "gear2 sink=0 window=32 layer_bits=3:8/8",
    "kcvt scale_dtype=float16 zero_dtype=float16",
    "token",
    "kvsharer",
    "kvsharer+kivi",
    "minicache+kivi",
    "h2o",
)


@both
@pytest.mark.parametrize("text", CHOICES)
def test_bytes_are_those_of_the_models_cache(backend: str, text: str) -> None:
    engine = engine_of(backend)
    row = read_rows(engine, [TEXT], 1, T).ids[0]
    method = read_choice(text).method
    report = hold(engine, row, method, T - DECODED).report
    found = Sizes(engine, row, T)
    assert found.dense == report.dense_bytes
    assert found.of(method) == report.nbytes


@pytest.mark.parametrize("text", ["kivi sink=4", "gear2 window=64", "gear-l", "kcvt"])
def test_bytes_at_long_contexts_lie_on_a_line(
    engine: Any, ids: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = read_choice(text).method.codec
    assert isinstance(codec, Gear)
    n = 2300
    expected = sizes._stored(codec, engine.shape, n)
    monkeypatch.setattr(sizes, "LONG", 1024)
    monkeypatch.setattr(sizes, "PERIOD", 256)
    assert sizes._layer.__wrapped__(codec, engine.shape, n) == expected


def test_the_full_cache_loses_nothing(engine: Any, ids: Any) -> None:
    score = Quality(engine, ids, Results())(read_choice("none"), Level(2, T))
    assert score.kl == pytest.approx(0, abs=LOGITS["exact"])
    assert score.ppl_increase == pytest.approx(0, abs=LOGITS["exact"])


@pytest.mark.parametrize("text", ["kivi", "kivi v_bits=4", "gear-l"])
def test_pieces_measure_what_single_tokens_do(engine: Any, ids: Any, text: str) -> None:
    choice = read_choice(text)
    score = Quality(engine, ids, Results())(choice, Level(2, T))
    found = divergence(engine, ids, choice.method, T // 2 - 1)
    assert found.kl.mean() > 1e-3
    assert score.kl == pytest.approx(found.kl.mean(), rel=0.15)
    assert score.nll == pytest.approx(found.nll.mean(), abs=0.01)


def test_rows_fed_apart_are_scored_alike(
    engine: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    together = Quality(engine, ids, Results(), told.append)(read_choice("kivi"), Level(2, T))
    assert sum(told) == 2 * T
    monkeypatch.setattr(quality, "batch_size", lambda *_: 1)
    apart = Quality(engine, ids, Results())(read_choice("kivi"), Level(2, T))
    assert apart.kl == pytest.approx(together.kl, rel=1e-3)
    assert apart.nll == pytest.approx(together.nll, rel=1e-4)


def test_what_was_measured_is_not_measured_again(
    engine: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results()
    first = Quality(engine, ids, results)(read_choice("kivi"), Level(1, T))
    monkeypatch.setattr(engine, "logits", None)
    assert Quality(engine, ids, results)(read_choice("kivi"), Level(1, T)) == first


def test_broken_scales_are_seen(engine: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Quality(engine, ids, Results())(read_choice("token"), Level(1, T))
    break_codec(monkeypatch)
    wrong = Quality(engine, ids, Results())(read_choice("token"), Level(1, T))
    assert wrong.kl > 10 * right.kl


def test_long_vocabularies_leave_fewer_positions() -> None:
    level = Level(4, 2048)
    assert quality.scored_tokens(level, 2048) == 1024
    assert quality.scored_tokens(level, 128256) == 256
    assert quality.scored_tokens(Level(32, 2048), 256000) == 64
    assert np.all([quality.scored_tokens(Level(1, n), 10) % 64 == 0 for n in (256, 300, 1000)])
