"""Scores of answers come from the compressed cache, the first token's too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvc
import kvc.demo
from kvc.errors import ConfigError, KVCError
from kvc.measure.score import Pair, Scorer
from kvc.methods import parse
from tests.broken import break_codec
from tests.run_cli import PROMPT, both, need_backend
from tests.settings import lossless
from tests.tolerances import LOGITS

CODED = {"gear.group_size": 16, "gear.buffer": 16}
ENGINES: dict[str, Any] = {}


@pytest.fixture(params=["cpu", "mlx"])
def engine(request: pytest.FixtureRequest) -> Any:
    return engine_of(request.param)


def engine_of(backend: str) -> Any:
    need_backend(backend)
    if backend not in ENGINES:
        ENGINES[backend] = kvc.load_engine(backend, str(kvc.demo.path()))
    return ENGINES[backend]


def pairs(engine: Any) -> list[Pair]:
    context = engine.encode(f"It was a cold morning. {PROMPT}")
    texts = (" 4821", " 4812", " 7", ". It was", "", " 4")
    return [Pair(context, engine.tokenizer.encode(t, add_special_tokens=False)) for t in texts]


def scores(engine: Any, method: Any, asked: list[Pair], **kwargs: Any) -> list[Any]:
    found = dict(Scorer(engine, method, **kwargs).scores(asked))
    return [found[i] for i in range(len(asked))]


def test_without_a_method_they_are_those_of_one_pass(engine: Any) -> None:
    asked = pairs(engine)
    for (context, answer), score in zip(asked, scores(engine, parse("none"), asked), strict=True):
        ids = np.array([[*context, *answer]])
        cache = engine.make_cache(parse("none"))
        logits = np.asarray(engine.logits(ids[:, :-1], cache), np.float64)[0, len(context) - 1 :]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = sum(log_p[i, token] for i, token in enumerate(answer))
        assert score.log_prob == pytest.approx(own, abs=LOGITS["exact"] * max(1, len(answer)))
        assert score.greedy == all(log_p.argmax(-1)[: len(answer)] == answer)
    assert any(score.greedy for score in scores(engine, parse("none"), asked[:1]))


@pytest.mark.parametrize("name", ["gear", "minicache", "kvsharer", "h2o", "tova", "streaming"])
def test_lossless_limits_give_the_same(engine: Any, name: str) -> None:
    asked = pairs(engine)
    expected = scores(engine, parse("none"), asked)
    found = scores(engine, parse(name, lossless(16)[name]), asked)
    for a, b in zip(expected, found, strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=4 * LOGITS["coded"])
        assert a.greedy == b.greedy


def test_even_one_token_is_predicted_from_the_compressed_cache(engine: Any) -> None:
    asked = [Pair(context, answer[-1:]) for context, answer in pairs(engine) if answer]
    expected = scores(engine, parse("none"), asked)
    found = scores(engine, parse("kivi", CODED), asked)
    for a, b in zip(expected, found, strict=True):
        assert abs(a.log_prob - b.log_prob) > 1e-2


def test_a_broken_codec_is_seen(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, method = pairs(engine)[:2], parse("gear", {"bits": 8, **CODED})
    good = scores(engine, method, asked)
    full = scores(engine, parse("none"), asked)
    break_codec(monkeypatch)
    for a, b, c in zip(good, scores(engine, method, asked), full, strict=True):
        assert abs(a.log_prob - c.log_prob) < 0.1 * abs(b.log_prob - c.log_prob)


def test_backends_agree() -> None:
    found = []
    for backend in ("cpu", "mlx"):
        engine = engine_of(backend)
        found.append(scores(engine, parse("gear2", {**CODED, "sink": 4, "window": 16}),
                            pairs(engine)))  # fmt: skip
    for a, b in zip(*found, strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=4 * LOGITS["coded"])
        assert a.greedy == b.greedy


def test_rows_side_by_side_are_as_rows_alone(engine: Any) -> None:
    asked, method = pairs(engine)[:2] * 2, parse("kivi", CODED)
    alone = Scorer(engine, method, batch=1)
    together = Scorer(engine, method)
    one, many = (dict(scorer.scores(asked)) for scorer in (alone, together))
    for i in range(len(asked)):
        assert one[i].log_prob == pytest.approx(many[i].log_prob, abs=4 * LOGITS["coded"])
    assert (alone.caches, alone.dense_bytes) == (together.caches, together.dense_bytes)
    assert together.ratio > 1.2


@pytest.mark.parametrize("prefill", ["exact", "stream"])
def test_pieces(engine: Any, prefill: str) -> None:
    asked = pairs(engine)[:1]
    context, answer = asked[0]
    many = {"prefill": prefill, "prefill_step": 16}
    (full,) = scores(engine, parse("none"), asked, **many)
    assert full.log_prob == pytest.approx(
        scores(engine, parse("none"), asked)[0].log_prob, abs=4 * LOGITS["exact"]
    )
    (piece,) = scores(engine, parse("kivi", CODED), asked, step=8, **many)
    (single,) = scores(engine, parse("kivi", CODED), asked, **many)
    assert piece.log_prob == pytest.approx(single.log_prob, abs=4 * LOGITS["coded"])
    (bare,) = scores(engine, parse("none"), [Pair(context[:1], answer)], step=8)
    assert bare.log_prob < full.log_prob


def test_answers_end_where_they_are_asked_to(engine: Any) -> None:
    scorer = Scorer(engine, parse("none"))
    ids = engine.encode(PROMPT)
    whole = scorer.answer(ids, (), 8, 0.0, 1.0)
    assert whole.strip().startswith("4821")
    assert scorer.answer(ids, ("21", "zzz"), 8, 0.0, 1.0) == whole[: whole.index("21")]
    assert scorer.caches == 2


def test_errors() -> None:
    engine = engine_of("cpu")
    with pytest.raises(ConfigError, match="step: expected at least 1, got 0"):
        Scorer(engine, parse("none"), step=0)
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, got 0"):
        Scorer(engine, parse("none"), batch=0)
    with pytest.raises(ConfigError):
        Scorer(engine, parse("gear", {"group_size": 48}))


@both
def test_no_numbers(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(backend)
    logits = engine.logits
    monkeypatch.setattr(engine, "logits", lambda *args: logits(*args) * float("nan"))
    with pytest.raises(KVCError, match="scores: expected finite logits at tokens"):
        scores(engine, parse("none"), pairs(engine)[:1])
