"""`kvc tune`'s search on the bundled model: budgets, presets on another text, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import kvc
from kvc import demo
from kvc.calibrate.rows import Rows, read_rows
from kvc.calibrate.tune.others import others
from kvc.calibrate.tune.quality import Level, Quality, Score
from kvc.calibrate.tune.run import Goal, Tuned, tune
from kvc.calibrate.tune.search import Search
from kvc.calibrate.tune.sizes import Sizes
from kvc.calibrate.tune.space import exacts, kinds, read_methods
from kvc.calibrate.tune.widen import wider
from kvc.errors import ConfigError
from kvc.files import write_profile
from kvc.measure.choice import read_choice
from kvc.measure.held import hold
from kvc.measure.results import Results
from kvc.measure.tasks import DECODED
from kvc.methods import PRESETS, Less
from tests.run_cli import need_backend
from tests.search_text import TEXT as OTHER

T = 512
TEXT = demo.path() / "text.txt"
CODECS = ("kivi", "kcvt")  # presets enough to choose from, few enough to be quick
BUDGET = 0.25


@pytest.fixture(scope="module")
def engine() -> Any:
    need_backend("cpu")
    return kvc.load_engine("cpu", str(demo.path()), "float32")


@pytest.fixture(scope="module")
def rows(engine: Any) -> Rows:
    return read_rows(engine, [TEXT], 2, T)


@pytest.fixture(scope="module")
def results() -> Results:
    """Scores that several tests make, made once."""
    return Results()


def search(engine: Any, rows: Rows, results: Results, presets: Any = CODECS) -> Search:
    return Search(engine, rows, T, presets, results)


@pytest.fixture(scope="module")
def tuned(engine: Any, rows: Rows, results: Results) -> Tuned:
    return tune(search(engine, rows, results), rows, Goal(memory=BUDGET), "bundled")


def test_the_profile_meets_its_budget_on_another_text(
    engine: Any, tuned: Tuned, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, tuned.profile)
    method = kvc.parse(f"@{path}")
    ids = engine.encode(OTHER * 2)[:T]
    report = hold(engine, ids, method, T - DECODED).report
    assert report.nbytes == tuned.profile.measured["nbytes"]
    assert 0.9 * BUDGET <= report.nbytes / report.dense_bytes <= BUDGET


def test_no_preset_of_as_many_bytes_is_better_on_another_text(
    engine: Any, rows: Rows, tuned: Tuned, tmp_path: Path
) -> None:
    text = tmp_path / "other.txt"
    text.write_text(OTHER * 2, encoding="utf-8")
    other = Quality(engine, read_rows(engine, [text], 1, T).ids, Results())
    level = Level(1, T)
    best = other(tuned.best.choice, level)
    sizes = search(engine, rows, Results()).sizes
    beaten = []
    for name, (kind, _) in PRESETS.items():
        if name == "none" or kind is Less:
            continue
        choice = read_choice(name)
        if sizes.of(choice.method) <= tuned.best.nbytes:
            beaten.append(name)
            assert other(choice, level).kl > best.kl, name
    assert {"kivi", "kcvt"} <= {*beaten}


def test_it_is_the_best_that_was_measured(tuned: Tuned) -> None:
    shares = [point["share"] for point in tuned.profile.front]
    losses = [point["kl"] for point in tuned.profile.front]
    assert shares == sorted(shares)
    assert losses == sorted(losses, reverse=True)
    assert len(shares) > 2
    measured = tuned.profile.measured
    assert measured["nbytes"] == pytest.approx(
        measured["fixed_bytes"] + T * measured["bytes_per_token"], abs=1
    )
    assert measured["quality"]["ppl"] == pytest.approx(math.exp(tuned.best.score.nll), rel=1e-9)
    assert kvc.parse(tuned.profile.method, tuned.profile.settings) == tuned.best.choice.method


def test_the_same_search_finds_the_same(
    engine: Any, rows: Rows, results: Results, tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = search(engine, rows, results)
    monkeypatch.setattr(engine, "logits", None)  # every score is there
    best = again.within(BUDGET * again.sizes.dense)
    assert best == tuned.best._replace(kind=best.kind)
    assert again.front(best) == [
        tried._replace(kind=other.kind)
        for tried, other in zip(tuned.front, again.front(best), strict=True)
    ]


def test_layers_that_bear_less_get_more_bits(
    engine: Any, rows: Rows, results: Results, tuned: Tuned
) -> None:
    again = search(engine, rows, results)
    sensitivity = again.sensitivities[""]
    kind = again.kinds[""][0]
    found = sensitivity.by_layer
    for plan in sensitivity.plans(kind):
        if {*plan.bits.values()} != {2, 4}:
            continue
        for role in ("k", "v"):
            loss = {item: found[item, 2] - found[item, 4] for item in plan.bits if item[1] == role}
            two = [loss[item] for item in loss if plan.bits[item] == 2]
            four = [loss[item] for item in loss if plan.bits[item] == 4]
            assert max(two, default=0) <= 1.05 * min(four, default=math.inf)
    losses = [plan.loss for plan in sensitivity.plans(kind)]
    assert losses == sorted(losses, reverse=True)


def test_what_is_foretold_is_what_is_measured_where_all_layers_are_alike(
    engine: Any, rows: Rows, results: Results, tuned: Tuned
) -> None:
    again = search(engine, rows, results)
    sensitivity, kind = again.sensitivities[""], again.kinds[""][0]
    least = sensitivity.plans(kind)[0]
    assert {*least.bits.values()} == {2}
    measured = again.quality(kind.uniform(2, 2), again.low).kl
    assert least.loss == pytest.approx(measured, rel=0.5)  # keys' and values' errors add up


def test_a_perplexity_is_met_with_few_bytes(engine: Any, rows: Rows, results: Results) -> None:
    again = search(engine, rows, results)
    loose, tight = again.for_increase(0.02), again.for_increase(0.002)
    assert loose.score.ppl_increase <= 0.02
    assert tight.score.ppl_increase <= 0.002
    assert loose.nbytes <= tight.nbytes < again.sizes.dense


def test_a_perplexity_that_nothing_reaches_is_one_line(
    engine: Any, rows: Rows, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = search(engine, rows, results)
    monkeypatch.setattr(Score, "ppl_increase", property(lambda self: 0.5))
    with pytest.raises(ConfigError, match=r"at most 1% above the full cache's, found 50% at best"):
        again.for_increase(0.01)


def test_a_budget_below_the_least_is_one_line_before_any_work(
    engine: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = search(engine, rows, Results())
    monkeypatch.setattr(engine, "logits", None)
    nbytes, name = again.least()
    with pytest.raises(ConfigError) as error:
        again.within(nbytes - 1)
    assert f"the least that these methods have ({name}: {nbytes} bytes)" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_map_of_layers_is_searched_where_one_is_there(engine: Any, rows: Rows) -> None:
    again = search(engine, rows, Results(), read_methods("kivi,kvsharer"))
    assert {*again.kinds} == {"", "kvsharer"}
    shared, alone = (again.sensitivities[layout] for layout in ("kvsharer", ""))
    assert len(shared.layers) == 6 < len(alone.layers)
    least, name = again.least()
    assert name == "kvsharer+kivi in 2 bits"
    assert least < search(engine, rows, Results(), ("kivi",)).least()[0]


def test_eviction_is_searched_only_if_asked(engine: Any, rows: Rows) -> None:
    every = read_methods(None)
    assert not {"h2o", "tova", "streaming", "less"} & {*every}
    asked = search(engine, rows, Results(), read_methods("streaming"))
    budget = 0.3 * asked.sizes.dense
    best = asked.within(budget)
    assert best.choice.name in ("streaming", "streaming+token")
    assert 0.8 * budget <= best.nbytes <= budget
    assert asked.front(best)[-1].nbytes <= budget


def test_merged_layers_are_tried_where_they_are_good(engine: Any, rows: Rows) -> None:
    again = search(engine, rows, Results(), read_methods("kivi,minicache"))
    sizes, quality, few = again.sizes, again.quality, again.kinds[""][:1]

    def found(share: float, bound: float) -> list[str]:
        budget = share * sizes.dense
        every = others(sizes, quality, again.low, again.presets, few, budget, bound)
        choices = list(every)
        assert all(sizes.of(choice.method) <= budget for choice in choices)
        return [choice.name for choice in choices]

    assert found(0.9, math.inf) == ["kivi", "minicache", "minicache+kivi"]
    assert found(0.5, math.inf) == ["kivi", "minicache+kivi"]
    assert found(0.9, 1e-6) == ["kivi"]


@pytest.mark.parametrize("text", ["kivi", "gear2", "kvsharer+kcvt"])
def test_room_that_is_left_goes_to_newest_tokens(engine: Any, rows: Rows, text: str) -> None:
    sizes = Sizes(engine, rows.ids[0], T)
    choice = read_choice(text)
    budget = sizes.of(choice.method) + 0.1 * sizes.dense
    found = wider(sizes, choice, budget)
    assert found is not None
    assert found.method.codec is not None
    assert choice.method.codec is not None
    assert found.method.codec.window > choice.method.codec.window
    assert 0.97 * budget <= sizes.of(found.method) <= budget
    assert wider(sizes, choice, sizes.of(choice.method)) is None
    assert wider(sizes, read_choice("h2o"), budget) is None


def test_interrupted_it_goes_on(engine: Any) -> None:
    rows, results = read_rows(engine, [TEXT], 1, 256), Results()
    first = Search(engine, rows, 256, ("kivi",), results)
    budget = 0.4 * first.sizes.dense

    def stop(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if len(results.rows) == 12:
            raise KeyboardInterrupt

    first.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        first.within(budget)
    before = dict(results.rows)
    assert len(before) == 12
    best = Search(engine, rows, 256, ("kivi",), results).within(budget)
    assert {key: results.rows[key] for key in before} == before
    fresh = Search(engine, rows, 256, ("kivi",), Results()).within(budget)
    assert best[:3] == fresh[:3]


def test_rows_that_are_too_short_are_refused(engine: Any) -> None:
    short = read_rows(engine, [TEXT], 1, 128)
    with pytest.raises(ConfigError, match="rows of at least 256 tokens, got 128"):
        search(engine, short, Results())


def test_methods_that_leave_nothing_are_refused(engine: Any, rows: Rows) -> None:
    with pytest.raises(ConfigError, match="--methods: expected some of kivi,"):
        read_methods("kivi,gears")
    with pytest.raises(ConfigError, match="code or evict, and that this llama model takes"):
        search(engine, rows, Results(), ("minicache",))


def test_kinds_fit_the_models_heads(engine: Any) -> None:
    from dataclasses import replace

    shape = replace(engine.shape, head_dim=80, dtype_bytes=2)
    found = kinds(shape, read_methods(None))
    assert {"kivi", "kcvt", "token"} <= {kind.name for kind in found}
    for kind in found:
        kind.codec.check(80)
        assert kind.codec.scale_dtype == ""
        for other in exacts(kind, shape):
            assert other.root is kind
    windows = {kind.codec.window for kind in exacts(found[0], shape)}
    assert {0, 128} <= windows


@pytest.mark.parametrize("given", [{}, {"memory": 0.5, "ppl_increase": 0.1}])
def test_one_goal_is_enough(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected --memory or --max-ppl-increase"):
        Goal(**given)


def test_what_a_model_needs_is_measured_and_said(engine: Any, tuned: Tuned) -> None:
    fit = tuned.fit
    assert fit.weights == sum(
        x.nbytes for x in {x.data_ptr(): x for x in engine.model.parameters()}.values()
    ) + sum(x.nbytes for x in engine.model.buffers())
    assert fit.cache == tuned.best.nbytes
    assert fit.needed == fit.weights + fit.cache + (fit.beside or 0)
    assert fit.fits
    assert not fit._replace(memory=fit.weights).fits
