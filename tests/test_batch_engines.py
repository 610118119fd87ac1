"""Batches of both engines: sequences that come and go get what `Engine.stream` gives them alone."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import kvc
import kvc.demo
from kvc.backends.sequences import Batch, Event
from kvc.errors import ConfigError, KVCError
from kvc.methods import parse
from tests.conftest import need
from tests.settings import lossy

TEXTS = (
    "The old man walked down to the harbour, and the boats lay still. He looked at",
    "The sea",
    "Once upon a time there was a king who had three daughters, and one day he said to them",
)
METHODS = {name: parse(name, lossy(16)[name]) for name in ("gear", "h2o", "minicache")}
GEAR, STEP = METHODS["gear"], 8


@pytest.fixture(scope="module", params=["mlx", "cpu"])
def engine(request: pytest.FixtureRequest) -> Any:
    need("mlx" if request.param == "mlx" else "torch")
    return kvc.load_engine(request.param, str(kvc.demo.path()), "float32")


@pytest.fixture(scope="module")
def prompts(engine: Any) -> list[list[int]]:
    return [engine.encode(text) for text in TEXTS]


def alone(engine: Any, ids: list[int], cache: Any, n: int = 8, **sampling: Any) -> list[int]:
    given = {"temp": 0.0, "top_p": 1.0, "seed": None, **sampling}
    options: dict[str, Any] = {"prefill_step": STEP, "on_prefill": None, **given}
    return [piece.token for piece in engine.stream(ids, cache, max_tokens=n, **options)]


class Log:
    """What a batch has told up to now."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.events: list[Event] = []

    def run(self, steps: int = 1000) -> Log:
        for _ in range(steps):
            if not (new := self.batch.step()):
                break
            self.events += new
        return self

    def of(self, key: int, kind: str) -> list[Any]:
        return [event for event in self.events if (event.key, event.kind) == (key, kind)]

    def tokens(self, key: int) -> list[int]:
        return [event.piece.token for event in self.of(key, "token")]

    def text(self, key: int) -> str:
        return "".join(event.piece.text for event in self.of(key, "token"))


@pytest.mark.parametrize("name", METHODS)
def test_sequences_get_what_they_get_alone(engine: Any, prompts: Any, name: str) -> None:
    method = METHODS[name]
    sampling: list[dict[str, Any]] = [
        {}, {"temp": 0.9, "top_p": 0.8, "seed": 3}, {"temp": 1.1, "seed": 4},
    ]  # fmt: skip
    expected = [
        alone(engine, ids, engine.make_cache(method), **given)
        for ids, given in zip(prompts, sampling, strict=True)
    ]
    log = Log(engine.batch(limit=3, prefill_step=STEP))
    assert log.batch.batch_limit == 3
    keys = []
    for ids, given in zip(prompts, sampling, strict=True):
        keys.append(log.batch.add([ids], engine.make_cache(method), max_tokens=8, **given))
        log.run(4)
    log.run()
    assert [log.tokens(key) for key in keys] == expected
    for key, ids in zip(keys, prompts, strict=True):
        last = log.of(key, "prefill")[-1]
        assert last.done == last.total == len(ids)
        (end,) = log.of(key, "end")
        assert end.finish == "length"
        assert engine.store(end.cache).length() == len(end.ids)
        assert [*ids, *log.tokens(key)][: len(end.ids)] == list(end.ids)
        assert len(end.ids) >= len(ids) + 7
    assert engine.tokenizer.decode([*prompts[0], *expected[0]]).endswith(log.text(keys[0]))


def test_copies_of_a_prompts_beginning_go_on(engine: Any, prompts: Any) -> None:
    """Cut anywhere, lone tokens included: the answer is that of the prompt in one."""
    ids = prompts[2]
    expected = alone(engine, ids, engine.make_cache(GEAR))
    log, cuts = Log(engine.batch(prefill_step=STEP)), (0, 1, 11, 12, len(ids) - 1)
    segments = [ids[a:b] for a, b in pairwise((*cuts, len(ids)))]
    key = log.batch.add([*segments[:2], [], *segments[2:]], engine.make_cache(GEAR), max_tokens=8)
    log.run()
    assert log.tokens(key) == expected
    copies, last = log.of(key, "segment"), len(ids) - 1
    assert [(copy.index, len(copy.ids)) for copy in copies] == [(0, 1), (1, 11), (3, 12), (4, last)]
    again = [log.batch.add([ids[len(c.ids) :]], c.cache, max_tokens=8) for c in copies[1:]]
    log.run()
    assert [log.tokens(key) for key in again] == [expected] * 3


def test_second_turns_go_on_with_the_first_ones_cache(engine: Any, prompts: Any) -> None:
    own, more = engine.make_cache(GEAR), engine.encode(" and then")
    first = alone(engine, prompts[0], own)
    held = engine.store(own).length()
    expected = alone(engine, [*[*prompts[0], *first][held:], *more], own)
    log = Log(engine.batch(prefill_step=STEP))
    key = log.batch.add([prompts[0]], engine.make_cache(GEAR), max_tokens=8)
    other = log.batch.add([prompts[1]], engine.make_cache(GEAR), max_tokens=12)
    (end,) = log.run(8).run().of(key, "end")
    rest = [*prompts[0], *first][len(end.ids) :] + more
    key = log.batch.add([rest], end.cache, max_tokens=8)
    assert log.run().tokens(key) == expected
    assert len(log.tokens(other)) == 12


def test_stop_tokens_end_a_sequence(engine: Any, prompts: Any) -> None:
    expected = alone(engine, prompts[0], engine.make_cache(GEAR))
    stop = expected[3]
    log = Log(engine.batch(prefill_step=STEP))
    key = log.batch.add([prompts[0]], engine.make_cache(GEAR), max_tokens=8, stop_tokens=[stop])
    (end,) = log.run().of(key, "end")
    assert end.finish == "stop"
    assert log.tokens(key) == expected[: expected.index(stop) + 1]
    key = log.batch.add([prompts[0]], engine.make_cache(GEAR), max_tokens=1)
    assert log.run().tokens(key) == expected[:1]


def test_prompts_and_steps_take_turns(engine: Any, prompts: Any) -> None:
    log = Log(engine.batch(limit=2, prefill_step=STEP))
    first = log.batch.add([prompts[1]], engine.make_cache(GEAR), max_tokens=20)
    log.run(2)
    second, third = (
        log.batch.add([prompts[i]], engine.make_cache(GEAR), max_tokens=4) for i in (2, 0)
    )
    kinds = [(event.key, event.kind) for event in log.run(6).events[-6:]]
    assert {*kinds} == {(second, "prefill"), (first, "token")}
    assert all(a != b for a, b in pairwise(kinds))
    log.run()
    began = log.events.index(log.of(third, "prefill")[0])
    assert log.events.index(log.of(second, "end")[0]) < began  # there is room for two
    assert [len(log.tokens(key)) for key in (first, second, third)] == [20, 4, 4]


def test_sequences_can_be_removed_at_any_stage(engine: Any, prompts: Any) -> None:
    expected = alone(engine, prompts[0], engine.make_cache(GEAR), 12)
    log = Log(engine.batch(limit=3, prefill_step=STEP))
    running = log.batch.add([prompts[1]], engine.make_cache(GEAR), max_tokens=20)
    stays = log.batch.add([prompts[0]], engine.make_cache(GEAR), max_tokens=12)
    log.run(10)
    assert log.tokens(stays)
    prompting = log.batch.add([prompts[2]], engine.make_cache(GEAR), max_tokens=20)
    waiting = log.batch.add([prompts[2]], engine.make_cache(GEAR), max_tokens=20)
    log.run(2)
    assert log.of(prompting, "prefill")
    assert not log.of(waiting, "prefill")
    store = weakref.ref(row_store(engine, log.batch, running))
    gone = (running, prompting, waiting, running, 99)
    assert [log.batch.remove(key) is None for key in gone] == [False, True, True, True, True]
    gc.collect()
    assert store() is None
    told = len(log.events)
    log.run()
    assert {event.key for event in log.events[told:]} == {stays}
    assert log.tokens(stays) == expected


def test_a_removed_sequences_cache_goes_on(engine: Any, prompts: Any) -> None:
    log = Log(engine.batch(limit=2, prefill_step=STEP))
    log.batch.add([prompts[1]], engine.make_cache(GEAR), max_tokens=20)
    key = log.batch.add([prompts[0]], engine.make_cache(GEAR), max_tokens=20)
    while len(log.tokens(key)) < 5:
        log.run(1)
    end, made = log.batch.remove(key), len(log.tokens(key))
    assert end is not None
    assert (end.kind, end.finish) == ("end", None)
    assert engine.store(end.cache).length() == len(end.ids)
    expected = alone(engine, prompts[0], engine.make_cache(GEAR), 12)
    assert log.tokens(key) == expected[:made]
    rest = [*prompts[0], *expected[: made + 1]][len(end.ids) :]
    assert alone(engine, rest, end.cache, 11 - made) == expected[made + 1 :]


def row_store(engine: Any, batch: Any, key: int) -> Any:
    """The store of a sequence that runs."""
    if engine.name == "cpu":
        return batch._running[key].cache.store
    group = batch._runner._batch
    return group.prompt_cache[0].stores[group.uids.index(key)]


def damaged(engine: Any) -> Any:
    """A cache in which there is NaN."""
    cache, shape = engine.make_cache(GEAR), engine.shape
    nan = np.full((1, shape.n_kv_heads, 20, shape.head_dim), np.nan, "float32")
    if engine.name == "mlx":
        import mlx.core as mx

        for entry in cache:
            entry.update_and_fetch(mx.array(nan), mx.array(nan))
    else:
        import torch

        for layer in cache.layers:
            layer.update(torch.from_numpy(nan), torch.from_numpy(nan))
    return cache


def test_what_fails_in_one_sequence_ends_it_alone(engine: Any, prompts: Any) -> None:
    expected = alone(engine, prompts[0], engine.make_cache(GEAR), 12)
    log = Log(engine.batch(prefill_step=STEP))
    good = log.batch.add([prompts[0]], engine.make_cache(GEAR), max_tokens=12)
    log.run(4)
    bad = log.batch.add([prompts[1]], damaged(engine), max_tokens=12)
    wrong = log.batch.add([[10**9]], "no cache", max_tokens=12)
    log.run()
    assert log.tokens(good) == expected
    (said,) = log.of(bad, "error")
    assert isinstance(said.error, KVCError)
    assert "expected finite numbers" in str(said.error)
    assert len(log.of(wrong, "error")) == 1
    assert not log.of(bad, "end")


def test_step_that_fails_for_all_leaves_a_batch_that_works(
    engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(engine.batch(prefill_step=STEP))
    keys = [log.batch.add([ids], engine.make_cache(GEAR), max_tokens=12) for ids in prompts[:2]]
    while not all(map(log.tokens, keys)):
        log.run(1)
    with monkeypatch.context() as patch:
        patch.setattr(kvc.store.batch, "_row", None)
        log.run(1)
    assert [len(log.of(key, "error")) for key in keys] == [1, 1]
    assert log.batch.step() == []
    key = log.batch.add([prompts[1]], engine.make_cache(GEAR), max_tokens=4)
    assert len(log.run().tokens(key)) == 4


def test_what_cannot_be_is_refused_before_any_work(engine: Any) -> None:
    batch, cache = engine.batch(), engine.make_cache(GEAR)
    with pytest.raises(ConfigError, match="expected a token of the prompt"):
        batch.add([[], []], cache, max_tokens=4)
    with pytest.raises(ConfigError, match="max_tokens of one at least, got 0"):
        batch.add([[5]], cache, max_tokens=0)
    with pytest.raises(ConfigError, match="limit of one sequence at least, got 0"):
        engine.batch(limit=0)
    assert batch.step() == []
