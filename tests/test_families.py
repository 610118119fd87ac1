"""At its lossless limit each method gives the bare library's tokens, on many families of models."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc.backends.base import ops_of
from kvc.methods import parse
from kvc.store.unit import Query
from tests.conftest import need
from tests.families import LIBRARIES, LIMITS, Library, Limit, Outcome, library, outcome

EVICTING = ("streaming", "h2o", "tova", "less")
WATCHING = "evicts tokens, and the attention of {} cannot be reached"
LATENT = "keeps latents in place of keys and values"
REASONS = {
    "mlx": {
        "deepseek_v3": LATENT,
        "glm4_moe_lite": LATENT,
        "falcon_h1": "nothing to compress",
        "mamba": "nothing to compress",
    },
    "torch": {
        "deepseek_v3": "multi-head latent attention",
        "mistral with windows": "nothing to compress",
        "minimax": "uses cache of its own",
        "mamba": "cannot take one token after others",
    },
}
ON = {"mlx": (), "torch": ("cpu",)}
STREAMED = {"mlx": ("llama", "gemma2", "gpt_oss"), "torch": ("llama", "gemma2", "gptj")}


def cases(kinds: str) -> list[Any]:
    """Families of both libraries; of one that is not installed, a single case without a family."""
    found = []
    for name in LIBRARIES:
        try:
            of = library(name)
        except ImportError:
            found.append(pytest.param(name, None, id=name))
            continue
        for family in STREAMED[name] if kinds == "STREAMED" else getattr(of, kinds):
            found.append(pytest.param(name, family, id=f"{name}-{family}"))
    return found


def installed(name: str, family: str | None) -> Library:
    need(name)
    if family is None:
        pytest.skip(f"the {name} backend needs its model library too")
    return library(name)


def outcomes(of: Library, family: str, folder: Path, prefill: str = "exact") -> dict[str, Outcome]:
    return {name: outcome(of, family, name, folder, prefill) for name in LIMITS}


def check(found: dict[str, Outcome], mode: str, family: str) -> None:
    """Every method in this mode; in dense mode those that evict are refused, in one line."""
    expected = dict.fromkeys(LIMITS, mode)
    if mode == "dense":
        expected |= dict.fromkeys(EVICTING, "refused")
    assert {name: (*o,) for name, o in found.items() if o.cell != expected[name]} == {}
    for name, refused in found.items():
        if refused.cell == "refused":
            assert f"{name} {WATCHING.format(family)}" in refused.note
            assert "\n" not in refused.note


@pytest.mark.parametrize(("name", "family"), cases("HANDLE"))
def test_families_that_take_handles(name: str, family: str | None, tmp_path: Path) -> None:
    of = installed(name, family)
    assert family
    check(outcomes(of, family, tmp_path), "handle", family)


@pytest.mark.parametrize(("name", "family"), cases("HANDLE"))
def test_training_hears_every_layer(name: str, family: str | None) -> None:
    of: Any = installed(name, family)
    engine = import_module(f"kvc.backends.{name}.engine").Engine(of.model(family), None, *ON[name])
    cache = engine.make_cache(parse("none"))
    heard: list[Query] = []
    engine.store(cache).listener = heard.append
    hidden = engine.hidden(np.arange(1, 9)[None], cache)
    assert bool(ops_of(hidden).all(ops_of(hidden).isfinite(hidden)))
    assert hidden.shape[:2] == (1, 8)
    layers = engine.shape.full_layers
    # a model whose layers share caches by its own design asks some of them again
    assert [*dict.fromkeys(query.reader for query in heard)] == list(range(len(layers)))
    for query in heard:
        _, n_heads, length, head_dim = query.q.shape
        assert length == 8
        behind = engine.output_projection(layers[query.reader])
        assert behind is not None
        assert behind.shape[0] == n_heads * head_dim


@pytest.mark.parametrize(("name", "family"), cases("DENSE"))
def test_families_that_read_tensors(name: str, family: str | None, tmp_path: Path) -> None:
    of = installed(name, family)
    assert family
    check(outcomes(of, family, tmp_path), "dense", family)


@pytest.mark.parametrize(("name", "family"), cases("REFUSED"))
def test_families_that_are_refused(name: str, family: str | None, tmp_path: Path) -> None:
    of = installed(name, family)
    assert family
    found = outcomes(of, family, tmp_path)
    assert {refused.cell for refused in found.values()} == {"refused"}
    for refused in found.values():
        assert REASONS[name][family] in refused.note
        assert "\n" not in refused.note


@pytest.mark.parametrize(("name", "family"), cases("STREAMED"))
def test_prompts_in_compressed_pieces(name: str, family: str | None, tmp_path: Path) -> None:
    of = installed(name, family)
    assert family
    mode = "dense" if family in of.DENSE else "handle"
    check(outcomes(of, family, tmp_path, "stream"), mode, family)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gear", {"outliers": 0.1}),
        ("gear-l", {"rank": 1, "bits": 2}),
        ("gear2", {"rank": 1}),
        ("streaming", {"heavy": 4}),
        ("h2o", {"heavy": 4}),
        ("tova", {"heavy": 8}),
        ("less", {"heavy": 4}),
        ("minicache", {"gamma": 0}),
        ("kvsharer", {"map": "1:0"}),
    ],
)
@pytest.mark.parametrize("name", LIBRARIES)
def test_less_than_the_limit_is_noticed(
    name: str,
    method: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    need(name)
    limit = LIMITS[method]
    monkeypatch.setitem(LIMITS, method, Limit({**limit.settings, **settings}, limit.part))
    assert outcome(library(name), "llama", method, tmp_path).cell == "differs"


@pytest.mark.parametrize("name", LIBRARIES)
def test_cache_that_stays_as_it_is_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    need(name)
    longer = {**LIMITS["gear"].settings, "window": 64}
    monkeypatch.setitem(LIMITS, "gear", Limit(longer, "outliers"))
    assert outcome(library(name), "llama", "gear", tmp_path).cell == "idle"
