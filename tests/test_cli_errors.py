"""Bad input of `kvc`: exit code 2 and one line which says what was expected."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvc import api, demo
from kvc.errors import BackendError
from tests.run_cli import PROMPT, both, copied_model, error_line, generate, kvc_run, need_backend


def no_engine(*_: Any) -> None:
    raise AssertionError("the model was loaded before the options were checked")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["--prompt-file -", "empty prompt"]),
        (("",), ["empty"]),
        ((" \n",), ["empty"]),
        (("\udcff",), ["UTF-8"]),
        (("a", "--prompt-file", "latin.txt"), ["both"]),
        (("--prompt-file", "empty.txt"), ["empty.txt", "empty prompt"]),
        (("--prompt-file", "latin.txt"), ["UTF-8", "0xe9", "at 3"]),
        (("--prompt-file", "missing.txt"), ["missing.txt"]),
        (("--prompt-file", "."), ["directory"]),
        (("a", "--set", "bits"), ["key=value"]),
        (("a", "--set", "bits=2", "--set", "bits=4"), ["twice"]),
        (("a", "--set", "bits=3"), ["bits", "3"]),
        (("a", "--set", "gear.bits=two"), ["bits", "two"]),
        (("a", "--set", "rank=-1"), ["rank", "-1"]),
        (("a", "--set", "outliers=2"), ["outliers", "2"]),
        (("a", "--set", "bots=3"), ["bots", "bits"]),
        (("a", "--method", "geer"), ["geer", "gear"]),
        (("a", "--method", "gear+kivi"), ["gear", "kivi"]),
        (("a", "--method", "kvsharer", "--set", "map=here.json"), ["here.json"]),
        (("a", "--method", "kvsharer", "--set", "map=maps/here.json"), ["no such file"]),
        (("a", "--method", "kvsharer", "--set", "map=org/name"), ["org/name", "hub"]),
        (("a", "--method", "kvsharer", "--set", "share=0"), ["share", "0.0"]),
    ],
)
def test_errors_are_one_line_and_come_first(
    args: tuple[str, ...], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load_engine", no_engine)
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    Path("empty.txt").touch()
    line = error_line(kvc_run("generate", *args))
    assert all(word in line for word in words), line


@both
def test_prompt_beyond_the_context_names_both_numbers(backend: str, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("7" * 5000)
    line = error_line(generate(backend, "--prompt-file", str(tmp_path / "long.txt")))
    assert "500" in line
    assert "4096" in line


@both
def test_chat_without_a_template(backend: str) -> None:
    assert "chat template" in error_line(generate(backend, PROMPT, "--chat"))


@both
def test_model_that_is_not_there(backend: str, tmp_path: Path) -> None:
    for model in (tmp_path / "none", tmp_path):
        line = error_line(generate(backend, "a", "--model", str(model)))
        assert str(model) in line


@both
def test_model_of_another_kind(backend: str, tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = error_line(generate(backend, "a", "--model", str(tmp_path)))
    assert str(tmp_path) in line


@both
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("kvsharer", ["llama-8l-4h-2kv-64d-2048v", "kvc search kvsharer --model", "kvsharer.map="]),
        ("less", ["llama-8l-4h-2kv-64d-2048v", "h2o", "kvc train less --model", "less.kernels="]),
    ],
)
def test_learned_parts_that_are_not_there(
    backend: str, method: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(demo.path())
    monkeypatch.setattr(demo, "path", lambda: tmp_path)
    line = error_line(generate(backend, PROMPT, "--method", method, "--model", model))
    assert all(word in line for word in words), line


@both
def test_map_of_another_model(backend: str) -> None:
    args = (PROMPT, "--method", "kvsharer", "--set", "map=31:3")
    line = error_line(generate(backend, *args))
    assert "31" in line
    assert "8" in line


@both
def test_groups_that_do_not_divide_the_head_dim(backend: str) -> None:
    sizes = ("--set", "gear.group_size=48", "--set", "gear.buffer=48")
    line = error_line(generate(backend, PROMPT, *sizes))
    assert "group_size" in line
    assert "64" in line
    assert "48" in line


@both
def test_nan_in_keys_names_the_layer(backend: str, tmp_path: Path) -> None:
    need_backend(backend)
    prompt = "The code of Anna is 4821. " * 8  # more tokens than a group has
    tokenizer: Any = api.load_engine(backend, str(demo.path()))
    rare = max(tokenizer.encode(prompt))
    model = copied_model(tmp_path, tie_word_embeddings=False)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"][rare] = np.nan
    (model / "model.safetensors").unlink()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for prefill in ("exact", "stream"):
        options = ("--method", "kivi", "--model", str(model), "--prefill", prefill, "--json")
        result = generate(backend, prompt, *options)
        line = error_line(result)
        assert "layer 0" in line
        assert "finite" in line or "NaN" in line


@pytest.mark.parametrize(
    ("backend", "module", "extra"),
    [
        ("cpu", "transformers", "kvc[torch]"),
        ("cuda", "torch", "kvc[torch]"),
        ("mlx", "mlx_lm", "kvc[mlx]"),
    ],
)
def test_missing_backend_names_the_extra(
    backend: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    line = error_line(kvc_run("generate", "a", "--backend", backend))
    assert module in line
    assert f"pip install '{extra}'" in line


def test_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    need_backend("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = error_line(kvc_run("generate", "a", "--backend", "cuda"))
    assert "GPU" in line
    assert "install" in line


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="auto"):
        api.check_backend("gpu")


@pytest.mark.parametrize(
    ("installed", "expected"), [({"mlx", "mlx_lm"}, "mlx"), (set(), "kvc.mlx.*kvc.torch")]
)
def test_auto_takes_what_there_is(
    installed: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "find_spec", lambda name: name in installed or None)
    if installed:
        assert api.best_backend() == expected
    else:
        with pytest.raises(BackendError, match=expected):
            api.best_backend()
        error_line(kvc_run("generate", "a"))
