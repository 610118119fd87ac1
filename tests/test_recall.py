"""Recall of planted facts: how they are planted, how answers are counted, what methods forget."""

from __future__ import annotations

import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvc
import kvc.demo
from kvc.errors import ConfigError, KVCError
from kvc.measure.facts import NAMES, NEAREST, plant
from kvc.measure.recall import recall
from kvc.text import split_start
from tests.backend_table import PROMPT
from tests.run_cli import need_backend

LENGTH, F = 280, 4
SIZE = {"n": 3, "length": LENGTH, "n_facts": F}


@pytest.fixture(scope="module")
def engine() -> Any:
    need_backend("cpu")
    return kvc.load_engine("cpu", str(kvc.demo.path()))


@pytest.fixture(scope="module")
def text(engine: Any) -> Any:
    """A text without facts, as tokens."""
    story = " ".join(s for s in re.split(r"(?<=\.) ", PROMPT) if "code of" not in s)
    return split_start(engine, engine.encode("\n\n".join([story] * 4)))[1]


class Stub:
    """An engine that foresees each token of known rows, but for some places in them."""

    context_length = None

    def __init__(self, inner: Any, ids: Any, wrong: set[tuple[int, int]]) -> None:
        self.inner, self.ids, self.wrong, self.fed = inner, ids, wrong, 0
        self.shape, self.tokenizer, self.encode = inner.shape, inner.tokenizer, inner.encode
        self.make_cache, self.store = inner.make_cache, inner.store

    def logits(self, ids: Any, cache: Any) -> Any:
        out = np.zeros((*ids.shape, self.shape.vocab_size), np.float32)
        for row in range(len(ids)):
            for i in range(ids.shape[1]):
                place = self.fed + i + 1
                token = (self.ids[row, place] + ((row, place) in self.wrong)) % out.shape[-1]
                out[row, i, token] = 1
        self.fed += ids.shape[1]
        return out


class Joining:
    """A tokenizer that joins up to three digits, and has other characters for tokens."""

    tokenizer = SimpleNamespace(bos_token_id=5000)

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r"\d{1,3}|\D", text)
        return [5000, *(int(p) + 1000 if p.isdigit() else ord(p) % 1000 for p in pieces)]


def test_every_fact_is_told_and_asked_for(engine: Any, text: Any) -> None:
    found = plant(engine, [text], 6, LENGTH, F, seed=3)
    assert found.ids.shape == (6, LENGTH)
    assert (found.ids[:, 0] == engine.tokenizer.bos_token_id).all()
    assert found.n_tokens == 4
    for row, told in zip(found.ids, found.told, strict=True):
        for tell, ask in zip(told, found.asked, strict=True):
            number = engine.tokenizer.decode(row[ask : ask + 4])
            assert re.fullmatch(r"\d{4}", number)
            assert engine.tokenizer.decode(row[tell : tell + 4]) == number
        said = engine.tokenizer.decode(row)
        names = re.findall(r" The code of (\w+) is \d{4}\.", said)
        assert len(names) == 2 * F
        assert names[:F][::-1] == names[F:]  # the one told last is asked for first
        assert set(names) <= set(NAMES)


def test_distances_are_log_uniform_from_the_nearest_on(engine: Any, text: Any) -> None:
    found = plant(engine, [text], 40, LENGTH, F)
    assert found.distances.min() >= NEAREST
    assert found.distances.max() < LENGTH
    assert all(a < b for row in found.distances for a, b in pairwise(row))
    assert abs(np.median(found.distances[:, 0]) - NEAREST) < NEAREST  # most of the nearest are near


def test_texts_take_turns_and_the_seed_decides(engine: Any, text: Any) -> None:
    other = text[::-1]
    a, again, b = (plant(engine, [text, other], 4, LENGTH, F, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(a.ids, again.ids)
    np.testing.assert_array_equal(a.told, again.told)
    assert (a.ids != b.ids).any()

    def pairs(tokens: Any) -> set[tuple[int, int]]:
        return {(int(x), int(y)) for x, y in pairwise(tokens)}

    for row, own, its in zip(a.ids, (text, other) * 2, (other, text) * 2, strict=True):
        seen = pairs(row[: a.context])
        assert len(seen & pairs(own)) > len(seen & pairs(its))


def test_facts_are_cut_alike_where_digits_are_joined() -> None:
    engine: Any = Joining()
    found = plant(engine, [list(range(64, 900))], 8, 600, 4)
    assert found.n_tokens == 2
    for row, told in zip(found.ids, found.told, strict=True):
        for tell, ask in zip(told, found.asked, strict=True):
            assert (row[ask : ask + 2] >= 1000).all()
            np.testing.assert_array_equal(row[ask : ask + 2], row[tell : tell + 2])


def test_answers_are_counted_by_digit_and_number(engine: Any, text: Any) -> None:
    planted = plant(engine, [text], 2, LENGTH, F, seed=5)
    first, last = int(planted.asked[0]), int(planted.asked[-1])
    wrong = {(0, first), (0, first + 2), (1, last + 3), (1, last + 4), (0, 7)}  # two are no digits
    stub: Any = Stub(engine, planted.ids, wrong)
    found = recall(stub, [text], kvc.parse("none"), n=2, length=LENGTH, n_facts=F, seed=5)
    assert found.facts == 2 * F == sum(b.facts for b in found.buckets)
    assert found.digits == pytest.approx(1 - 3 / (2 * F * 4))
    assert found.numbers == pytest.approx(1 - 2 / (2 * F))
    for bucket in found.buckets:
        inside = (planted.distances >= bucket.low) & (planted.distances < bucket.high)
        missed = 2 * int(inside[0, 0]) + inside[1, -1]
        facts = int(inside[0, 0]) + inside[1, -1]
        assert bucket.facts == inside.sum()
        assert bucket.digits == pytest.approx(1 - missed / (4 * bucket.facts))
        assert bucket.numbers == pytest.approx(1 - facts / bucket.facts)


def test_a_full_cache_recalls_and_a_small_one_forgets(engine: Any, text: Any) -> None:
    full = recall(engine, [text], kvc.parse("none"), **SIZE)
    small = kvc.parse("streaming", {"heavy": 2, "recent": 20})
    few = recall(engine, [text], small, **SIZE)
    assert full.buckets[0].low == NEAREST
    assert full.digits > 0.9  # guessing: 0.1
    assert full.numbers > 0.8
    assert few.digits < 0.4
    assert few.numbers < 0.1
    assert few.nbytes < few.dense_bytes / 10 < full.dense_bytes / 9


def test_batches_and_pieces_change_nothing(engine: Any, text: Any) -> None:
    method = kvc.parse("h2o", {"heavy": 40, "recent": 40})
    found = [recall(engine, [text], method, **SIZE, step=6, batch=b) for b in (None, None, 2)]
    assert found[0] == found[1] == found[2]
    plain = kvc.parse("none")
    one = recall(engine, [text], plain, **SIZE, step=LENGTH)
    streamed = recall(engine, [text], plain, **SIZE, step=9, prefill="stream", chunk=64)
    assert one.buckets == streamed.buckets


def test_backends_agree(engine: Any, text: Any) -> None:
    need_backend("mlx")
    other = kvc.load_engine("mlx", str(kvc.demo.path()), "float32")
    method = kvc.parse("h2o", {"heavy": 40, "recent": 40})
    size = {"n": 2, "length": 150, "n_facts": 2, "step": 5}
    assert recall(engine, [text], method, **size) == recall(other, [text], method, **size)


@pytest.mark.parametrize(
    ("how", "says"),
    [({"n": 0}, "recall: n: expected at least 1, got 0"),
     ({"n_facts": 0}, "recall: n_facts: expected at least 1, got 0"),
     ({"step": 0}, "recall: step: expected at least 1, got 0"),
     ({"length": 150}, "expected rows of at least 186 tokens for 4 facts, got 150"),
     ({"length": 3000}, "recall: expected texts of at least"),
     ({"n_facts": 60}, "expected 60 names that make facts of one length"),
     ({"texts": []}, "recall: expected a text, got none"),
     ({"texts": [[5] * 5000], "length": 4097}, "recall: expected rows of at most 4096 tokens")],
    ids=str,
)  # fmt: skip
def test_refusals_are_one_line(engine: Any, text: Any, how: dict[str, Any], says: str) -> None:
    arguments = {"texts": [text], "n": 1, "length": LENGTH, "n_facts": F, **how}
    with pytest.raises(ConfigError) as error:
        recall(engine, arguments.pop("texts"), kvc.parse("none"), **arguments)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_nan_is_an_error(engine: Any, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine.logits
    monkeypatch.setattr(engine, "logits", lambda *args: right(*args) * float("nan"))
    with pytest.raises(KVCError, match="recall: expected finite logits"):
        recall(engine, [text], kvc.parse("none"), n=1, length=LENGTH, n_facts=F)


def test_a_tokenizer_without_digits_is_refused() -> None:
    engine: Any = Joining()
    engine.encode = lambda text: [5000, *[7] * len(text.split())]
    with pytest.raises(ConfigError, match="tells digits apart"):
        plant(engine, [[7] * 900], 1, 600, 2)
