"""transformers' ways to decode with every method: batches, beams, samples, and speculation."""

import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
transformers = pytest.importorskip("transformers", reason="the torch backend needs transformers")

# ruff: noqa: E402
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import kvc
import kvc.demo
from kvc.backends.torch.cache import shape_of
from kvc.errors import ConfigError
from kvc.files import write_kernels
from kvc.methods import PRESETS, parse
from kvc.ops.evict import Kernels
from kvc.store.store import KVStore
from tests.settings import lossless, lossy

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # logits far apart, and no text of one token
}
N, NEW = 21, 16  # tokens of the prompt and of the answer
PADS = (7, 0, 2)
LOSSLESS, LOSSY = lossless(8), lossy(8)
PIECES = ("minicache", "stream")
SPECULATIVE = ("lookup", "assisted", "sure")


def tiny(seed: int = 0, family: str = "llama", **changes: Any) -> Any:
    """A random model in float64, where no two tokens are as likely but for rounding."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.generation_config.eos_token_id = None
    return model


class Lab:
    """A model, prompts that repeat themselves, and the answers to each alone."""

    def __init__(self, folder: Path) -> None:
        self.model, self.draft = tiny(), tiny(1, num_hidden_layers=1)
        self.kernels = str(folder / "kernels.safetensors")
        rng = np.random.default_rng(0)
        shapes = [(4, 16, 8), (4, 8, 4), (2, 16, 8), (2, 8, 4), (2, 4, 4), (2, 4), (2, 4)]
        maps = {
            layer: Kernels(*(0.3 * rng.standard_normal(s).astype("f4") for s in shapes))
            for layer in range(4)
        }
        write_kernels(self.kernels, maps, shape_of(self.model).fingerprint, {})
        torch.manual_seed(1)
        self.ids = torch.randint(3, 97, (3, N))
        self.ids[:, 8:] = self.ids[:, : N - 8]
        self.mask = torch.ones_like(self.ids)
        for row, pads in enumerate(PADS):
            self.mask[row, :pads] = self.ids[row, :pads] = 0
        self.alone = cache(self._alone)

    def cache(self, name: str, settings: dict[str, Any], prefill: str = "exact") -> Any:
        named = {k: self.kernels if v == "KERNELS" else v for k, v in settings.items()}
        return kvc.make_cache(self.model, parse(name, named), prefill)

    def run(self, cache: Any, ids: Any, mask: Any = None, **options: Any) -> Any:
        """The new tokens of each row."""
        torch.manual_seed(5)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            past_key_values=cache,
            max_new_tokens=NEW,
            **{"do_sample": False, **options},
        )
        return out[:, ids.shape[1] :]

    def _alone(self, name: str, row: int, beams: int = 1) -> Any:
        """Tokens of one prompt without padding; with the library's own cache, or ours."""
        ours = self.cache(name, LOSSY[name]) if name else None
        return self.run(ours, self.ids[row : row + 1, PADS[row] :], num_beams=beams)

    def together(self, name: str = "", beams: int = 1) -> Any:
        """The same of all three prompts."""
        return torch.cat([self.alone(name, row, beams) for row in range(3)])

    def speculative(self, mode: str) -> dict[str, Any]:
        draft = {"assisted": self.draft, "sure": self.model}
        return (
            {"assistant_model": draft[mode]} if mode in draft else {"prompt_lookup_num_tokens": 3}
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def is_compressed(cache: Any) -> bool:
    """Whether the deepest layer, which sharing, merging and coding all touch, is."""
    return cache.store.dense(3) is None


def test_every_preset_is_here() -> None:
    assert {*LOSSY} | {"none"} >= {*PRESETS}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", LOSSLESS)
def test_padded_batch_is_the_librarys_rows_at_the_lossless_limit(
    lab: Lab, name: str, beams: int
) -> None:
    cache = lab.cache(name, LOSSLESS[name])
    got = lab.run(cache, lab.ids, lab.mask, num_beams=beams)
    assert torch.equal(got, lab.together(beams=beams))
    assert is_compressed(cache) == (name not in ("none", "kvsharer"))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", LOSSY)
def test_padding_changes_nothing(lab: Lab, name: str, beams: int) -> None:
    cache = lab.cache(name, LOSSY[name])
    got = lab.run(cache, lab.ids, lab.mask, num_beams=beams)
    assert torch.equal(got, lab.together(name, beams))
    assert not torch.equal(got, lab.together(beams=beams))
    assert is_compressed(cache) == (name != "kvsharer")


@pytest.mark.parametrize("name", LOSSLESS)
def test_samples_are_the_librarys_at_the_lossless_limit(lab: Lab, name: str) -> None:
    options = {"do_sample": True, "num_return_sequences": 3}
    expected = lab.run(None, lab.ids, lab.mask, **options)
    assert len({tuple(row) for row in expected.tolist()}) == 9
    got = lab.run(lab.cache(name, LOSSLESS[name]), lab.ids, lab.mask, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", LOSSY)
def test_returned_sequences_are_samples_of_a_repeated_batch(lab: Lab, name: str) -> None:
    ids, mask = (x.repeat_interleave(2, 0) for x in (lab.ids, lab.mask))
    expected = lab.run(lab.cache(name, LOSSY[name]), ids, mask, do_sample=True)
    options = {"do_sample": True, "num_return_sequences": 2}
    got = lab.run(lab.cache(name, LOSSY[name]), lab.ids, lab.mask, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", SPECULATIVE)
@pytest.mark.parametrize("name", LOSSLESS)
def test_speculation_changes_nothing_at_the_lossless_limit(lab: Lab, name: str, mode: str) -> None:
    cache = lab.cache(name, LOSSLESS[name])
    got = lab.run(cache, lab.ids[1:2], **lab.speculative(mode))
    assert torch.equal(got, lab.alone("", 1))
    assert cache.store.length() == N + NEW - 1


@pytest.mark.parametrize("mode", SPECULATIVE)
@pytest.mark.parametrize("name", LOSSY)
def test_speculation_takes_back_what_is_not_compressed(
    lab: Lab, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step compresses what earlier steps left; its own tokens can always be taken back."""
    trims = []
    trim = KVStore.trim
    monkeypatch.setattr(
        KVStore, "trim", lambda store, n: (trims.append(store.dense(3) is None), trim(store, n))[1]
    )
    cache = lab.cache(name, LOSSY[name])
    got = lab.run(cache, lab.ids[1:2], **lab.speculative(mode))
    expected = lab.alone(name, 1)
    assert got.shape == (1, NEW)
    assert torch.equal(got[:, :1], expected[:, :1])  # the prompt's attention is exact
    assert cache.store.length() == N + NEW - 1
    if name == "kvsharer":  # what it loses does not depend on the steps
        assert torch.equal(got, expected)
    else:
        assert any(trims)


@pytest.mark.parametrize(
    ("name", "prefill"),
    # what MiniCache retains is decided by the first piece for good: it has no lossless limit then
    [(name, p) for p in ("exact", "stream") for name in LOSSLESS if (name, p) != PIECES],
)
def test_prompt_in_pieces(lab: Lab, name: str, prefill: str) -> None:
    cache = lab.cache(name, LOSSLESS[name], prefill)
    got = lab.run(cache, lab.ids, lab.mask, num_beams=3, prefill_chunk_size=8)
    assert torch.equal(got, lab.together(beams=3))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}],
    ids=["beams", "lookup", "samples"],
)
@pytest.mark.parametrize("name", ["none", "gear", "h2o"])
def test_hybrid_model(name: str, options: dict[str, Any]) -> None:
    """The library's sliding layers and ours are reordered and cropped together."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny(2, "gemma3_text", sliding_window=8, query_pre_attn_scalar=16, layer_types=kinds)
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (1, 13)).repeat(1, 2)

    def run(cache: Any) -> Any:
        torch.manual_seed(5)
        rest = {"past_key_values": cache, "max_new_tokens": 12, "do_sample": False}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **{**rest, **options})

    expected = run(None)
    cache = kvc.make_cache(model, parse(name, LOSSLESS[name]))
    assert torch.equal(run(cache), expected)
    assert (cache.store.dense(1) is None) == (name != "none")


def filled(lab: Lab, name: str, **settings: Any) -> Any:
    """A cache after the prompt and some steps."""
    cache = lab.cache(name, {**LOSSY[name], **settings})
    lab.run(cache, lab.ids[1:2])
    assert cache.get_seq_length() == N + NEW - 1
    return cache


@pytest.mark.parametrize("n", [9, 12])
@pytest.mark.parametrize("name", ["kivi", "gear", "gear2", "minicache+gear"])
def test_cropping_more_is_refused_and_the_setting_named_that_permits_it(
    lab: Lab, name: str, n: int
) -> None:
    cache = filled(lab, name, **{"gear.window": 0})
    with pytest.raises(ConfigError, match=rf"gear\.window={n} keeps enough") as info:
        cache.crop(-n)
    assert "\n" not in str(info.value)
    assert cache.get_seq_length() == N + NEW - 1
    cache = filled(lab, name, **{"gear.window": n})
    cache.crop(-n)
    assert cache.get_seq_length() == N + NEW - 1 - n
    assert lab.run(cache, lab.ids[1:2].repeat(1, 2)).shape == (1, NEW)


@pytest.mark.parametrize("name", ["h2o", "less", "tova", "streaming", "minicache", "h2o+token"])
def test_cropping_more_than_the_last_step_is_refused(lab: Lab, name: str) -> None:
    cache = filled(lab, name)
    with pytest.raises(ConfigError, match="expected at most 1 tokens, as many as are not"):
        cache.crop(-2)
    cache.crop(-1)
    assert cache.get_seq_length() == N + NEW - 2


def test_cropping_nothing_ends_the_prompt(lab: Lab) -> None:
    """A step whose tokens were all accepted is a step, though it has many queries."""
    cache = lab.cache("gear", LOSSY["gear"])
    for start, stop in ((0, 16), (16, 19), (19, 21)):
        lab.model(lab.ids[1:2, start:stop], past_key_values=cache)
        assert is_compressed(cache) == (start == 19)
        if start:
            cache.crop(0)


WINDOW = "sliding_attention: the library's own cache, it keeps a window only"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3_text", {"query_pre_attn_scalar": 16}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_scaling": None}),
    ],
)
def test_report_says_what_each_layer_keeps(family: str, changes: dict[str, Any]) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny(2, family, sliding_window=8, layer_types=kinds, **changes).float()

    def words(name: str, **settings: Any) -> list[str]:
        return kvc.report(kvc.make_cache(model, parse(name, settings))).kinds

    kept = "full_attention: as it came"
    assert words("none") == [WINDOW, kept] * 2
    assert words("gear", group_size=8, buffer=8) == [WINDOW, "full_attention: compressed"] * 2
    merged = [f"full_attention: merged with layer {layer}" for layer in (3, 1)]
    assert words("minicache", start=0) == [WINDOW, merged[0], WINDOW, merged[1]]
    assert words("kvsharer", map="3:1") == [WINDOW, kept, WINDOW, "full_attention: reads layer 1"]


def test_report_says_which_layers_the_model_shares_itself() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"num_kv_shared_layers": 2, "global_head_dim": 16, "sliding_window": 8}
    sizes |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
    model = tiny(2, "gemma4_text", layer_types=kinds, **sizes)
    words = kvc.report(kvc.make_cache(model, parse("gear", {"group_size": 8, "buffer": 8}))).kinds
    assert words[:2] == [WINDOW, "full_attention: compressed"]
    assert [word.split(",")[0] for word in words[2:]] == [
        "no_cache: it reads another layer's by the model's design"
    ] * 2


def test_model_that_gives_nan_is_said_to() -> None:
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(
        ConfigError, match="expected numbers from LlamaForCausalLM, got NaN"
    ) as info:
        kvc.make_cache(model, "none")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("born", [True, False])
def test_interrupt_at_the_threads_birth_leaves_none(
    monkeypatch: pytest.MonkeyPatch, born: bool
) -> None:
    engine = kvc.load_engine("cpu", str(kvc.demo.path()), "float32")
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if born:
            start(thread)
        raise KeyboardInterrupt

    cache = engine.make_cache(parse("none"))
    options: dict[str, Any] = {"temp": 0.0, "top_p": 1.0, "seed": 0, "prefill_step": 512}
    stream = engine.stream([5] * 8, cache, max_tokens=999, on_prefill=None, **options)
    before = threading.active_count()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert threading.active_count() == before
    assert cache.get_seq_length() < 20
