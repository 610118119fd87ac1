"""Divergence beside the full cache, by hand and at its limits; free runs against forced ones."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import kvc
import kvc.demo
from kvc.errors import ConfigError, KVCError
from kvc.measure.divergence import Divergence, apart, divergence
from kvc.measure.perplexity import perplexity
from kvc.measure.runs import answers, continued, same_prefix
from tests.run_cli import need_backend
from tests.search_text import TEXT
from tests.tolerances import LOGITS

P, T = 40, 90
SMALL = {"heavy": 4, "recent": 8}


@pytest.fixture(scope="module")
def engine() -> Any:
    need_backend("cpu")
    return kvc.load_engine("cpu", str(kvc.demo.path()))


@pytest.fixture(scope="module")
def ids(engine: Any) -> Any:
    tokens = engine.encode(TEXT)
    return np.asarray([tokens[at : at + T] for at in (0, 60, 120)], np.int32)


def test_the_full_cache_does_not_diverge(engine: Any, ids: Any) -> None:
    found = divergence(engine, ids, kvc.parse("none"), P)
    assert abs(found.kl).max() < LOGITS["exact"]
    assert found.same.all()
    assert found.nbytes >= found.dense_bytes > 0


@pytest.mark.parametrize("name", ["h2o", "streaming"])
def test_what_predictions_cost_is_perplexity_behind_the_prompt(
    engine: Any, ids: Any, name: str
) -> None:
    method = kvc.parse(name, SMALL)
    found = divergence(engine, ids, method, P)
    expected = perplexity(engine, ids, method, prompt=P)
    np.testing.assert_allclose(found.nll, expected.rows[:, P:], atol=LOGITS["exact"])
    assert found.perplexity.mean() == pytest.approx(expected.mean(P), abs=LOGITS["exact"])
    assert (found.nbytes, found.dense_bytes) == (expected.nbytes, expected.dense_bytes)
    assert found.kl.max() > 0.01
    assert not found.same.all()


def test_batches_change_nothing(engine: Any, ids: Any) -> None:
    method = kvc.parse("h2o", SMALL)
    together, alone = (divergence(engine, ids, method, P, batch=b) for b in (None, 1))
    for name in ("nll", "kl"):
        got, expected = getattr(alone, name), getattr(together, name)
        np.testing.assert_allclose(got, expected, atol=LOGITS["exact"])
    np.testing.assert_array_equal(alone.same, together.same)
    assert alone.nbytes == together.nbytes


def test_divergence_by_its_definition(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    full, other = rng.standard_normal((2, 3, 1, 50)) * 4
    other[1] = full[1] + 7  # the same distribution
    x, y = (np.float64(z.astype("f4")) for z in (full, other))
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (x, y))
    want = (p * np.log(p / q)).sum(-1)[:, 0]
    kl, same = apart(*(xp.from_numpy(z.astype("f4")) for z in (full, other)))
    np.testing.assert_allclose(kl, want, atol=1e-5)
    np.testing.assert_array_equal(same, (x.argmax(-1) == y.argmax(-1))[:, 0])
    assert same[1]
    assert not same.all()


def test_buckets_are_equal_parts_and_all_of_it() -> None:
    rows = np.arange(20.0).reshape(2, 10)
    found = Divergence(7, rows, rows, rows > 3, 1, 2)
    parts = list(found.buckets(4))
    assert [(start, stop) for start, stop, _ in parts] == [(7, 9), (9, 12), (12, 15), (15, 17)]
    taken = [rows[:, at] for _, _, at in parts]
    np.testing.assert_array_equal(np.concatenate(taken, 1), rows)
    assert len(list(found.buckets(99))) == 10


def greedy(engine: Any, prompt: Any, method: Any, n: int) -> list[int]:
    """What the library's own loop writes."""
    pieces = engine.stream(
        prompt.tolist(), engine.make_cache(method), max_tokens=n, temp=0.0, top_p=1.0, seed=None,
        prefill_step=512, on_prefill=None,
    )  # fmt: skip
    return [piece.token for piece in pieces]


def test_the_full_model_writes_what_its_library_does(engine: Any, ids: Any) -> None:
    found = continued(engine, ids[:, :P], 12)
    np.testing.assert_array_equal(found[:, :P], ids[:, :P])
    for row, prompt in zip(found, ids, strict=True):
        assert row[P:].tolist() == greedy(engine, prompt[:P], kvc.parse("none"), 12)


@pytest.mark.parametrize("name", ["streaming", "h2o"])
def test_a_forced_run_tells_when_a_free_one_parts(engine: Any, ids: Any, name: str) -> None:
    method, n = kvc.parse(name, SMALL), 16
    rows = continued(engine, ids[:, :P], n)
    found = 1 + same_prefix(divergence(engine, rows, method, P))
    for row, prompt, length in zip(rows, ids, found, strict=True):
        free = greedy(engine, prompt[:P], method, n)
        same = [a == b for a, b in zip(free, row[P:], strict=True)]
        assert length == (same.index(False) if False in same else n)
    assert found.min() < n


def test_samples_follow_the_seed(engine: Any, ids: Any) -> None:
    a, again, b = (continued(engine, ids[:, :P], 12, temp=1.0, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()


def test_samples_have_the_models_probabilities(engine: Any, ids: Any) -> None:
    prompts = np.repeat(ids[:1, :P], 400, 0)
    counts = np.bincount(continued(engine, prompts, 1, temp=0.3)[:, P], minlength=2048) / 400
    logits = engine.logits(ids[:1, :P], engine.make_cache(kvc.parse("none")))[0, -1].double()
    p = (logits / 0.3).softmax(-1).numpy()
    assert abs(counts - p).max() < 4 * math.sqrt(p.max() / 400)  # four standard errors
    assert np.corrcoef(counts, p)[0, 1] > 0.9


def test_answers_are_counted_until_their_end(engine: Any, ids: Any) -> None:
    method = kvc.parse("none")
    found = answers(engine, ids[:, :P], method, 9)
    assert found.tokens.tolist() == [9, 9, 9]
    assert found.ended == 0.0
    third = greedy(engine, ids[0, :P], method, 9)[2]
    config = engine.model.generation_config
    before, config.eos_token_id = config.eos_token_id, third
    try:
        found = answers(engine, ids[:1, :P], method, 9)
    finally:
        config.eos_token_id = before
    assert found.tokens.tolist() == [3]
    assert found.ended == 1.0


@pytest.mark.parametrize(
    ("how", "says"),
    [({"prompt": 0}, "divergence: prompt: expected 1 to"),
     ({"prompt": T - 1}, f"divergence: prompt: expected 1 to {T - 2}, got {T - 1}"),
     ({"batch": 0}, "divergence: batch: expected at least 1, got 0")],
    ids=str,
)  # fmt: skip
def test_refusals_are_one_line(engine: Any, ids: Any, how: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        divergence(engine, ids, kvc.parse("none"), **{"prompt": P, **how})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_nan_is_an_error(engine: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine.logits
    monkeypatch.setattr(engine, "logits", lambda *args: right(*args) * math.nan)
    with pytest.raises(KVCError, match=f"divergence: expected finite logits at tokens {P} to {P}"):
        divergence(engine, ids, kvc.parse("none"), P)
    with pytest.raises(KVCError, match="runs: expected finite logits"):
        continued(engine, ids[:, :P], 2)
