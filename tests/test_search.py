"""KVSharer's search: distances and rankings by the oracle, greedy acceptance on models."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvc
from kvc import demo
from kvc.backends.base import FULL, Engine, ModelShape
from kvc.calibrate.kvsharer.distances import DISTANCES, Mean, States, measure, ranked
from kvc.calibrate.kvsharer.likeness import passes, pieces, similarity
from kvc.calibrate.kvsharer.search import Search, Settings
from kvc.calibrate.rows import Rows, read_rows
from kvc.errors import ArtifactError, ConfigError, KVCError
from kvc.files import read_map
from kvc.methods import parse
from kvc.store.store import KVStore
from tests.conftest import need
from tests.oracles import kvsharer as oracle
from tests.search_text import text_file

K = np.array([[[[0, 0], [0, 0]]], [[[3, 4], [0, 0]]], [[[0, 0], [6, 8]]]], float)
V = np.array([[[[1, 0], [0, 0]]], [[[1, 0], [0, 0]]], [[[1, 0], [0, 2]]]], float)


def states(k: Any, v: Any) -> dict[int, States]:
    return {i: States(k[i], v[i]) for i in range(len(k))}


def some_states(seed: int, n_layers: int = 6) -> tuple[Any, Any]:
    return tuple(np.random.default_rng(seed).standard_normal((2, n_layers, 2, 5, 8)))


def load(backend: str) -> Engine:
    need("mlx" if backend == "mlx" else "torch")
    return kvc.load_engine(backend, str(demo.path()), "float32")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load("cpu")


@pytest.fixture(scope="module")
def rows(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return read_rows(engine, [text_file(tmp_path_factory.mktemp("text"))], 4, 24)


def done(search: Search, checkpoint: Path | None = None) -> Search:
    for _ in search.run(checkpoint):
        pass
    return search


# Distances and rankings


def test_three_layers_by_hand() -> None:
    found = measure(states(K, V))
    # K: 5/2, 10/2, (5+10)/2; V: 0, 2/2, 2/2; half their sums.
    assert found == {(1, 0): 1.25, (2, 0): 3.0, (2, 1): 4.25}
    assert list(ranked(found)) == [(2, 1), (2, 0), (1, 0)]
    assert list(ranked(found, "similar")) == [(1, 0), (2, 0), (2, 1)]
    flat = measure(states(K, V), "flat")
    assert flat == {(1, 0): 2.5, (2, 0): 5.83095, (2, 1): 6.34429}  # |(3, 4)| / 2, sqrt 34, ...
    # Mean norms: of K 0, 5/2 and 5, of V 1/2, 1/2 and 3/2. K of the layers 1 and 2 becomes vectors
    # of length 2, one each; V (2, 0) and (2/3, 4/3), one in each of two positions.
    normal = measure(states(K, V), "normalized")
    assert normal == {(1, 0): 0.5, (2, 0): 1.16667, (2, 1): 1.66667}


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_distances_and_rankings_are_the_oracles(seed: int, n_layers: int) -> None:
    k, v = some_states(seed, n_layers)
    for how in ("positionwise", "flat"):
        expected, found = oracle.distances(k, v, how), measure(states(k, v), how)
        assert len(found) == n_layers * (n_layers - 1) // 2
        for pair, distance in found.items():
            np.testing.assert_allclose(distance, expected[pair], rtol=1e-5)
        assert list(ranked(found)) == oracle.rank_pairs(expected)
        assert list(ranked(found, "similar")) == oracle.rank_pairs(expected, "ascending")


def test_equal_distances_go_by_the_layers() -> None:
    distances = {(2, 1): 1.0, (2, 0): 1.0, (1, 0): 1.0, (3, 0): 2.0}
    assert list(ranked(distances)) == [(3, 0), (1, 0), (2, 0), (2, 1)]
    assert list(ranked(distances, "similar")) == [(1, 0), (2, 0), (2, 1), (3, 0)]


def test_a_random_order_is_the_seeds() -> None:
    distances = measure(states(*some_states(0)))
    orders = [list(ranked(distances, "random", seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == sorted(distances) for order in orders)
    assert orders[0] != list(ranked(distances))


@pytest.mark.parametrize("how", DISTANCES)
def test_scale_changes_no_ranking(how: str) -> None:
    k, v = some_states(1)
    once, more = measure(states(k, v), how), measure(states(64 * k, 64 * v), how)
    assert list(ranked(once)) == list(ranked(more))
    if how == "normalized":  # and a layer's own scale changes nothing either
        k[3] *= 1024
        assert measure(states(k, v), how) == once


def test_layers_of_other_shapes_are_no_pairs() -> None:
    k, v = some_states(2, 3)
    of = states(k, v)
    of[1] = States(k[1][..., :4], v[1][..., :4])
    assert list(measure(of)) == [(2, 0)]


def test_silent_layers_have_a_distance() -> None:
    assert measure(states(K * 0, V * 0), "normalized") == {(1, 0): 0, (2, 0): 0, (2, 1): 0}


def test_means_are_the_oracles() -> None:
    sentences = np.random.default_rng(3).standard_normal((5, 2, 2, 4, 8)).astype("float16")
    mean = Mean()
    for some in (sentences[:3], sentences[3:]):
        store = KVStore(parse("none"), 2)
        for layer in (0, 1):
            store.append(layer, some[:, layer], -some[:, layer])
        mean.add(store, (2, 5))  # as the model numbers them
    expected = oracle.mean_states(list(sentences))
    found = mean.states()
    assert sorted(found) == [2, 5]
    for place, number in enumerate((2, 5)):
        np.testing.assert_allclose(found[number].k, expected[place], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[number].v, -expected[place], rtol=1e-5, atol=1e-6)


# Likeness


@pytest.mark.parametrize("how", ["per_sentence", "mean_repr"])
def test_similarities_are_the_oracles(how: str) -> None:
    a, b = np.random.default_rng(4).standard_normal((2, 3, 4, 8)).astype("float32")
    found = similarity(a.reshape(3, -1), b.reshape(3, -1), how)
    assert found == round(oracle.similarity(list(a), list(b), how), 6)
    assert similarity(a.reshape(3, -1), 2 * a.reshape(3, -1), how) == 1


def test_states_without_numbers_are_like_nothing() -> None:
    a = np.ones((2, 4), "float32")
    for wrong in (np.nan, np.inf, 0):
        assert similarity(a, a * np.float32(wrong)) == -1


@given(st.integers(4, 300))
def test_pieces_are_the_sentence(length: int) -> None:
    cuts = pieces(length)
    assert cuts[0] == slice(0, (length + 1) // 2)
    assert [token for cut in cuts for token in range(length)[cut]] == list(range(length))
    assert all(cut.stop - cut.start > 1 for cut in cuts)


# The search


def test_acceptance_is_the_oracles(engine: Engine, rows: Rows) -> None:
    """The oracle asks for the likeness of each map in a pass of its own."""

    def last(method: str, **settings: str) -> list[Any]:
        cache = engine.make_cache(parse(method, settings))
        return list(np.asarray(engine.hidden(rows.ids, cache)))

    full, likeness = last("none"), []

    def ask(owners: tuple[int, ...]) -> float:
        text = ",".join(f"{i}:{owner}" for i, owner in enumerate(owners))
        likeness.append(round(oracle.similarity(full, last("kvsharer", map=text)), 6))
        return likeness[-1]

    first = done(Search(engine, rows, Settings(0.125, threshold=-1)))
    threshold = first.tried[0].similarity  # it is not above itself
    search = done(Search(engine, rows, Settings(0.375, threshold=threshold)))
    expected = oracle.greedy(list(search.ranked), 8, 3, ask, threshold)
    assert [tried[:2] for tried in search.tried] == expected.tried
    assert [tried[:2] for tried in search.accepted] == expected.accepted
    assert search.owners == expected.map
    assert len(expected.tried) > len(expected.accepted) > 0
    np.testing.assert_allclose([t.similarity for t in search.tried], likeness, atol=2e-6)


@pytest.mark.parametrize("order", ["dissimilar", "similar", "random"])
def test_below_every_threshold_the_first_are_taken(
    engine: Engine, rows: Rows, order: str, tmp_path: Path
) -> None:
    search = done(Search(engine, rows, Settings(0.875, threshold=-1, order=order, seed=1)))
    expected = oracle.greedy(list(search.ranked), 8, 7, lambda _: 1.0, -1)
    assert search.owners == expected.map == (0,) * 8
    assert [tried[:2] for tried in search.tried] == expected.accepted
    search.write(tmp_path / "map.json", "a note")
    file = read_map(tmp_path / "map.json")
    assert (file.owners, file.model, file.note) == (
        expected.map,
        engine.shape.fingerprint,
        "a note",
    )
    assert file.calibration == rows.digest
    kept = {key: file.config[key] for key in ("share", "n_sharers", "order", "seed", "length")}
    assert kept == {"share": 0.875, "n_sharers": 7, "order": order, "seed": 1, "length": 24}
    assert [tuple(pair.values()) for pair in file.config["accepted"]] == [
        tried[:4] for tried in search.accepted
    ]


def test_above_every_threshold_there_is_no_map(engine: Engine, rows: Rows, tmp_path: Path) -> None:
    search = done(Search(engine, rows, Settings(0.25, threshold=1.01)))
    assert len(search.tried) == len(search.ranked) == 28
    assert search.owners == tuple(range(8))
    with pytest.raises(ConfigError, match=r"none of 28 pairs is above the threshold 1\.01"):
        search.write(tmp_path / "map.json")
    assert list(tmp_path.iterdir()) == []


def test_backends_find_the_same_map(engine: Engine, rows: Rows) -> None:
    mlx = load("mlx")
    settings = Settings(0.25, threshold=0.9)
    a, b = (done(Search(e, rows, settings)) for e in (engine, mlx))
    assert a.owners == b.owners
    assert list(a.ranked) == list(b.ranked)
    pairs = list(zip(a.tried, b.tried, strict=True))
    for mine, other in pairs:
        assert (mine.layer, mine.owner) == (other.layer, other.owner)
        np.testing.assert_allclose(mine.similarity, other.similarity, atol=1e-5)


def test_the_order_of_sentences_does_not_matter(engine: Engine, rows: Rows) -> None:
    settings = Settings(0.25)
    a = done(Search(engine, rows, settings))
    b = done(Search(engine, rows._replace(ids=rows.ids[::-1].copy()), settings))
    assert a.owners == b.owners
    for pair, distance in a.ranked.items():
        np.testing.assert_allclose(distance, b.ranked[pair], rtol=2e-5)


def test_compression_acts_in_the_search(engine: Engine, rows: Rows) -> None:
    plain = done(Search(engine, rows, Settings(0.125)))
    method = parse("kivi", {"bits": "2", "group_size": "8", "buffer": "8"})
    search = done(Search(engine, rows, Settings(0.125, method=method)))
    assert list(search.ranked.items()) == list(plain.ranked.items())  # of the full model
    assert search.tried[0].similarity != plain.tried[0].similarity
    assert search.config["with"]["gear"]["buffer"] == 8
    assert plain.config["with"] == {}
    few = parse("h2o", {"heavy": "4", "recent": "4"})
    assert done(Search(engine, rows, Settings(0.125, method=few))).tried != search.tried


def test_hybrids_share_what_keeps_all_tokens(tmp_path: Path) -> None:
    need("torch")
    from kvc.backends.torch.engine import Engine as TorchEngine
    from tests import families_torch

    hybrid = TorchEngine(families_torch.tiny("olmo3"), None, "cpu")
    assert [i for i, kind in enumerate(hybrid.shape.layer_kinds) if kind == FULL] == [1, 3]
    ids = np.random.default_rng(5).integers(3, 250, (3, 16)).astype(np.int32)
    search = done(Search(hybrid, Rows(ids, "digest"), Settings(0.5, threshold=-1)))
    assert list(search.ranked) == [(3, 1)]
    assert search.owners == (0, 1, 2, 1)
    search.write(tmp_path / "map.json")
    method = parse("kvsharer", {"map": str(tmp_path / "map.json")})
    assert hybrid.store(hybrid.make_cache(method)).owner(1) == 0  # by the store's numbers


# Errors


@pytest.mark.parametrize(
    ("share", "got", "ask"), [(0.01, 0, "more"), (0.06, 0, "more"), (0.95, 8, "less")]
)
def test_shares_beyond_the_depth(
    engine: Engine, rows: Rows, share: float, got: int, ask: str
) -> None:
    with pytest.raises(ConfigError, match=f"expected 1 to 7 of the 8 .*, got {got}; ask for {ask}"):
        Search(engine, rows, Settings(share))


def test_shares_are_rounded_as_the_oracle_does() -> None:
    assert [Settings(x).count(n) for x, n in ((0.0625, 8), (0.29, 50), (0.25, 8))] == [1, 15, 2]
    assert Settings(0.29).count(50) == oracle.share_count("0.29", 50)
    with pytest.raises(ConfigError, match="expected two layers"):
        Settings(0.5).count(1)


def test_models_that_cannot_share_are_refused(rows: Rows) -> None:
    sizes: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "vocab_size": 9}
    shape = ModelShape("gemma3n", 8, **sizes, context_length=99, dtype_bytes=4, layer_kinds=(FULL,))
    some = replace(shape, layer_kinds=(FULL,) * 6)
    with pytest.raises(ConfigError, match="shares caches already"):
        Search(cast("Engine", SimpleNamespace(shape=some)), rows, Settings(0.25))


WITH = [
    ("gear", {}, "96"),
    ("kivi", {"buffer": "8", "group_size": "8", "window": "9", "sink": "7"}, "48"),
    ("h2o", {"heavy": "10", "recent": "50"}, "96"),
    ("tova", {"heavy": "21"}, "48"),
]


@pytest.mark.parametrize(("name", "settings", "length"), WITH)
def test_compression_that_would_not_act_is_refused(
    engine: Engine, rows: Rows, name: str, settings: dict[str, str], length: str
) -> None:
    method = parse(name, settings)
    says = f"24 tokens to be compressed, got none; --length {length} does"
    with pytest.raises(ConfigError, match=says):
        Search(engine, rows, Settings(0.25, method=method))
    ids, full = np.resize(rows.ids[:1], (1, int(length))), parse("none")
    for n, acts in ((int(length) // 2, False), (int(length), True)):
        plain, other = (list(passes(engine, ids[:, :n], m, True)) for m in (full, method))
        assert (similarity(plain[0][1], other[0][1]) < 1) == acts


def test_compression_that_never_acts_is_refused(engine: Engine, rows: Rows) -> None:
    method = parse("streaming", {"recent": "4000"})
    with pytest.raises(ConfigError, match="got none; no --length of this model does"):
        Search(engine, rows, Settings(0.25, method=method))
    coded = parse("h2o+token", {"less.heavy": "4000"})  # codes what is kept
    assert Search(engine, rows, Settings(0.25, method=coded)).count == 2


def test_damaged_models_are_refused(engine: Engine, rows: Rows) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def hidden(self, ids: Any, cache: Any) -> Any:
            return engine.hidden(ids, cache) * np.nan

    search = Search(cast("Engine", Broken()), rows, Settings(0.25))
    with pytest.raises(ConfigError, match="expected numbers from the model in float32"):
        search.prepare()


# Checkpoints

FEW = Settings(0.375, threshold=0.95)  # of which some pairs are rejected


@pytest.fixture
def cut(engine: Engine, rows: Rows, tmp_path: Path) -> Path:
    """The checkpoint of a search that ended after three pairs."""
    path = tmp_path / "map.json.part"
    pairs = Search(engine, rows, FEW, "m").run(path)
    for _ in range(3):
        next(pairs)
    pairs.close()  # type: ignore[attr-defined]
    return path


def test_a_search_goes_on(engine: Engine, rows: Rows, cut: Path, tmp_path: Path) -> None:
    search = Search(engine, rows, FEW, "m")
    assert search.resume(cut)
    assert len(search.tried) == 3
    asked = []
    likeness = search._similarity
    search._similarity = lambda i, j: asked.append((i, j)) or likeness(i, j)  # type: ignore
    seen = list(search.run(cut))
    assert seen == search.tried
    assert asked == [tried[:2] for tried in seen[3:]] != []
    search.write(tmp_path / "map.json", checkpoint=cut)
    whole = done(Search(engine, rows, FEW, "m"))
    whole.write(tmp_path / "whole.json")
    assert (tmp_path / "map.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.json", "whole.json"]


def test_the_checkpoint_stays_until_the_map_is_written(
    engine: Engine, rows: Rows, tmp_path: Path
) -> None:
    part = tmp_path / "map.json.part"
    search = done(Search(engine, rows, Settings(0.125)), part)
    with pytest.raises(ArtifactError, match="cannot write it"):
        search.write(tmp_path / "none" / "map.json", checkpoint=part)
    again = Search(engine, rows, Settings(0.125))
    assert again.resume(part)
    assert done(again).tried == search.tried
    again.write(tmp_path / "map.json", checkpoint=part)
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


def test_without_a_checkpoint_it_starts(engine: Engine, rows: Rows, tmp_path: Path) -> None:
    assert not Search(engine, rows, FEW).resume(tmp_path / "map.json.part")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"settings": replace(FEW, threshold=0.9)}, "threshold 0.9, got one with 0.95"),
        ({"settings": replace(FEW, order="similar")}, "order similar, got one with dissimilar"),
        ({"model": "other"}, "model other, got one with m"),
        ({"digest": "ab"}, "text ab, got one with "),
    ],
)
def test_checkpoints_of_other_searches_are_refused(
    engine: Engine, rows: Rows, cut: Path, changes: dict[str, Any], says: str
) -> None:
    text = rows._replace(digest=changes.get("digest", rows.digest))
    other = Search(engine, text, changes.get("settings", FEW), changes.get("model", "m"))
    with pytest.raises(ArtifactError, match=says) as info:
        other.resume(cut)
    assert str(info.value).endswith("remove it, or take another --out")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: text.replace('"tried"', '"tired"'),
        lambda text: text.replace('"tried": [[', '"tried": [[1, '),
        lambda text: json.dumps({**json.loads(text), "ranked": []}),
        lambda text: json.dumps({**json.loads(text), "of": None}),
    ],
)
def test_damaged_checkpoints_are_refused(
    engine: Engine, rows: Rows, cut: Path, damage: Any
) -> None:
    cut.write_text(damage(cut.read_text()))
    search = Search(engine, rows, FEW, "m")
    with pytest.raises(KVCError, match="expected a checkpoint of a search; remove it") as info:
        search.resume(cut)
    assert "\n" not in str(info.value)
    assert (search.ranked, search.tried) == ({}, [])
