"""mlx-lm's speculation and its server, and both engines' own streams, with compressed caches."""

import json
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from importlib import import_module
from typing import Any
from urllib.request import Request, urlopen

import pytest

mx = pytest.importorskip("mlx.core", reason="the mlx backend needs mlx")
mlx_lm = pytest.importorskip("mlx_lm", reason="the mlx backend needs mlx-lm")

# ruff: noqa: E402
from mlx.utils import tree_map
from mlx_lm import server as servers
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

import kvc
import kvc.demo
from kvc.backends.base import chunk_size
from kvc.backends.mlx import serving
from kvc.backends.mlx.engine import Engine, load
from kvc.errors import ConfigError
from kvc.methods import PRESETS, parse
from tests.conftest import need
from tests.settings import lossless, lossy

PROMPT = "The old man walked down to the harbour, and the boats lay still. He looked at"
# learned maps are left to the tests of transformers' ways to decode
LOSSLESS, LOSSY = (
    {name: given for name, given in table.items() if name != "less"}
    for table in (lossless(16), lossy(16))
)
# Caches of these give back their last step alone; a draft model's steps are single tokens.
ONE_STEP = ("streaming", "h2o", "tova", "minicache", "h2o+token")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(kvc.demo.path())


def noisy(noise: float) -> Any:
    """The same model with noise in its weights."""
    model = load(kvc.demo.path()).model
    mx.random.seed(3)
    model.update(tree_map(lambda p: p + noise * mx.random.normal(p.shape), model.parameters()))
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def draft(engine: Engine) -> Any:
    """A model that guesses about half the tokens."""
    return noisy(0.02)


@pytest.fixture(scope="module")
def poor_draft(engine: Engine) -> Any:
    """A model of which most first guesses are wrong already."""
    return noisy(0.1)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> list[int]:
    return [p.token for p in engine.stream(engine.encode(PROMPT), None, max_tokens=32)]


def speculate(engine: Engine, draft: Any, cache: Any, n_draft: int = 3) -> list[Any]:
    pieces = mlx_lm.stream_generate(
        engine.model,
        engine.tokenizer,
        engine.encode(PROMPT),
        prompt_cache=cache,
        max_tokens=32,
        draft_model=draft,
        num_draft_tokens=n_draft,
    )
    return list(pieces)


def test_every_preset_is_here() -> None:
    assert {*LOSSY} | {"none", "less"} >= {*PRESETS}  # less is h2o with maps


@pytest.mark.parametrize("name", LOSSLESS)
def test_speculation_changes_nothing_at_the_lossless_limit(
    engine: Engine, draft: Any, expected: list[int], name: str
) -> None:
    cache = kvc.make_cache(engine.model, parse(name, LOSSLESS[name]))
    pieces = speculate(engine, draft, cache + make_prompt_cache(draft))
    assert [piece.token for piece in pieces] == expected
    assert 4 < sum(piece.from_draft for piece in pieces) < 28
    assert (cache[0].store.dense(7) is None) == (name not in ("none", "kvsharer"))


@pytest.mark.parametrize("name", LOSSY)
def test_speculation_takes_back_what_is_not_compressed(
    engine: Engine, draft: Any, expected: list[int], name: str
) -> None:
    cache = kvc.make_cache(engine.model, parse(name, LOSSY[name]))
    pieces = speculate(engine, draft, cache + make_prompt_cache(draft))
    assert len(pieces) == 32
    if "kvsharer" not in name:  # which shares while the prompt is processed
        assert pieces[0].token == expected[0]
    assert any(piece.from_draft for piece in pieces)
    assert (cache[0].store.dense(7) is None) == (name != "kvsharer")
    assert {entry.offset for entry in cache} == {cache[0].store.length()}


@pytest.mark.parametrize("name", ["gear", "kvsharer", *ONE_STEP])
def test_compressed_draft_goes_back_two_tokens_or_says_that_it_cannot(
    engine: Engine, poor_draft: Any, name: str
) -> None:
    settings = {**LOSSY[name], **({"gear.window": 2} if name == "gear" else {})}
    both = [kvc.make_cache(model, parse(name, settings)) for model in (engine.model, poor_draft)]
    if name not in ONE_STEP:
        assert len(speculate(engine, poor_draft, both[0] + both[1])) == 32
        return
    with pytest.raises(ConfigError, match="trim: expected at most 1 tokens") as info:
        speculate(engine, poor_draft, both[0] + both[1])
    assert "\n" not in str(info.value)
    both = [kvc.make_cache(model, parse(name, settings)) for model in (engine.model, poor_draft)]
    assert len(speculate(engine, poor_draft, both[0] + both[1], n_draft=2)) == 32


class Provider(servers.ModelProvider):  # type: ignore[misc]
    """Loads the model in float32, where a prompt in pieces is the prompt, and sets the hook."""

    make: Callable[[Any], Any] | None

    def _load(self, *args: Any) -> None:
        super()._load(*args)
        model, make = self.model, self.make
        model.set_dtype(mx.float32)
        if make is not None:
            model.make_cache = lambda: make(model)
            self.is_batchable = all(hasattr(c, "merge") for c in make_prompt_cache(model))


class Server:
    """mlx-lm's server on a free port."""

    def __init__(self, make: Callable[[Any], Any] | None) -> None:
        nothing = dict.fromkeys(
            "adapter_path draft_model chat_template kv_bits prompt_cache_bytes".split()  # noqa: SIM905
        )
        options = Namespace(
            model=str(kvc.demo.path()),
            allowed_origins="*",
            num_draft_tokens=3,
            trust_remote_code=False,
            use_default_chat_template=False,
            temp=0.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            max_tokens=64,
            chat_template_args={},
            decode_concurrency=4,
            prompt_concurrency=4,
            prefill_step_size=512,
            prompt_cache_size=10,
            kv_group_size=64,
            quantized_kv_start=0,
            pipeline=False,
            **nothing,
        )
        provider = Provider(options)
        provider.make = make
        self.provider = provider
        self.generator = servers.ResponseGenerator(provider, LRUPromptCache(10))
        self.httpd = ThreadingHTTPServer(
            ("127.0.0.1", 0),
            lambda *args: servers.APIHandler(self.generator, *args, system_fingerprint="test"),
        )
        self.thread = threading.Thread(target=self.httpd.serve_forever)
        self.thread.start()

    def ask(self, prompt: str, n: int = 16) -> tuple[str, int]:
        """The continuation of a prompt, and how many of its tokens came from an earlier cache."""
        body = json.dumps({"prompt": prompt, "max_tokens": n, "temperature": 0.0}).encode()
        url = f"http://127.0.0.1:{self.httpd.server_address[1]}/v1/completions"
        request = Request(url, body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as response:
            answer = json.load(response)
        usage = answer["usage"]
        return answer["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"]

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()
        self.thread.join()
        self.generator.stop_and_join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    running = []

    def start(name: str = "", settings: dict[str, Any] | None = None) -> Server:
        make = (lambda model: kvc.make_cache(model, parse(name, settings))) if name else None
        running.append(Server(make))
        return running[-1]

    yield start
    for server in running:
        server.close()


class Talk:
    """A prompt, the tokens that follow it over one cache, and a second prompt that goes on."""

    def __init__(self, engine: Engine, name: str, settings: dict[str, Any]) -> None:
        self.engine = engine
        make = (lambda: kvc.make_cache(engine.model, parse(name, settings))) if name else None
        self.cache = make() if make else make_prompt_cache(engine.model)
        ids = engine.encode(PROMPT)
        first = [piece.token for piece in self.run(ids, 12)]
        for n in range(12, 0, -1):  # as many as are one text's tokens
            self.n, known = n, ids + first[:n]
            self.second = engine.tokenizer.decode(known[1:]) + " He went"
            if engine.encode(self.second)[: len(known)] == known:
                break
        self.cache = make() if make else make_prompt_cache(engine.model)
        self.known = len(known)
        self.first_text = self.text(ids, n)
        self.second_text = self.text(engine.encode(self.second)[len(known) :])

    def run(self, ids: list[int], n: int) -> list[Any]:
        options = {"max_tokens": n, "prompt_cache": self.cache}
        return list(
            mlx_lm.stream_generate(self.engine.model, self.engine.tokenizer, ids, **options)
        )

    def text(self, ids: list[int], n: int = 16) -> str:
        return "".join(piece.text for piece in self.run(ids, n))


def fresh(engine: Engine, cache: Any, prompt: str) -> str:
    model, tokenizer = engine.model, engine.tokenizer
    options = {"max_tokens": 16, "prompt_cache": cache}
    return "".join(p.text for p in mlx_lm.stream_generate(model, tokenizer, prompt, **options))


@pytest.mark.parametrize("name", ["none", "gear", "h2o"])
def test_server_gives_what_a_fresh_run_gives_at_the_lossless_limit(
    engine: Engine, serve: Callable[..., Server], name: str
) -> None:
    server, talk = serve(name, LOSSLESS[name]), Talk(engine, "", {})
    assert server.ask(PROMPT, talk.n) == (talk.first_text, 0)
    assert server.ask(talk.second) == (fresh(engine, None, talk.second), talk.known)
    other = PROMPT + " the sea"
    answer, reused = server.ask(other)
    assert answer == fresh(engine, None, other)
    assert (reused > 0) == (name == "none")  # the others are compressed for good
    assert server.provider.is_batchable


@pytest.mark.parametrize("name", ["gear", "h2o", "minicache", "kvsharer"])
def test_server_goes_on_with_a_compressed_cache(
    engine: Engine, serve: Callable[..., Server], name: str
) -> None:
    server, talk = serve(name, LOSSY[name]), Talk(engine, name, LOSSY[name])
    assert (talk.cache[7].store.dense(7) is None) == (name != "kvsharer")
    assert server.ask(PROMPT, talk.n) == (talk.first_text, 0)
    assert server.ask(talk.second) == (talk.second_text, talk.known)


def test_server_processes_a_prompt_anew_whose_nearest_cache_is_compressed(
    engine: Engine, serve: Callable[..., Server]
) -> None:
    server = serve("gear", LOSSY["gear"])
    server.ask(PROMPT)
    other = PROMPT[: len(PROMPT) // 2] + " the ship"
    expected = fresh(engine, kvc.make_cache(engine.model, parse("gear", LOSSY["gear"])), other)
    assert server.ask(other) == (expected, 0)


def test_nearest_cache_that_cannot_go_back_is_none(engine: Engine) -> None:
    kept, cache, ids = (
        LRUPromptCache(),
        kvc.make_cache(engine.model, parse("gear", LOSSY["gear"])),
        [5] * 40,
    )
    for part in (ids[:39], ids[39:]):
        engine.model(mx.array([part]), cache=cache)
    engine.model(mx.array([[5]]), cache=cache)
    kept.insert_cache("model", [*ids, 5], cache)
    other = [*ids[:20], 7, 7]
    with pytest.raises(ConfigError, match="trim"):
        serving._library(kept, "model", other)
    assert kept.fetch_nearest_cache("model", other) == (None, other)
    again, rest = kept.fetch_nearest_cache("model", [*ids, 5, 7])
    assert (again[0].offset, rest) == (41, [7])


def blocks(engine: Any, cache: Any) -> list[Any]:
    """Sizes and numbers of the coded blocks of keys and values, layer by layer."""
    units = [unit for slot in engine.store(cache)._slots for _, unit in slot.groups]
    return [
        [(run.spec.n, run.n) for run in series.past.runs]
        for unit in units
        for series in (unit.k, unit.v)
    ]


@pytest.fixture(scope="module")
def torch_engine() -> Any:
    need("torch")
    return kvc.load_engine("cpu", str(kvc.demo.path()), "float32")


@pytest.mark.parametrize("n", [3, 11, 12, 21, 22, 32])
def test_both_libraries_code_the_same_blocks(engine: Engine, torch_engine: Any, n: int) -> None:
    """Whatever the pieces: no prompt is coded before its last token is there."""
    method = parse("kivi", {"group_size": 2, "buffer": 2})
    found = []
    for each in (engine, torch_engine):
        cache = each.make_cache(method)
        ids = engine.encode(PROMPT * 2)[:n]
        options: dict[str, Any] = {"temp": 0.0, "top_p": 1.0, "seed": 0, "on_prefill": None}
        pieces = list(each.stream(ids, cache, max_tokens=4, prefill_step=10, **options))
        assert len(pieces) == 4
        found.append(blocks(each, cache))
    mine, other = ([[sizes[0] for sizes in runs] for runs in each] for each in found)
    assert mine == other
    assert mine[0][0] == n // 2 * 2  # the prompt as one block
    assert len(mine) == 16


def test_pieces_leave_no_lone_token() -> None:
    for n in range(200):
        for step in (1, 2, 3, 8, 16):
            size = chunk_size(n, step)
            assert 1 <= size <= max(step, n, 1)
            assert n < 2 or n % size != 1
            assert size == step or n % step == 1 or step == 1


def tiny(family: str, **changes: Any) -> Any:
    sizes = {
        "model_type": family,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": 97,
        **changes,
    }
    module = import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict(sizes))
    mx.eval(model.parameters())
    return model


WINDOW = "sliding_attention: the library's own cache, it keeps a window only"


def test_report_says_what_each_layer_keeps() -> None:
    def kinds(model: Any, name: str, **settings: Any) -> list[str]:
        return kvc.report(kvc.make_cache(model, parse(name, settings))).kinds

    llama = tiny("llama")
    kept = "full_attention: as it came"
    assert kinds(llama, "none") == [kept] * 4
    assert kinds(llama, "h2o", heavy=4, recent=4) == ["full_attention: compressed"] * 4
    merged = [f"full_attention: merged with layer {layer}" for layer in (3, 2)]
    assert kinds(llama, "minicache") == [kept, kept, *merged]
    assert kinds(llama, "kvsharer", map="3:1") == [kept] * 3 + ["full_attention: reads layer 1"]
    gemma = tiny("gemma3_text", sliding_window=8, sliding_window_pattern=2)
    small = {"group_size": 16, "buffer": 16}
    assert kinds(gemma, "gear", **small) == [WINDOW, "full_attention: compressed"] * 2
    assert kinds(gemma, "minicache", start=0) == [
        WINDOW, "full_attention: merged with layer 3", WINDOW, "full_attention: merged with layer 1"
    ]  # fmt: skip
    assert kinds(gemma, "kvsharer", map="3:1")[3] == "full_attention: reads layer 1"
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}
    assert kinds(tiny("gpt_oss", **experts), "none") == [WINDOW, kept] * 2


def test_model_that_gives_nan_is_said_to() -> None:
    model = tiny("llama")
    weight = model.layers[1].mlp.up_proj.weight
    model.layers[1].mlp.up_proj.weight = mx.full(weight.shape, mx.nan)
    with pytest.raises(ConfigError, match="expected numbers from llama, got NaN") as info:
        kvc.make_cache(model, "none")
    assert "\n" not in str(info.value)
