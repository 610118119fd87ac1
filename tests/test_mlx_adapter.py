"""mlx-lm's models with our cache give what they give with mlx-lm's own, at the lossless limit."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="the mlx backend needs mlx")
mlx_lm = pytest.importorskip("mlx_lm", reason="the mlx backend needs mlx-lm")

# ruff: noqa: E402
import mlx.nn
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import base
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache, trim_prompt_cache

import kvc.demo
from kvc.backends.mlx import attention
from kvc.backends.mlx.cache import make_cache, model_fit, shape_of
from kvc.backends.mlx.engine import Engine, load
from kvc.backends.mlx.entry import KVCEntry, build, library_entries, sharers
from kvc.backends.mlx.projections import Freed, free_projections
from kvc.errors import BackendError, ConfigError, KVCError
from kvc.methods import parse
from kvc.store.store import KVStore
from tests.conftest import need
from tests.families_mlx import DENSE, HANDLE, HYBRID, ids, tiny
from tests.families_mlx import generate as run

NONE = parse("none")
GEAR = parse("gear", {"bits": 8, "group_size": 16, "buffer": 16, "window": 8})


def off(got: Any, expected: Any) -> float:
    return float((mx.abs(got - expected).max() / mx.abs(expected).max()).item())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(kvc.demo.path())


@pytest.fixture
def llama() -> Any:
    return tiny("llama")


@pytest.mark.parametrize("family", [*HANDLE, *DENSE])
def test_lossless_cache_gives_the_librarys_tokens(family: str) -> None:
    model = tiny(family)
    tokens, logprobs = run(model)
    cache = make_cache(model, NONE)
    assert model_fit(model).mode == ("handle" if family in HANDLE else "dense")
    assert any(not isinstance(c, KVCEntry) for c in cache) == (family in HYBRID)
    got = run(model, cache)
    assert got[0] == tokens
    assert off(got[1], logprobs) < 1e-5


@pytest.mark.parametrize("family", [*HANDLE, *DENSE])
def test_our_attention_gives_the_librarys_logits(family: str) -> None:
    model = tiny(family)
    _, expected = run(model)
    mode = model_fit(model).mode
    _, got = run(model, build(model, NONE, "exact", mode, trial=True))
    assert off(got, expected) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss"])
def test_compressed_cache_is_smaller_and_close(family: str) -> None:
    model = tiny(family)
    tokens, expected = run(model, n=30)
    cache = make_cache(model, GEAR)
    got_tokens, got = run(model, cache, n=30)
    assert got_tokens[:2] == tokens[:2]  # the prompt's attention is exact, its first step nearly
    assert off(got[0], expected[0]) < 1e-5
    store = next(c.store for c in cache if isinstance(c, KVCEntry))
    assert store.dense(0) is None


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe_lite"])
def test_latent_attention_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="latents"):
        make_cache(tiny(family), NONE)


def test_recurrent_model_is_refused() -> None:
    model = tiny("mamba")
    with pytest.raises(ConfigError, match="nothing to compress"):
        make_cache(model, NONE)


def test_method_that_evicts_is_refused_in_dense_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(GEAR), "evicts", True)
    with pytest.raises(ConfigError, match="gear evicts tokens, and the attention of gemma2"):
        make_cache(tiny("gemma2"), GEAR)
    make_cache(tiny("llama"), GEAR)


@pytest.mark.parametrize(
    ("family", "name", "kinds"),
    [
        ("llama", "llama", ("full_attention",)),
        ("gemma3_text", "gemma3_text", ("sliding_attention", "full_attention")),
        ("mistral3", "llama", ("full_attention",)),  # the type of its text_config
        ("gpt2", "gpt2", ("full_attention",)),
    ],
)
def test_shape_knows_the_sizes(family: str, name: str, kinds: tuple[str, ...]) -> None:
    shape = shape_of(tiny(family))
    n_kv_heads = 4 if family == "gpt2" else 2
    assert (shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.head_dim) == (
        *(4, 4, n_kv_heads, 16),
    )
    assert (shape.vocab_size, shape.context_length, shape.dtype_bytes) == (160, 512, 4)
    assert shape.layer_kinds == kinds * (4 // len(kinds))
    assert shape.fingerprint == f"{name}-4l-4h-{n_kv_heads}kv-16d-160v"


def test_sinks_reach_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def observe(
        store: Any, layer: int, q: Any, scale: float, softcap: Any = None, sinks: Any = None
    ) -> None:
        seen.append((q.shape, None if sinks is None else sinks.shape))

    monkeypatch.setattr(KVStore, "observe", observe)
    for family in ("gpt_oss", "llama"):
        model = tiny(family)
        model(ids(9)[None], cache=make_cache(model, NONE))
        assert seen[-1] == ((1, 4, 9, 16), (4,) if family == "gpt_oss" else None)


def test_attention_can_be_put_back(llama: Any) -> None:
    cache = make_cache(llama, NONE)
    expected = run(llama)[0]
    attention.uninstall()
    assert base.scaled_dot_product_attention.__code__.co_filename == base.__file__
    assert run(llama)[0] == expected
    attention.install()
    assert run(llama, cache)[0] == expected


def test_copies_of_entries_share_one_copy_of_the_store(llama: Any) -> None:
    cache = make_cache(llama, GEAR)
    run(llama, cache)
    copied = copy.deepcopy(cache)
    assert len({id(entry.store) for entry in copied}) == 1
    assert copied[0].store is not cache[0].store
    assert copied[0].store.method is cache[0].store.method
    more = ids(20)
    expected = run(llama, copied, prompt=more)[0]
    assert cache[0].offset < copied[0].offset
    assert run(llama, cache, prompt=more)[0] == expected


def test_trim_goes_back(llama: Any) -> None:
    cache = make_cache(llama, NONE)
    llama(ids(20)[None], cache=cache)
    expected = run(llama, copy.deepcopy(cache), prompt=ids(5))[0]
    llama(ids(9)[None], cache=cache)
    assert trim_prompt_cache(cache, 9) == 9
    assert {entry.offset for entry in cache} == {cache[0].store.length()} == {20}
    assert run(llama, cache, prompt=ids(5))[0] == expected


def test_trim_into_coded_tokens_changes_nothing(llama: Any) -> None:
    cache = make_cache(llama, GEAR)
    run(llama, cache)
    n = cache[0].offset
    with pytest.raises(ConfigError, match="trim"):
        trim_prompt_cache(cache, 45)
    assert {entry.offset for entry in cache} == {cache[0].store.length()} == {n}


@pytest.mark.parametrize("n_draft", [1, 3])
@pytest.mark.parametrize("draft_seed", [None, 3])
def test_speculative_decoding(engine: Engine, n_draft: int, draft_seed: int | None) -> None:
    prompt = engine.encode("The old man walked down to the harbour, and")
    draft = engine.model if draft_seed is None else tiny("llama", vocab_size=2048)
    options = {"max_tokens": 24, "draft_model": draft, "num_draft_tokens": n_draft}

    def tokens(cache: Any) -> list[int]:
        pieces = mlx_lm.stream_generate(
            engine.model, engine.tokenizer, prompt, prompt_cache=cache, **options
        )
        return [piece.token for piece in pieces]

    expected = tokens(None)
    assert tokens(make_cache(engine.model, NONE) + make_cache(draft, NONE)) == expected
    gear = parse("gear", {"bits": 8, "group_size": 16, "buffer": 16, "window": 8})
    cache = make_cache(engine.model, gear) + make_cache(draft, gear)
    assert tokens(cache)[:8] == expected[:8]
    assert cache[0].store.dense(0) is None  # compressed on the way, though steps have many tokens


def test_sharers_read_their_owner_and_their_projections_are_freed(llama: Any) -> None:
    method = parse("kvsharer", {"map": "3:1"})
    cache = make_cache(llama, method)
    assert sharers(cache) == (3,)
    expected = run(llama, cache)[0]
    assert cache[0].store.report().layers[3] == 0

    for name in ("k_proj", "v_proj"):
        linear = getattr(llama.layers[3].self_attn, name)
        linear.weight = mx.full(linear.weight.shape, mx.nan)
    assert run(llama, make_cache(llama, method))[0] == expected  # laziness never reads it

    dead = linear.weight.nbytes * 2
    assert dead == 2 * 64 * 2 * 16 * 4  # K and V, d_model, H, D, float32
    del linear, cache
    mx.eval(llama.parameters())
    held = mx.get_active_memory()
    before = sum(x.nbytes for _, x in tree_flatten(llama.parameters()))
    cache = make_cache(llama, method, free=True)
    assert isinstance(llama.layers[3].self_attn.v_proj, Freed)
    assert before - sum(x.nbytes for _, x in tree_flatten(llama.parameters())) == dead
    assert held - mx.get_active_memory() >= dead
    assert run(llama, cache)[0] == expected
    with pytest.raises(ConfigError, match=r"layers \[3\] were freed.*load the model again"):
        make_cache(llama, NONE)
    assert mx.isnan(llama(ids(4)[None])).all()  # nor does it look right with mlx-lm's own cache


def test_freed_weights_of_quantized_models(llama: Any) -> None:
    mlx.nn.quantize(llama, group_size=32, bits=4)
    method = parse("kvsharer", {"map": "3:1"})
    expected = run(llama, make_cache(llama, method))[0]
    before = sum(x.nbytes for _, x in tree_flatten(llama.parameters()))
    dead = sum(x.nbytes for _, x in tree_flatten(llama.layers[3].self_attn.k_proj.parameters()))
    cache = make_cache(llama, method, free=True)
    assert before - sum(x.nbytes for _, x in tree_flatten(llama.parameters())) == 2 * dead
    assert run(llama, cache)[0] == expected


def test_maps_of_hybrids_count_the_models_layers() -> None:
    model = tiny("gemma3_text")
    cache = make_cache(model, parse("kvsharer", {"map": "3:1"}))
    assert sharers(cache) == (3,)
    run(model, cache)
    assert [n > 0 for n in cache[1].store.report().layers] == [True, False]
    with pytest.raises(ConfigError, match=r"\(1, 3\), got layer 2 with sliding_attention"):
        make_cache(model, parse("kvsharer", {"map": "2:1"}))


def test_shared_layer_equals_a_copy_of_keys_and_values(llama: Any) -> None:
    """Layer 3 with layer 1's tokens, by hand over mlx-lm's own entries."""

    class Follower:
        def __init__(self, owner: Any) -> None:
            self.owner, self.offset, self.state = owner, 0, []

        def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
            self.offset += keys.shape[2]
            return self.owner.keys_and_values()

    plain = make_prompt_cache(llama)
    plain[3] = Follower(plain[1])
    expected, logprobs = run(llama, plain)
    got = run(llama, make_cache(llama, parse("kvsharer", {"map": "3:1"})))
    assert got[0] == expected
    assert off(got[1], logprobs) < 1e-5


def test_fused_projections_still_run() -> None:
    model = tiny("phi3")
    method = parse("kvsharer", {"map": "3:1"})
    cache = make_cache(model, method)
    reason = free_projections(model, sharers(cache))
    assert reason is not None
    assert "one matrix" in reason
    run(model, cache)


def test_hook_makes_every_cache_ours(llama: Any) -> None:
    expected = run(llama)[0]
    llama.make_cache = lambda: make_cache(llama, NONE)
    assert all(isinstance(entry, KVCEntry) for entry in make_prompt_cache(llama))
    assert not any(isinstance(entry, KVCEntry) for entry in library_entries(llama))
    assert run(llama)[0] == expected


def test_librarys_own_quantization_is_refused(llama: Any) -> None:
    with pytest.raises(ConfigError, match="kv_bits"):
        list(
            generate_step(
                ids(9), llama, prompt_cache=make_cache(llama, NONE), kv_bits=8, quantized_kv_start=0
            )
        )


def test_servers_prompt_cache_reuses_prefixes(llama: Any) -> None:
    kept, prompt = LRUPromptCache(), [int(i) for i in ids(30)]
    cache = make_cache(llama, GEAR)
    llama(mx.array([prompt]), cache=cache)
    kept.insert_cache("model", prompt, cache)

    longer, rest = kept.fetch_nearest_cache("model", [*prompt, 1, 2])
    assert rest == [1, 2]
    assert (
        run(llama, longer, prompt=mx.array(rest))[0]
        == run(llama, None, 10, mx.array([*prompt, 1, 2]))[0]
    )

    other, rest = kept.fetch_nearest_cache("model", [*prompt[:20], 9, 9])
    assert rest == [9, 9]
    assert other[0].offset == 20
    assert cache[0].offset == 30


def test_bytes_are_counted_once(llama: Any) -> None:
    cache = make_cache(llama, GEAR)
    assert all(entry.empty() and entry.size() == 0 for entry in cache)
    run(llama, cache)
    assert sum(entry.nbytes for entry in cache) == cache[0].store.nbytes > 0
    arrays = tree_flatten([entry.state for entry in cache])
    assert sum(x.nbytes for _, x in arrays) == cache[0].store.nbytes
    assert not any(hasattr(entry, "bits") for entry in cache)
    assert all(entry for entry in cache)  # mlx-lm skips an entry that is falsy


def test_engine_streams_what_mlx_lm_generates(engine: Engine) -> None:
    text = "Once upon a time there was a captain who"
    ids = engine.encode(text)
    progress: list[tuple[int, int]] = []
    cache = engine.make_cache(NONE)
    pieces = list(
        engine.stream(
            ids,
            cache,
            max_tokens=12,
            prefill_step=4,
            on_prefill=lambda done, total: progress.append((done, total)),
        )
    )
    expected = mlx_lm.generate(engine.model, engine.tokenizer, ids, max_tokens=12)
    # mlx-lm drops a leading space
    assert "".join(piece.text for piece in pieces) == " " + expected
    assert progress[0] == (0, len(ids))
    assert progress[-1] == (len(ids), len(ids))
    assert engine.store(cache).length() >= len(ids) + 11
    assert engine.peak_memory() > 0


def test_engine_samples_by_seed(engine: Engine) -> None:
    ids = engine.encode("The sea was")

    def sample(seed: int) -> list[int]:
        cache = engine.make_cache(NONE)
        pieces = engine.stream(ids, cache, max_tokens=12, temp=1.0, top_p=0.9, seed=seed)
        return [piece.token for piece in pieces]

    assert sample(1) == sample(1) != sample(2)


def test_engine_knows_the_model(engine: Engine) -> None:
    shape = engine.shape
    assert engine.context_length == 4096
    assert (shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.head_dim) == (8, 4, 2, 64)
    assert set(shape.layer_kinds) == {"full_attention"}
    assert shape.fingerprint == "llama-8l-4h-2kv-64d-2048v"
    if mx.default_device().type == mx.DeviceType.cpu:
        assert shape.dtype_bytes == 4
    with pytest.raises(ConfigError, match="chat template"):
        engine.encode([{"role": "user", "content": "Hello"}])


def damaged(name: str, change: Callable[[Path], None], tmp_path: Path) -> Path:
    folder = tmp_path / name
    shutil.copytree(kvc.demo.path(), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    change(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64),
        lambda folder: edit(folder, model_type="nonesuch"),
        lambda folder: edit(folder, hidden_size=128),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
    ],
    ids=["no config", "bad config", "no weights", "bad weights", "type", "sizes", "tokenizer"],
)
def test_damaged_model_is_one_line(change: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot load") as info:
        load(damaged("model", change, tmp_path))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("kind", ["bert", "t5", "vit"])
def test_config_of_another_kind_of_model(kind: str, tmp_path: Path) -> None:
    folder = damaged("model", lambda folder: edit(folder, model_type=kind), tmp_path)
    with pytest.raises(BackendError, match=f"Model type {kind} not supported") as info:
        load(folder)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt_oss", "phi3", "cohere2"]
)
def test_fingerprint_is_the_same_in_transformers(family: str, tmp_path: Path) -> None:
    need("torch")
    from kvc.backends.torch import cache as torch_cache
    from tests import families_torch

    # mlx-lm does not read layer_types of these two, but the pattern that is their default
    plain = {"gemma3_text": 6, "cohere2": 4}
    pattern = {"layer_types": None, "num_hidden_layers": plain.get(family)}
    model = families_torch.tiny(family, **(pattern if family in plain else {}))
    model.save_pretrained(tmp_path)
    expected = torch_cache.shape_of(model)
    got = shape_of(mlx_lm.utils.load_model(tmp_path, strict=False)[0])
    assert got.fingerprint == expected.fingerprint
    assert got.layer_kinds == expected.layer_kinds


def test_fingerprint_of_the_bundled_model_is_the_same(engine: Engine) -> None:
    need("torch")
    from kvc.backends.torch.engine import load as load_torch

    assert load_torch(str(kvc.demo.path()), "cpu").shape.fingerprint == engine.shape.fingerprint


def test_text_is_what_transformers_writes(engine: Engine) -> None:
    """Spaces at the beginning, and characters of several tokens."""
    need("torch")
    from kvc.backends.torch.engine import load as load_torch

    other = load_torch(str(kvc.demo.path()), "cpu")
    for prompt in ("Once upon a time there was a captain", "The", "“I am not going,” said"):
        texts = [
            [piece.text for piece in e.stream(e.encode(prompt), e.make_cache(NONE), max_tokens=24)]
            for e in (engine, other)
        ]
        assert texts[0] == texts[1]
        assert len("".join(texts[0])) > 24


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "no-such-owner/no-such-model"])
def test_missing_model_is_one_line(path: str) -> None:
    with pytest.raises(BackendError) as info:
        load(path)
    assert "\n" not in str(info.value)
    assert path in str(info.value)


def test_unknown_dtype() -> None:
    with pytest.raises(KVCError, match="float16"):
        load(kvc.demo.path(), dtype="int4")


def test_dtype_is_set() -> None:
    assert (
        load(kvc.demo.path(), dtype="bfloat16").model.layers[0].mlp.up_proj.weight.dtype
        == mx.bfloat16
    )


def test_hidden_rope_theta_is_warned_of(tmp_path: Path) -> None:
    folder = damaged("model", lambda folder: edit(folder, rope_theta=None), tmp_path)
    with pytest.warns(UserWarning, match='"rope_theta": 50000.0'):
        load(folder)


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    mx.clear_cache()
