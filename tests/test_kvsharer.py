"""KVSharer's maps, and what sharing does to a model, on every library."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import kvc.demo
import kvc.methods.kvsharer as module
from kvc.backends.base import FULL, ModelShape
from kvc.cli import main
from kvc.errors import ArtifactError, ConfigError
from kvc.files import read_map, write_map
from kvc.methods import KVSharer, parse
from tests.conftest import need
from tests.oracles import kvsharer as oracle

PROMPT = "The code of Anna is 4821. It was a dark night and the old house stood by the river."
BUNDLED = "llama-8l-4h-2kv-64d-2048v"
N, K = 24, 6  # tokens of the prompt and of the answer
MAP = "7:3,5:3,3:1"  # compressed: layers 3, 5 and 7 read layer 1


def shape(n_layers: int = 8, kinds: tuple[str, ...] = (), **changes: Any) -> ModelShape:
    sizes = {"n_layers": n_layers, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64}
    kept = {"dtype_bytes": 4, "layer_kinds": kinds or (FULL,) * n_layers, "context_length": 4096}
    return ModelShape(**{"family": "llama", "vocab_size": 2048, **sizes, **kept, **changes})


def map_file(path: Path, owners: list[int], model: str = BUNDLED) -> str:
    write_map(path / "map.json", owners, model, {})
    return str(path / "map.json")


class Lab:
    """The bundled model on one library, whose arrays come and go as NumPy's."""

    def __init__(self, library: str) -> None:
        need(library)
        self.library = library
        self.engine = import_module(f"kvc.backends.{library}.engine").load(
            str(kvc.demo.path()), "cpu", "float32"
        )
        self.model = self.engine.model
        self.ids = self.engine.encode(PROMPT)[: N + K]
        assert len(self.ids) == N + K

    def plain(self) -> Any:
        """The library's own cache."""
        if self.library == "mlx":
            return import_module("mlx_lm.models.cache").make_prompt_cache(self.model)
        cache_utils = import_module("transformers.cache_utils")
        return cache_utils.DynamicCache(config=self.model.config)

    def make(self, name: str = "kvsharer", **settings: str) -> Any:
        return self.engine.make_cache(parse(name, settings))

    def logits(self, cache: Any, ids: list[int]) -> Any:
        """Logits [T, vocabulary] of tokens that follow those in the cache."""
        if self.library == "mlx":
            mx = import_module("mlx.core")
            return np.array(self.model(mx.array([ids]), cache=cache)[0])
        torch = import_module("torch")
        with torch.no_grad():
            return self.model(torch.tensor([ids]), past_key_values=cache).logits[0].numpy()

    def run(self, cache: Any) -> Any:
        """Logits of the prompt at once, then of the answer token by token."""
        pieces = [self.logits(cache, self.ids[:N])]
        pieces += [self.logits(cache, [token]) for token in self.ids[N:]]
        return np.concatenate(pieces)

    def held(self) -> int:
        """Bytes that the weights really hold."""
        if self.library == "mlx":
            utils = import_module("mlx.utils")
            return sum(x.nbytes for _, x in utils.tree_flatten(self.model.parameters()))
        storages = [p.untyped_storage() for p in self.model.parameters()]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def block(self, layer: int) -> Any:
        inner = self.model if self.library == "mlx" else self.model.model
        return inner.layers[layer]

    def change(self, weights: Any, to: Any) -> None:
        """Sets `weights.weight` to a number, or to what a function makes of it."""
        old = np.array(weights.weight) if self.library == "mlx" else weights.weight.detach().numpy()
        new = to(old) if callable(to) else np.full_like(old, to)
        if self.library == "mlx":
            weights.weight = import_module("mlx.core").array(new)
        else:
            weights.weight.data = import_module("torch").from_numpy(new.copy())


@pytest.fixture(scope="module", params=["torch", "mlx"])
def kept(request: pytest.FixtureRequest) -> Lab:
    """A model that no test changes."""
    return Lab(request.param)


@pytest.fixture(params=["torch", "mlx"])
def lab(request: pytest.FixtureRequest) -> Lab:
    """A model to change."""
    return Lab(request.param)


# Maps


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(*(st.integers(0, i) for i in range(n)))))
def test_owners_are_the_oracles(owners: tuple[int, ...]) -> None:
    text = ",".join(f"{i}:{owner}" for i, owner in enumerate(owners))
    got = KVSharer(text).owners(len(owners))
    assert oracle.why_invalid(got, len(owners) - 1) is None
    while owners != oracle.compress_paths(owners):
        owners = oracle.compress_paths(owners)
    assert got == owners
    assert KVSharer(text).check(shape(len(owners))).owners(len(owners)) == got


def test_chains_are_followed() -> None:
    assert KVSharer("5:3,3:1").owners(6) == (0, 1, 2, 1, 4, 1)
    assert KVSharer("3:1, 5:3").owners(6) == (0, 1, 2, 1, 4, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3:5", "got 3:5"),
        ("-1:-1", "got -1:-1"),
        ("0:-1", "got 0:-1"),
        ("5", "such as 5:1,7:3"),
        ("5:1:0", "such as 5:1,7:3"),
        ("5:1,", "such as 5:1,7:3"),
        ("five:1", "such as 5:1,7:3"),
        ("5:1,5:3", "one owner for a layer"),
    ],
)
def test_wrong_maps_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as info:
        KVSharer(text)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.25, 25, float("nan")])
def test_wrong_shares_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share must be a fraction of the layers"):
        KVSharer(share=share)


def test_without_a_map_there_are_no_owners() -> None:
    with pytest.raises(ConfigError, match="expected a map from sharers to owners, got none"):
        KVSharer().owners(8)


def test_map_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="names layer 8, the model has 8 layers"):
        KVSharer("8:1").owners(8)
    with pytest.raises(ConfigError, match="names layer 8, the model has 8 layers"):
        KVSharer("8:1").check(shape())


def test_file_and_text_are_the_same_map(tmp_path: Path) -> None:
    path = map_file(tmp_path, [0, 1, 2, 1, 4, 3, 6, 3])
    from_file = parse("kvsharer", {"map": path}).layout
    assert from_file is not None
    Path(path).unlink()  # it is read once
    assert from_file.owners(8) == KVSharer(MAP).owners(8) == (0, 1, 2, 1, 4, 1, 6, 1)
    fitted = from_file.check(shape())
    assert fitted.owners(8) == from_file.owners(8)
    assert fitted == KVSharer("3:1,5:3,7:3")  # which needs no file, and is its own answer
    assert fitted.check(shape()) == fitted


def test_identity_file_stays_the_identity(tmp_path: Path) -> None:
    fitted = KVSharer(map_file(tmp_path, list(range(8)))).check(shape())
    assert fitted.owners(8) == tuple(range(8))
    assert fitted.check(shape()).owners(8) == tuple(range(8))


def test_file_of_another_model_is_refused(tmp_path: Path) -> None:
    other = BUNDLED.replace("llama", "qwen2")
    with pytest.raises(ArtifactError) as info:
        KVSharer(map_file(tmp_path, [0] * 8, other)).check(shape())
    assert BUNDLED in str(info.value)
    assert other in str(info.value)
    with pytest.raises(ArtifactError, match="map of 8 layers, got one of 7"):
        KVSharer(map_file(tmp_path, [0] * 7)).check(shape())


def test_file_that_says_of_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"map": [0, 0]}))
    with pytest.raises(ArtifactError, match="it has no format, kind, model"):
        parse("kvsharer", {"map": str(path)})
    with pytest.raises(ArtifactError, match="no such file"):
        parse("kvsharer", {"map": str(tmp_path / "none.json")})


def test_hybrids_number_the_stores_layers(tmp_path: Path) -> None:
    kinds = ("sliding_attention", "sliding_attention", FULL) * 4
    hybrid = shape(12, kinds)
    full = (2, 5, 8, 11)
    fitted = KVSharer("11:8,8:2").check(hybrid)
    assert fitted == KVSharer("11:8,8:2")  # numbers are the model's
    assert fitted.owners(4, full) == (0, 1, 0, 0)
    owners = [0, 1, 2, 3, 4, 5, 6, 7, 2, 9, 10, 8]
    from_file = KVSharer(map_file(tmp_path, owners, hybrid.fingerprint)).check(hybrid)
    assert from_file.owners(4, full) == (0, 1, 0, 0)
    identity = KVSharer("0:0").check(hybrid)
    assert identity.check(hybrid).owners(4, full) == (0, 1, 2, 3)
    assert parse("kvsharer", {"map": "11:8,8:2"}).check(hybrid).owners(4) == (0, 1, 0, 0)
    for text, layer in (("11:3", 3), ("10:2", 10), ("4:3", 3)):
        with pytest.raises(ConfigError) as info:
            KVSharer(text).check(hybrid)
        assert f"(2, 5, 8, 11), got layer {layer} with sliding_attention" in str(info.value)


def test_models_that_share_by_themselves_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 6 for 8 layers"):
        KVSharer("3:1").check(shape(8, (FULL,) * 6))


def test_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    monkeypatch.setattr(module, "read_map", lambda path: reads.append(path) or read_map(path))
    layout = KVSharer(map_file(tmp_path, [0] * 8))
    for _ in range(3):
        layout.check(shape()).owners(8)
    assert len(reads) == 1


# Models


def test_identity_changes_no_bit(kept: Lab, tmp_path: Path) -> None:
    cache = kept.make(map=map_file(tmp_path, list(range(8))))
    np.testing.assert_array_equal(kept.run(cache), kept.run(kept.plain()))


def test_identity_changes_no_other_method(kept: Lab, tmp_path: Path) -> None:
    settings = {"bits": "4", "group_size": "8", "buffer": "8"}
    expected = kept.run(kept.make("gear", **settings))
    path = map_file(tmp_path, list(range(8)))
    both = {f"gear.{key}": value for key, value in settings.items()} | {"kvsharer.map": path}
    np.testing.assert_array_equal(kept.run(kept.make("kvsharer+gear", **both)), expected)


def test_only_owners_are_stored(kept: Lab) -> None:
    cache = kept.make(map=MAP)
    store = kept.engine.store(cache)
    sharers, n = {3, 5, 7}, 0
    for piece in (kept.ids[:N], *([token] for token in kept.ids[N:])):
        kept.logits(cache, piece)
        n += len(piece)
        held = 0
        for layer in set(range(8)) - sharers:
            k, v = store.dense(layer)
            assert k.shape == v.shape == (1, 2, n, 64)  # no owner loses its history
            held += k.nbytes + v.nbytes
        assert held == oracle.cache_bytes(8, len(sharers), 2, 64, n, e=4)
        report = store.report()
        assert {i for i, size in enumerate(report.layers) if not size} == sharers
        assert report.dense_bytes == oracle.cache_bytes(8, 0, 2, 64, n, e=4)
        assert report.nbytes == sum(x.nbytes for x in store.arrays()) >= held


def test_decoding_is_prefilling(kept: Lab) -> None:
    step_by_step = kept.run(kept.make(map=MAP))
    at_once = kept.logits(kept.make(map=MAP), kept.ids)
    np.testing.assert_allclose(step_by_step, at_once, atol=1e-5 * np.abs(at_once).max())
    plain = kept.logits(kept.plain(), kept.ids)
    assert np.abs(plain - at_once).max() > 0.01 * np.abs(plain).max()  # sharing does something


def test_sharers_ignore_their_weights(lab: Lab) -> None:
    expected = lab.run(lab.make(map=MAP))
    for layer in (3, 5, 7):
        lab.change(lab.block(layer).self_attn.k_proj, np.nan)
        lab.change(lab.block(layer).self_attn.v_proj, np.nan)
    np.testing.assert_array_equal(lab.run(lab.make(map=MAP)), expected)
    assert np.isnan(lab.run(lab.plain())).any()


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_owners_reach_their_sharers(lab: Lab, name: str) -> None:
    """Layer 1 itself is silent, so that only its sharers can tell of its keys and values."""
    lab.change(lab.block(1).self_attn.o_proj, 0.0)
    alone = (3, 5, 7)
    before = {layer: lab.run(lab.make(map=f"{layer}:1")) for layer in alone}
    apart = lab.run(lab.make(map="3:2"))
    lab.change(getattr(lab.block(1).self_attn, name), lambda w: np.roll(w, 1, 0))
    for layer in alone:
        assert np.abs(lab.run(lab.make(map=f"{layer}:1")) - before[layer]).max() > 1e-2
    np.testing.assert_array_equal(lab.run(lab.make(map="3:2")), apart)


def test_weights_of_sharers_are_freed_on_demand(lab: Lab) -> None:
    before = lab.held()
    expected = lab.run(lab.make(map=MAP))
    assert lab.held() == before
    cache = lab.engine.make_cache(parse("kvsharer", {"map": MAP}), free=True)
    dead = 3 * 2 * 256 * 2 * 64 * 4  # sharers, K and V, d_model, H, D, float32
    assert dead - 3 * 2 * 4 <= before - lab.held() <= dead  # torch keeps one number of each
    np.testing.assert_array_equal(lab.run(cache), expected)
    with pytest.raises(ConfigError, match=r"layers \[3, 5, 7\] were freed"):
        lab.make("gear")


def test_twins_share_without_loss(lab: Lab) -> None:
    """Layer 5 adds nothing, so that its twin, layer 6, sees the same inputs."""
    one, twin = lab.block(5), lab.block(6)
    lab.change(one.self_attn.o_proj, 0.0)
    lab.change(one.mlp.down_proj, 0.0)
    for a, b in (
        (one.self_attn.k_proj, twin.self_attn.k_proj),
        (one.self_attn.v_proj, twin.self_attn.v_proj),
        (one.input_layernorm, twin.input_layernorm),
    ):
        copied = np.array(a.weight) if lab.library == "mlx" else a.weight.detach().numpy()
        lab.change(b, lambda _, copied=copied: copied)
    np.testing.assert_array_equal(lab.run(lab.make(map="6:5")), lab.run(lab.plain()))


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_command_refuses_maps_of_other_models(backend: str, tmp_path: Path) -> None:
    need("mlx" if backend == "mlx" else "torch")
    other = "llama-32l-32h-8kv-128d-128256v"
    path = map_file(tmp_path, [0] * 32, other)
    method = ["--method", "kvsharer", "--set", f"kvsharer.map={path}"]
    got = CliRunner().invoke(main, ["generate", "Hello", "--backend", backend, *method])
    assert got.exit_code == 2
    assert other in got.stderr
    assert BUNDLED in got.stderr
    assert got.stderr.count("\n") == 1
