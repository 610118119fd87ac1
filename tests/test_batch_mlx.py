"""mlx-lm's batch generator with compressed caches: each sequence gets what it gets alone."""

import copy
import gc
import weakref
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="the mlx backend needs mlx")
pytest.importorskip("mlx_lm", reason="the mlx backend needs mlx-lm")

# ruff: noqa: E402
import numpy as np
from mlx_lm.generate import BatchGenerator, batch_generate
from mlx_lm.models.cache import KVCache

import kvc
import kvc.demo
from kvc.backends.mlx.cache import make_cache, shape_of
from kvc.backends.mlx.engine import Engine, load
from kvc.backends.mlx.entry import KVCEntry
from kvc.errors import ConfigError, KVCError
from kvc.files import write_kernels
from kvc.methods import Method, parse
from kvc.ops.evict import Kernels
from tests.families_mlx import generate, ids, tiny
from tests.settings import lossy

GEAR = parse("gear", {"group_size": 8, "buffer": 8})
STEP = 16  # tokens of a prompt in one piece
SETTINGS: dict[str, dict[str, Any]] = {"none": {}, **lossy(8)}
PROMPTS = [[int(x) for x in ids(n + 7 * row)[7 * row :]] for row, n in enumerate((21, 3, 40))]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(kvc.demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def kernels(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("maps") / "kernels.safetensors"
    rng = np.random.default_rng(0)
    shapes = [(4, 16, 8), (4, 8, 4), (2, 16, 8), (2, 8, 4), (2, 4, 4), (2, 4), (2, 4)]
    maps = {
        layer: Kernels(*(0.3 * rng.standard_normal(s).astype("f4") for s in shapes))
        for layer in range(4)
    }
    write_kernels(str(path), maps, shape_of(llama).fingerprint, {})
    return str(path)


def method_of(name: str, kernels: str) -> Method:
    return parse(name, {k: kernels if v == "KERNELS" else v for k, v in SETTINGS[name].items()})


def alone(model: Any, entries: Any, prompt: list[int], n: int) -> list[int]:
    return generate(model, entries, n, mx.array(prompt), STEP)[0]


class Run:
    """A batch generator, and the tokens and caches that came from it."""

    def __init__(self, model: Any) -> None:
        self.generator = BatchGenerator(model, prefill_step_size=STEP)
        self.tokens: dict[int, list[int]] = {}
        self.caches: dict[int, Any] = {}

    def add(self, prompt: list[int], entries: Any, n: int) -> int:
        (key,) = self.generator.insert([prompt], [n], caches=[entries])
        self.tokens[key] = []
        return int(key)

    def steps(self, n: int = 1000) -> None:
        for _ in range(n):
            prompts, new = self.generator.next()
            for response in new:
                self.tokens[response.uid].append(response.token)
                if response.finish_reason:
                    self.caches[response.uid] = response.prompt_cache
            if not prompts and not new:
                return


@pytest.mark.parametrize("name", SETTINGS)
def test_sequences_that_join_and_leave_get_what_they_get_alone(
    llama: Any, kernels: str, name: str
) -> None:
    method = method_of(name, kernels)
    own = [make_cache(llama, method) for _ in PROMPTS]
    expected = [alone(llama, c, p, 9) for c, p in zip(own, PROMPTS, strict=True)]
    run = Run(llama)
    keys = [run.add(PROMPTS[0], make_cache(llama, method), 9)]
    keys.append(run.add(PROMPTS[1], make_cache(llama, method), 4))
    run.steps(4)
    keys.append(run.add(PROMPTS[2], make_cache(llama, method), 9))
    run.steps(3)
    run.generator.remove(keys[:1])
    run.steps()
    left, short, last = (run.tokens[key] for key in keys)
    assert (short, last) == (expected[1][:4], expected[2])
    assert 1 < len(left) < 9
    assert left == expected[0][: len(left)]
    ended = run.caches[keys[2]]
    assert {entry.offset for entry in ended} == {49}
    assert sum(e.nbytes for e in ended) == sum(e.nbytes for e in own[2])
    assert alone(llama, ended, [5, 9, 2], 3) == alone(llama, own[2], [5, 9, 2], 3)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_5", "gpt_oss", "gpt2", "stablelm"])
def test_families_get_what_they_get_alone(family: str) -> None:
    """Beside windows and recurrent layers of the library's, and where arrays are read."""
    model, method = tiny(family), parse("gear", {"bits": 8, "group_size": 8, "buffer": 8})
    expected = [alone(model, make_cache(model, method), prompt, 6) for prompt in PROMPTS]
    run = Run(model)
    keys = [run.add(prompt, make_cache(model, method), 6) for prompt in PROMPTS]
    run.steps()
    assert [run.tokens[key] for key in keys] == expected


class Letters:
    """A tokenizer that spells ids."""

    eos_token_ids: frozenset[int] = frozenset()

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(0x4E00 + token) for token in tokens)


@pytest.mark.parametrize(
    ("family", "limit"), [("gemma3_text", 4), ("qwen3_5", 4), ("gemma2", 1), ("gpt_bigcode", 1)]
)
def test_engines_batch_joins_what_the_library_can_join(family: str, limit: int) -> None:
    """gemma2 and gpt_bigcode take no batch of mlx-lm's own caches either."""
    engine = Engine(tiny(family), Letters())
    method = parse("gear", {"bits": 8, "group_size": 8, "buffer": 8})
    expected = [alone(engine.model, engine.make_cache(method), prompt, 6) for prompt in PROMPTS]
    batch = engine.batch(limit=4, prefill_step=STEP)
    assert batch.batch_limit == limit
    keys = [batch.add([p], engine.make_cache(method), max_tokens=6) for p in PROMPTS]
    found: dict[int, list[int]] = {key: [] for key in keys}
    offsets: dict[int, set[int]] = {}
    while events := batch.step():
        for event in events:
            if event.piece:
                found[event.key].append(event.piece.token)
            elif event.kind == "end":  # whichever entries hold its layers, ours or not
                offsets[event.key] = {e.offset for e in event.cache if hasattr(e, "offset")}
    assert [found[key] for key in keys] == expected
    assert [offsets[key] for key in keys] == [{len(prompt) + 6} for prompt in PROMPTS]


def test_rows_of_different_methods_and_prefills_go_together(llama: Any) -> None:
    def caches() -> list[Any]:
        kinds = (("gear", "exact"), ("gear", "stream"), ("h2o", "exact"))
        return [make_cache(llama, parse(n, SETTINGS[n]), prefill) for n, prefill in kinds]

    expected = [alone(llama, c, p, 6) for c, p in zip(caches(), PROMPTS, strict=True)]
    run = Run(llama)
    keys = [run.add(p, c, 6) for c, p in zip(caches(), PROMPTS, strict=True)]
    run.steps()
    assert [run.tokens[key] for key in keys] == expected


def test_caches_that_a_batch_goes_on_from_stay_as_they_are(llama: Any) -> None:
    """One prompt that was read before, and three questions about it."""
    cache = make_cache(llama, GEAR)
    alone(llama, cache, PROMPTS[2], 2)
    before = cache[0].nbytes
    expected = [alone(llama, copy.deepcopy(cache), prompt, 6) for prompt in PROMPTS]
    run = Run(llama)
    keys = [run.add(prompt, cache, 6) for prompt in PROMPTS]
    run.steps()
    assert [run.tokens[key] for key in keys] == expected
    assert (cache[0].offset, cache[0].nbytes) == (len(PROMPTS[2]) + 2, before)


def test_extracted_cache_goes_its_own_way(llama: Any) -> None:
    run = Run(llama)
    key = run.add(PROMPTS[0], make_cache(llama, GEAR), 14)
    run.add(PROMPTS[2], make_cache(llama, GEAR), 14)
    run.steps(6)
    entries, held = run.generator.extract_cache([key])[key]
    held = list(held)
    assert len({id(entry.store) for entry in entries}) == 1
    assert {entry.offset for entry in entries} == {len(held)}
    run.steps()
    every = [*PROMPTS[0], *run.tokens[key]]
    assert every[: len(held)] == held
    rest = every[len(held) :]
    assert len(rest) > 4
    assert alone(llama, entries, rest[:1], len(rest) - 1) == rest[1:]


def test_bytes_are_those_of_the_rows_and_are_free_when_these_leave(llama: Any) -> None:
    run = Run(llama)
    keys = [run.add(prompt, make_cache(llama, GEAR), 20) for prompt in PROMPTS]
    run.steps(8)
    rows = run.generator._generation_batch.prompt_cache
    stores = [weakref.ref(store) for store in rows[0].stores]
    sizes = [store().nbytes for store in stores]
    assert run.generator.prompt_cache_nbytes == sum(sizes)
    gc.collect()
    held = mx.get_active_memory()
    run.generator.remove(keys[2:])
    gc.collect()
    assert [ref() is None for ref in stores] == [False, False, True]
    assert mx.get_active_memory() <= held - sizes[2]
    assert run.generator.prompt_cache_nbytes == sum(sizes[:2])
    run.generator.remove(keys)
    gc.collect()
    assert not any(ref() for ref in stores)
    assert mx.get_active_memory() <= held - sum(sizes)


def test_copy_of_a_cache_keeps_nothing_else_alive(llama: Any, kernels: str) -> None:
    cache = make_cache(llama, method_of("less", kernels))
    again = copy.deepcopy(cache)  # of an empty one, which has made nothing of its maps yet
    expected = alone(llama, again, PROMPTS[2], 6)
    assert alone(llama, cache, PROMPTS[2], 6) == expected
    assert "state" in kvc.report(again).parts
    assert again[0].nbytes == cache[0].nbytes
    newer, store = copy.deepcopy(cache), weakref.ref(cache[0].store)
    assert newer[0].store.method is cache[0].store.method
    del cache
    gc.collect()
    assert store() is None
    assert newer[0].nbytes == again[0].nbytes


def test_batches_of_what_is_not_ours_or_has_several_rows_are_refused(llama: Any) -> None:
    entry = make_cache(llama, GEAR)[0]
    with pytest.raises(ConfigError, match="every sequence of the batch, got a KVCache"):
        entry.merge([entry, KVCache()])
    wide = make_cache(llama, GEAR)
    llama(mx.array(PROMPTS[0])[None][[0, 0]], cache=wide)
    with pytest.raises(ConfigError, match="caches of one row to make a batch of, got one of 2"):
        entry.merge([entry, wide[0]])
    with pytest.raises(ConfigError, match="padded on the right"):
        entry.merge([entry]).prepare(left_padding=[2])


def test_nan_in_a_prompt_is_said(llama: Any) -> None:
    run = Run(llama)
    run.add(PROMPTS[0], make_cache(llama, GEAR), 4)
    entries = make_cache(llama, GEAR)
    nan = mx.full((1, 2, 30, 16), mx.nan)
    for entry in entries:
        entry.update_and_fetch(nan, nan)
    run.add(PROMPTS[1], entries, 4)
    with pytest.raises(KVCError, match="expected finite numbers"):
        run.steps()


@pytest.mark.parametrize("name", ["gear", "h2o", "minicache"])
def test_batch_generate_with_the_bundled_model(engine: Engine, name: str) -> None:
    model, method = engine.model, parse(name, lossy(16)[name])
    texts = ["The old man walked down to the harbour. He looked at", "The sea", "Once upon a time"]
    prompts = [engine.encode(text) for text in texts]
    expected = [
        [p.token for p in engine.stream(prompt, engine.make_cache(method), max_tokens=10)]
        for prompt in prompts
    ]
    caches = [engine.make_cache(method) for _ in prompts]
    options: dict[str, Any] = {"return_token_ids": True, "return_prompt_caches": True}
    got = batch_generate(
        model, engine.tokenizer, prompts, prompt_caches=caches, max_tokens=10, **options
    )
    assert got.token_ids == expected
    for prompt, entries in zip(prompts, got.caches, strict=True):
        assert all(isinstance(entry, KVCEntry) for entry in entries)
        assert entries[0].offset == len(prompt) + 10
        assert kvc.report(entries).nbytes == entries[0].nbytes
