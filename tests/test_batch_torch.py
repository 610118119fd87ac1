"""Batches with transformers: every method, families of models, recorded steps, and memory."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="the torch backend needs transformers")

# ruff: noqa: E402
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import kvc.demo
from kvc.backends.torch.cache import make_cache, shape_of
from kvc.backends.torch.engine import Engine, load
from kvc.backends.torch.graph import Steps, route
from kvc.files import write_kernels
from kvc.methods import Method, parse
from kvc.ops.evict import Kernels
from tests import families_torch
from tests.recording import Recorder
from tests.settings import lossy

SETTINGS: dict[str, dict[str, Any]] = {"none": {}, **lossy(8)}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "initializer_range": 0.3,  # logits far apart, and no text of one token
}
PROMPTS = [[(i * 37 + 7 * row + 5) % 160 for i in range(n)] for row, n in enumerate((21, 3, 40))]
GEAR = parse("gear", {"group_size": 8, "buffer": 8})


class Letters:
    """A tokenizer that spells ids."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)


def engine_of(model: Any) -> Engine:
    model.generation_config.eos_token_id = None
    return Engine(model, Letters(), "cpu")


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SIZES))
    return engine_of(model.double().eval())


@pytest.fixture(scope="module")
def kernels(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("maps") / "kernels.safetensors"
    rng = np.random.default_rng(0)
    shapes = [(4, 16, 8), (4, 8, 4), (2, 16, 8), (2, 8, 4), (2, 4, 4), (2, 4), (2, 4)]
    maps = {
        layer: Kernels(*(0.3 * rng.standard_normal(s).astype("f4") for s in shapes))
        for layer in range(4)
    }
    write_kernels(str(path), maps, shape_of(engine.model).fingerprint, {})
    return str(path)


def method_of(name: str, kernels: str) -> Method:
    return parse(name, {k: kernels if v == "KERNELS" else v for k, v in SETTINGS[name].items()})


def alone(engine: Engine, ids: list[int], cache: Any, n: int = 9) -> list[int]:
    return [piece.token for piece in engine.stream(ids, cache, max_tokens=n, prefill_step=16)]


def run(batch: Any, steps: int = 1000) -> dict[int, list[int]]:
    """The tokens of each sequence; what fails is raised."""
    found: dict[int, list[int]] = {}
    for _ in range(steps):
        if not (events := batch.step()):
            break
        for event in events:
            if event.error:
                raise event.error
            if event.piece:
                found.setdefault(event.key, []).append(event.piece.token)
    return found


def together(engine: Engine, caches: list[Any], n: int = 9) -> list[list[int]]:
    batch = engine.batch(prefill_step=16)
    pairs = zip(PROMPTS, caches, strict=True)
    keys = [batch.add([ids], cache, max_tokens=n) for ids, cache in pairs]
    found = run(batch)
    return [found[key] for key in keys]


@pytest.mark.parametrize(
    ("name", "prefill"),
    [*((name, "exact") for name in SETTINGS), ("gear", "stream"), ("less", "stream")],
)
def test_every_method_gives_what_it_gives_alone(
    engine: Engine, kernels: str, name: str, prefill: str
) -> None:
    method = method_of(name, kernels)
    own, caches = ([engine.make_cache(method, prefill) for _ in PROMPTS] for _ in range(2))
    expected = [alone(engine, ids, cache) for ids, cache in zip(PROMPTS, own, strict=True)]
    assert together(engine, caches) == expected
    assert [cache.store.nbytes for cache in caches] == [cache.store.nbytes for cache in own]


def test_rows_of_different_methods_go_together(engine: Engine) -> None:
    names = ("gear", "h2o", "kvsharer")

    def caches() -> list[Any]:
        return [engine.make_cache(parse(name, SETTINGS[name])) for name in names]

    expected = [alone(engine, ids, c) for ids, c in zip(PROMPTS, caches(), strict=True)]
    assert together(engine, caches()) == expected


def test_freed_projections_are_not_run_for_a_batch() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SIZES)).double().eval()
    engine, method = engine_of(model), parse("kvsharer", SETTINGS["kvsharer"])
    expected = [alone(engine, ids, engine.make_cache(method)) for ids in PROMPTS]
    caches = [engine.make_cache(method, free=True) for _ in PROMPTS]
    assert engine.batch(limit=4).batch_limit == 4
    assert together(engine, caches) == expected


@pytest.mark.parametrize(
    ("family", "limit"),
    [("gpt2", 4), ("gptj", 4), ("bloom", 4), ("qwen3_moe", 4), ("gemma3_text", 1), ("lfm2", 1)],
)
def test_families_get_what_they_get_alone(family: str, limit: int) -> None:
    """Models that read tensors among them; those with windows or recurrent layers one by one."""
    engine = engine_of(families_torch.model(family))
    assert engine.batch(limit=4).batch_limit == limit
    expected = [alone(engine, ids, engine.make_cache(GEAR), 6) for ids in PROMPTS]
    assert together(engine, [engine.make_cache(GEAR) for _ in PROMPTS], 6) == expected


def test_copy_is_a_cache_of_its_own(engine: Engine) -> None:
    cache = engine.make_cache(GEAR)
    alone(engine, PROMPTS[2], cache)
    before = {x.data_ptr() for x in cache.store.arrays()}
    again = copy.deepcopy(cache)
    assert not before & {x.data_ptr() for x in again.store.arrays()}
    assert again.store.method is cache.store.method
    expected = alone(engine, PROMPTS[0], cache)
    assert alone(engine, PROMPTS[0], again) == expected


def test_sequence_that_runs_alone_replays_its_steps() -> None:
    engine = load(str(kvc.demo.path()), "cpu", None)
    method = parse("gear", {"group_size": 16, "buffer": 16})
    ids = engine.encode("The old man walked down to the harbour, and the boats lay still.")
    expected = [alone(engine, x, make_cache(engine.model, method), 16) for x in (ids, ids[:9])]
    cache, recorder = make_cache(engine.model, method), Recorder()
    cache.steps = Steps(cache, recorder)
    route(engine.model)
    batch = engine.batch()
    first = batch.add([ids[:8], ids[8:]], cache, max_tokens=16)
    found = run(batch, 12)
    replayed = recorder.replayed
    assert replayed >= 4
    second = batch.add([ids[:9]], make_cache(engine.model, method), max_tokens=16)
    later = run(batch)
    assert found[first] + later[first] == expected[0]
    assert later[second] == expected[1]
    assert recorder.replayed == replayed
