"""The transformers adapter and engine: at its lossless limit a cache of ours changes nothing."""

import copy
import json

import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
transformers = pytest.importorskip("transformers", reason="the torch backend needs transformers")

import kvc.demo  # noqa: E402
from kvc.backends.torch import engine as engines  # noqa: E402
from kvc.backends.torch.cache import make_cache, model_fit, shape_of  # noqa: E402
from kvc.backends.torch.entry import KVCCache  # noqa: E402
from kvc.backends.torch.projections import (  # noqa: E402
    free_projections,
    freed_layers,
    gates,
    put_gates,
    skip,
)
from kvc.errors import BackendError, ConfigError  # noqa: E402
from kvc.methods import parse  # noqa: E402
from kvc.store.store import KVStore  # noqa: E402
from tests.families_torch import (  # noqa: E402
    DENSE,
    HANDLE,
    SIZES,
    generate,
    padded_batch,
    tiny,
)


def lossless(model, *, attend=True, prefill="exact"):
    """A cache that compresses nothing; with `attend` even exact tokens are read by the store."""
    cache = make_cache(model, parse("none"), prefill)
    cache.always_attend = attend
    return cache


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("attend", [False, True], ids=["library", "store"])
@pytest.mark.parametrize("kind", [*HANDLE, *DENSE])
def test_lossless_limit_is_the_library(kind, attend):
    model = tiny(kind)
    ids, mask = padded_batch()
    expected = generate(model, ids, mask)
    assert model_fit(model).mode == ("handle" if kind in HANDLE else "dense")
    got = generate(model, ids, mask, past_key_values=lossless(model, attend=attend))
    assert got.tolist() == expected.tolist()
    assert generate(model, ids, mask).tolist() == expected.tolist()  # and without our cache


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gemma2", "gptj"])
def test_padded_rows_equal_single_runs(kind):
    model = tiny(kind)
    ids, mask = padded_batch()
    both = generate(model, ids, mask, past_key_values=lossless(model))
    alone = generate(model, ids[:1, 7:], past_key_values=lossless(model))
    assert both[0, 20:].tolist() == alone[0, 13:].tolist()
    alone = generate(model, ids[1:], past_key_values=lossless(model))
    assert both[1].tolist() == alone[0].tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gptj"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"prefill_chunk_size": 6}],
    ids=str,
)
def test_beams_and_chunks(kind, options):
    model = tiny(kind)
    ids, mask = padded_batch(n_pads=4)
    plain = {"past_key_values": transformers.DynamicCache(config=model.config)}
    expected = generate(model, ids, mask, **options, **plain)
    got = generate(model, ids, mask, past_key_values=lossless(model), **options)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gear", {"group_size": 8, "buffer": 8, "outliers": 1}),
        ("h2o", {"heavy": 40, "recent": 40}),
        ("tova", {"heavy": 80}),
        ("streaming", {"recent": 80}),
        ("minicache", {"gamma": 1, "decode_policy": "keep", "always_keep": 64, "start": 0}),
    ],
)
def test_row_whose_first_piece_is_all_padding(llama, name, settings):
    ids, mask = padded_batch(n_pads=11)
    cache = make_cache(llama, parse(name, settings), "stream")
    got = generate(llama, ids, mask, prefill_chunk_size=8, past_key_values=cache)
    assert got.tolist() == generate(llama, ids, mask).tolist()


@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_prompt_lookup_and_assisted_decoding(kind):
    model = tiny(kind)
    ids = padded_batch()[0][1:].repeat(1, 2)
    expected = generate(model, ids, n=20).tolist()
    got = generate(model, ids, n=20, prompt_lookup_num_tokens=3, past_key_values=lossless(model))
    assert got.tolist() == expected
    assistant = tiny(kind)
    got = generate(model, ids, n=20, assistant_model=assistant, past_key_values=lossless(model))
    assert got.tolist() == expected


def test_continuing_a_copied_prefix(llama):
    ids = padded_batch()[0][1:]
    prefix = lossless(llama)
    llama(ids[:, :10], past_key_values=prefix)
    for _ in range(2):
        cache = copy.deepcopy(prefix)
        got = generate(llama, ids, past_key_values=cache)
        assert got.tolist() == generate(llama, ids).tolist()
    assert prefix.get_seq_length() == 10


def test_operations_on_the_whole_cache(llama):
    ids = padded_batch()[0]
    cache = lossless(llama)
    with torch.no_grad():
        expected = llama(ids[[1, 1, 0]]).logits[:, -1]
        llama(ids, past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 16
        cache.crop(18)  # as a length to keep: nothing to remove
        cache.crop(0)
        cache.crop(15)
        assert cache.get_seq_length() == 15
        assert cache.get_mask_sizes(5, 0) == (20, 0)
        assert cache.get_max_length() == -1
        cache.batch_select_indices(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([0, 1, 3]))
        got = llama(ids[[1, 1, 0], 15:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert generate(llama, ids, past_key_values=cache).tolist() == generate(llama, ids).tolist()
    with pytest.raises(ConfigError, match="on the cache"):
        cache.layers[0].crop(-1)
    with pytest.raises(ConfigError, match="offload"):
        cache.offload(0)


def test_sliding_layers_stay_the_library_s():
    cache = lossless(tiny("gemma2"))
    assert cache.is_sliding == [True, False] * 2
    assert cache.model_layers == (1, 3)


def test_maps_of_hybrids_count_the_models_layers():
    model = tiny("gemma2")
    cache = make_cache(model, parse("kvsharer", {"map": "3:1"}))
    assert (cache.model_layers, cache.sharers) == ((1, 3), {3})
    assert [cache.store.owner(layer) for layer in range(2)] == [0, 0]
    generate(model, padded_batch()[0], past_key_values=cache)
    assert [n > 0 for n in cache.store.report().layers] == [True, False]
    with pytest.raises(ConfigError, match=r"\(1, 3\), got layer 2 with sliding_attention"):
        make_cache(model, parse("kvsharer", {"map": "2:1"}))


def test_padding_must_be_on_the_left(llama):
    ids, mask = padded_batch()
    with pytest.raises(ConfigError, match="left"):
        llama(ids, attention_mask=mask.flip(1), past_key_values=lossless(llama))


def test_changed_attention_is_noticed():
    model = tiny("llama")
    cache = lossless(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="make a new one"):
        generate(model, padded_batch()[0], past_key_values=cache)
    ids = padded_batch()[0]
    got = generate(model, ids, past_key_values=lossless(model))
    assert got.tolist() == generate(model, ids).tolist()


def test_saved_config_names_no_attention_of_ours(llama, tmp_path):
    make_cache(llama, parse("none"))
    llama.save_pretrained(tmp_path)
    assert "kvc" not in (tmp_path / "config.json").read_text()
    assert set(json.loads((tmp_path / "config.json").read_text())) >= {"model_type"}


def test_refusals():
    with pytest.raises(ConfigError, match="nothing to compress"):
        make_cache(tiny("mistral with windows"), parse("none"))
    with pytest.raises(ConfigError, match="latent attention"):
        make_cache(tiny("deepseek_v3"), parse("none"))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
    )
    with pytest.raises(ConfigError, match=r"got T5For.*, an encoder-decoder"):
        make_cache(t5, parse("none"))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "stablelm"])
def test_gates_skip_projections_and_open_again(kind):
    model = tiny(kind)
    ids = padded_batch()[0]
    expected = model(ids).logits
    assert put_gates(model, {1}) is None
    assert len(gates(model)) == 2
    torch.testing.assert_close(model(ids).logits, expected)
    k_proj = model.model.layers[1].self_attn.k_proj
    skip(gates(model), {1})
    zeros = k_proj(torch.ones(2, 3, 64))
    assert not zeros.any()
    assert zeros.stride() == (0, 0, 0)
    assert model(ids).logits.isfinite().all()
    skip(gates(model), ())
    torch.testing.assert_close(model(ids).logits, expected)


def weight_bytes(model):
    """Bytes that the parameters really hold, each storage once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "stablelm"])
def test_sharers_weights_are_gone_from_memory(kind):
    model = tiny(kind, num_hidden_layers=4)
    ids = padded_batch()[0]
    method = parse("kvsharer", {"map": "3:1,2:1"})
    before = weight_bytes(model)
    expected = generate(model, ids, past_key_values=make_cache(model, method))
    assert weight_bytes(model) == before  # kept, for caches of other methods
    plain = generate(model, ids, past_key_values=lossless(model))

    cache = make_cache(model, method, free=True)
    attention = model.model.layers[1].self_attn
    owned = [*attention.k_proj.parameters(), *attention.v_proj.parameters()]
    dead = 2 * sum(p.nbytes for p in owned)  # of two sharers; biases too, where there are any
    assert dead >= 2 * 2 * 64 * 2 * 16 * 4  # sharers, K and V, d_model, H, D, float32
    assert before - weight_bytes(model) == dead - 4 * len(owned) * 2  # one number each stays
    assert generate(model, ids, past_key_values=cache).tolist() == expected.tolist()
    assert plain.tolist() != expected.tolist()

    assert freed_layers(model) == {2, 3}
    with pytest.raises(ConfigError, match=r"layers \[2, 3\] were freed.*load the model again"):
        make_cache(model, parse("none"))
    with pytest.raises(ConfigError, match=r"layers \[2\] were freed"):
        make_cache(model, parse("kvsharer", {"map": "3:1"}))
    with pytest.raises(ConfigError, match="load the model again"):
        model(ids)  # with no cache of ours


def test_fused_projections_are_left_alone():
    model = tiny("phi3")
    assert "one matrix" in free_projections(model, {1})
    assert gates(model) == []
    before = weight_bytes(model)
    cache = make_cache(model, parse("kvsharer", {"map": "1:0"}), free=True)
    assert weight_bytes(model) == before
    assert generate(model, padded_batch()[0], past_key_values=cache).shape == (2, 32)


def test_method_that_evicts_is_refused_in_dense_mode(monkeypatch):
    method = parse("gear", {"group_size": 16})
    monkeypatch.setattr(type(method), "evicts", True)
    with pytest.raises(ConfigError, match="gear evicts tokens, and the attention of gptj"):
        make_cache(tiny("gptj"), method)
    make_cache(tiny("llama"), method)


def test_soft_caps_and_sinks_reach_the_store(monkeypatch):
    seen = []

    def observe(store, layer, q, scale, softcap=None, sinks=None):
        seen.append((tuple(q.shape), scale, softcap, None if sinks is None else tuple(sinks.shape)))

    monkeypatch.setattr(KVStore, "observe", observe)
    for kind in ("gemma2", "gpt_oss", "llama"):
        model = tiny(kind, num_hidden_layers=2)
        model(padded_batch()[0], past_key_values=lossless(model, attend=False))
        (shape, scale, softcap, sinks) = seen[-1]
        assert (shape, scale) == ((2, 4, 20, 16), 0.25)
        assert softcap == (50.0 if kind == "gemma2" else None)
        assert sinks == ((4,) if kind == "gpt_oss" else None)


def test_shape_knows_the_sizes():
    for kind, kinds in (
        ("gemma2", ("sliding_attention", "full_attention") * 2),
        ("qwen3_next", ("linear_attention", "full_attention") * 2),
        ("gptj", ("full_attention",) * 2),
    ):
        shape = shape_of(tiny(kind))
        heads = (shape.n_heads, shape.n_kv_heads, shape.head_dim)
        assert heads == (4, 4 if kind == "gptj" else 2, 16)
        assert (shape.layer_kinds, shape.n_layers) == (kinds, len(kinds))
        assert (shape.vocab_size, shape.context_length, shape.dtype_bytes) == (*(257, 512, 4),)
        assert shape.fingerprint == f"{kind}-{len(kinds)}l-4h-{heads[1]}kv-16d-257v"


@pytest.fixture(scope="module")
def engine():
    return engines.load(str(kvc.demo.path()), "cpu")


def test_stream_is_generate(engine):
    ids = engine.encode("The old man walked to the river and looked at the water. " * 12)
    seen = []
    cache = engine.make_cache(parse("none"))
    pieces = list(
        engine.stream(
            ids, cache, max_tokens=12, prefill_step=64, on_prefill=lambda *x: seen.append(x)
        )
    )
    expected = generate(engine.model, torch.tensor([ids]))[0, len(ids) :].tolist()
    assert [piece.token for piece in pieces] == expected
    before, after = map(engine.tokenizer.decode, (ids, ids + expected))
    assert "".join(piece.text for piece in pieces) == after[len(before) :]
    assert len(seen) == -(-len(ids) // 64)
    assert seen[-1] == (len(ids), len(ids))
    assert isinstance(engine.store(cache), object)
    assert engine.peak_memory() > 0


def test_stream_samples_by_seed(engine):
    ids = engine.encode("The old man")

    def sample(seed):
        cache = engine.make_cache(parse("none"))
        pieces = engine.stream(ids, cache, max_tokens=16, temp=1.0, top_p=0.9, seed=seed)
        return [piece.token for piece in pieces]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_stream_stops_and_passes_errors_on(engine):
    ids = engine.encode("The old man")
    cache = engine.make_cache(parse("none"))
    stream = engine.stream(ids, cache, max_tokens=2000)
    next(stream)
    stream.close()
    assert cache.get_seq_length() < 1000
    broken = engine.make_cache(parse("none"))
    broken.note_mask = lambda *_: (_ for _ in ()).throw(ConfigError("on the left"))
    with pytest.raises(ConfigError, match="on the left"):
        list(engine.stream(ids, broken))


def test_engine_knows_its_model(engine):
    assert engine.context_length == 4096
    assert engine.shape.n_layers == 8
    assert (engine.shape.n_heads, engine.shape.n_kv_heads, engine.shape.head_dim) == (4, 2, 64)
    assert engine.shape.dtype_bytes == 4  # float16 on disk, float32 on a CPU
    assert engine.shape.fingerprint == "llama-8l-4h-2kv-64d-2048v"
    assert set(engine.shape.layer_kinds) == {"full_attention"}
    with pytest.raises(ConfigError, match="chat template"):
        engine.encode([{"role": "user", "content": "Hello"}])


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(BackendError, match="no model in"):
        engines.load(str(tmp_path / "nowhere"), "cpu")
    with pytest.raises(ConfigError, match="dtype"):
        engines.load(str(kvc.demo.path()), "cpu", "int3")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no GPU"):
            engines.load(str(kvc.demo.path()), "cuda")
    for path in ("./nowhere", "no-such-owner/no-such-model", "not/a/name"):
        with pytest.raises(BackendError, match=path.removeprefix("./")) as info:
            engines.load(path, "cpu")
        assert "\n" not in str(info.value)
    with pytest.raises(BackendError, match=r"there is no .*config\.json"):
        engines.load(str(tmp_path), "cpu")


@pytest.mark.parametrize("kind", ["vit", "t5", "bart", "modernbert"])
def test_config_of_another_kind_of_model(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match=f"is a {kind} model, not a causal") as info:
        engines.load(str(tmp_path), "cpu")
    assert "\n" not in str(info.value)


def test_model_that_reads_both_ways_is_refused(tmp_path):
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "vocab_size")}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(BackendError, match=r"no file named model\.safetensors"):
        engines.load(str(tmp_path), "cpu")
    with pytest.raises(ConfigError, match="expected a causal language model, got Bert") as info:
        make_cache(transformers.BertLMHeadModel(config), parse("none"))
    assert "\n" not in str(info.value)


def test_dtype_is_set():
    for dtype, expected in (
        (None, torch.float32),
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
    ):
        engine = engines.load(str(kvc.demo.path()), "cpu", dtype)
        assert {p.dtype for p in engine.model.parameters()} == {expected}
    assert engine.shape.dtype_bytes == 2
    cache = engine.make_cache(parse("none"))
    assert len(list(engine.stream(engine.encode("The sea"), cache, max_tokens=3))) == 3
    assert engine.store(cache).dense(0)[0].dtype == torch.bfloat16


def test_no_prompt_ends_in_a_lone_token():
    for n in range(2, 80):
        for step in (2, 3, 8, 16):
            size = engines.chunk_size(n, step)
            assert size == 1 or n % size != 1 or n == 1
            assert size <= max(step, n)


def test_bf16_through_the_store(llama):
    model = copy.deepcopy(llama).to(torch.bfloat16)
    ids, mask = padded_batch()
    cache = lossless(model)
    assert isinstance(cache, KVCCache)
    assert generate(model, ids, mask, past_key_values=cache).shape == (2, 32)
