"""The bundled model, and the script that trained it."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import kvc.demo
from kvc.demo import recipe, train
from kvc.demo.data import BOS, Kind, Sampler, encode
from kvc.demo.evaluate import recall

WORDS = ("the", "a", "house", "river", "said", "went", "old", "never", "she", "he", "of", "and")
STEPS = 3


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two books to train on and one to hold out, of a few thousand tokens each."""
    folder = tmp_path_factory.mktemp("books")
    rng = np.random.default_rng(0)
    for name in ("one.txt", "two.txt", "held.txt"):
        lines = (" ".join(rng.choice(WORDS, 12)) + ".\n\n" for _ in range(300))
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def run(books: Path, out: Path, *more: str) -> Result:
    """Runs the script with a model that trains in a second."""
    args = f"--steps {STEPS} --save-every 1 --batch-tokens 64 --device cpu --threads 1"
    args += " --layers 1 --hidden 32 --mlp 32 --vocab 280 --contexts 2 --held-out held.txt"
    where = ["--books", str(books), "--out", str(out)]
    return CliRunner().invoke(train.main, [*args.split(), *where, *more])


@pytest.fixture(scope="module")
def unbroken(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run which nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken")
    result = run(books, out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def bundled() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The bundled model in float32, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(kvc.demo.path(), dtype=torch.float32)
    return model, PreTrainedTokenizerFast.from_pretrained(kvc.demo.path())


def break_at(monkeypatch: pytest.MonkeyPatch, step: int, kill: bool) -> None:
    """Makes the script die in a step of its run, or receive a Ctrl-C there."""
    seen = []

    def broken(*args: object) -> dict[str, float]:
        seen.append(args)
        if len(seen) == step:
            if kill:
                raise RuntimeError("killed")
            signal.raise_signal(signal.SIGINT)
        return recipe.train_step(*args)

    monkeypatch.setattr(train, "train_step", broken)


def assert_same_weights(a: Path, b: Path) -> None:
    """Raises unless the models in two folders are equal to the bit."""
    left, right = (load_file(p / "model.safetensors") for p in (a, b))
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert torch.equal(weight, right[name]), name


def test_training_writes_a_model_that_loads(unbroken: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(unbroken)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(unbroken)
    assert model.dtype == torch.float16
    assert model.config.vocab_size == len(tokenizer) == 280
    assert tokenizer("Anna 12").input_ids[0] == tokenizer.convert_tokens_to_ids(BOS)
    metrics = json.loads((unbroken / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == STEPS
    assert set(metrics["loss"]) == {"held.txt"}
    assert np.isfinite(list(metrics["loss"]["held.txt"].values())).all()
    assert not list(unbroken.glob("*.part"))


def test_training_changes_every_weight(unbroken: Path, books: Path, tmp_path: Path) -> None:
    assert run(books, tmp_path, "--steps", "1").exit_code == 0
    one, three = (load_file(p / "model.safetensors") for p in (tmp_path, unbroken))
    assert all(not torch.equal(w, three[name]) for name, w in one.items() if w.ndim == 2)


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "ctrl-c"])
def test_a_broken_run_goes_on_exactly(
    kill: bool, unbroken: Path, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_at(patch, 2, kill)
        result = run(books, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    if kill:
        assert isinstance(result.exception, RuntimeError)
    else:
        assert "stopped at step 2" in result.output
    assert run(books, tmp_path).exit_code == 0
    assert_same_weights(unbroken, tmp_path)


def test_a_checkpoint_of_another_run_is_refused(unbroken: Path, books: Path) -> None:
    result = run(books, unbroken, "--seed", "1")
    assert result.exit_code != 0
    assert "another seed; take another --out" in result.output


def test_training_goes_on_from_a_model(unbroken: Path, books: Path, tmp_path: Path) -> None:
    result = run(books, tmp_path, "--init", str(unbroken), "--steps", "1", "--lr", "0")
    assert result.exit_code == 0, result.output
    assert_same_weights(unbroken, tmp_path)


def test_a_missing_held_out_text_is_one_line(books: Path, tmp_path: Path) -> None:
    result = run(books, tmp_path, "--held-out", "nowhere.txt")
    assert result.exit_code != 0
    assert result.output.strip().count("\n") == 0
    assert "nowhere.txt" in result.output


def test_asked_digits_are_those_told_before(
    bundled: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], books: Path
) -> None:
    _, tokenizer = bundled
    text = (books / "one.txt").read_text(encoding="utf-8")
    sampler = Sampler(tokenizer, [text], np.random.default_rng(3))
    tokens, kinds = sampler.planted(256, 6)
    assert tokens.shape == kinds.shape == (257,)
    firsts = np.flatnonzero(kinds[:-4] == Kind.FIRST)
    assert len(firsts) > 0
    said = tokenizer.decode(tokens)
    for i in firsts:
        number = tokenizer.decode(tokens[i : i + 4])
        assert number.isdigit()
        assert said.count(number) > 1
    assert (kinds[tokens == tokenizer.bos_token_id] == Kind.HIDDEN).all()


def test_bundled_files() -> None:
    folder = kvc.demo.path()
    names = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
    files = [folder / n for n in [*names, "generation_config.json", "README.md"]]
    assert sum(f.stat().st_size for f in files) <= 16 * 10**6
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_bundled_tokenizer_keeps_text_and_splits_digits(
    bundled: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    _, tokenizer = bundled
    text = "Émile paid 4821 francs;\n\nthe naïve 漢字 clerk smiled."
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert sum(t.isdigit() for t in tokenizer.convert_ids_to_tokens(ids)) == 4


def test_bundled_model_is_the_same_in_mlx(
    bundled: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    model, tokenizer = bundled
    text = "It was a dark night. The code of Anna is 4821. " * 20
    ids = tokenizer(text).input_ids
    with torch.no_grad():
        want = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    other, other_tokenizer = mlx_lm.load(str(kvc.demo.path()))
    other.set_dtype(mx.float32)
    got = np.array(other(mx.array([ids]))[0])
    assert other_tokenizer.encode(text) == ids
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-3)


def test_bundled_model_recalls_planted_facts(
    bundled: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], books: Path
) -> None:
    model, tokenizer = bundled
    text = encode(tokenizer, (books / "held.txt").read_text(encoding="utf-8"))
    buckets = recall(model, tokenizer, [text], n_contexts=6)
    assert sum(b.facts for b in buckets) == 48
    assert all(b.digits > 0.3 for b in buckets)  # guessing: 0.1
