"""`kvc cache` and `kvc generate --cache`: read once, asked often, on either backend."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import kvc.demo
from kvc.backends.torch.engine import Engine
from tests.cache_faults import joined, seal
from tests.run_cli import (
    both,
    copied_model,
    error_line,
    generate,
    generate_json,
    kvc_run,
    need_backend,
)

TEXT = "The code of Anna is 4821. The keeper of the light counted three lamps along the mole. " * 8
ASK = " The code of Anna is"


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text's cache, made by PyTorch."""
    need_backend("cpu")
    folder = tmp_path_factory.mktemp("book")
    (folder / "book.txt").write_text(TEXT)
    result = build(folder / "book.txt", folder / "book.kvc", "--method", "gear", "--set", "bits=4")
    assert result.exit_code == 0, result.output
    assert "book.kvc: 250 tokens, gear, " in result.stderr
    return folder / "book.kvc"


def build(text: Path | str, out: Path, *args: str, backend: str = "cpu", **kwargs: Any) -> Any:
    return kvc_run(
        "cache", "build", "--backend", backend, str(text), "-o", str(out), *args, **kwargs
    )


@both
def test_questions_leave_the_file_as_it_is(backend: str, book: Path) -> None:
    data = book.read_bytes()
    rows = [generate_json(backend, "--cache", str(book), ask) for ask in (ASK, " He read", ASK)]
    assert rows[0]["text"] == rows[2]["text"] != rows[1]["text"]
    assert " 4821" in rows[0]["text"]
    assert rows[0]["cache_tokens"] == 250
    assert rows[0]["prompt_tokens"] < 12
    assert rows[0]["method"] == "gear"
    assert book.read_bytes() == data
    alone = generate(backend, "--cache", str(book), ASK)
    assert alone.stdout == rows[0]["text"] + "\n"
    assert f"file     250 tokens in {book}" in alone.stderr


@both
@pytest.mark.parametrize("method", ["less", "kvsharer+kivi"])
def test_a_file_is_the_text_in_front(backend: str, method: str, tmp_path: Path) -> None:
    """As long as nothing is lost, a question behind the file is one behind the text."""
    need_backend(backend)
    budget = ("--set", "less.heavy=400", "--set", "less.recent=400")
    settings = budget if method == "less" else ("--set", "gear.bits=8")
    args = ("--method", method, *settings)
    result = build("-", tmp_path / "x.kvc", *args, backend=backend, input=TEXT)
    assert result.exit_code == 0, result.output
    row = generate_json(backend, "--cache", str(tmp_path / "x.kvc"), ASK)
    whole = generate_json(backend, "--raw", *args, TEXT + ASK)
    assert row["text"] == whole["text"]


def test_info_and_verify(book: Path) -> None:
    found = json.loads(kvc_run("cache", "info", str(book), "--json").stdout)
    assert found["tokens"] == 250
    assert found["settings"] == {"gear.bits": 4}
    assert found["bytes"] == book.stat().st_size
    assert not found["deflated"]
    shown = kvc_run("cache", "info", str(book))
    assert "method      gear (gear.bits=4)\n" in shown.stdout
    assert shown.stdout == kvc_run("info", str(book)).stdout
    assert json.loads(kvc_run("info", str(book), "--json").stdout) == found
    for args in ((), ("--backend", "cpu", "--model", str(kvc.demo.path()))):
        result = kvc_run("cache", "verify", str(book), *args)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"{book}: whole, 250 tokens, checksum {found['checksum']}")


def test_deflated_files_are_smaller_and_the_same(book: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.kvc"
    build(book.with_suffix(".txt"), path, "--deflate", "--set", "bits=4", "--quiet")
    assert path.stat().st_size < book.stat().st_size
    assert ", codes deflated" in kvc_run("cache", "info", str(path)).stdout
    answers = [generate("cpu", "--cache", str(x), ASK).stdout for x in (book, path)]
    assert answers[0] == answers[1]


def test_what_cannot_be_is_one_line(book: Path, tmp_path: Path) -> None:
    text, out = book.with_suffix(".txt"), tmp_path / "x.kvc"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "long.txt").write_text("one two three four " * 2000)
    other = copied_model(tmp_path, num_attention_heads=2, head_dim=128)
    for args, expected in (
        ((text, book), "there is one already; take another name, or --force"),
        ((text, tmp_path / "x.bin"), "expected a name that ends in .kvc"),
        ((text, tmp_path / "no" / "x.kvc"), "cannot write there"),
        ((tmp_path / "no.txt", out), "cannot read it"),
        ((tmp_path / "empty.txt", out), "expected some text, got none"),
        ((tmp_path / "long.txt", out), "expected fewer tokens than the model's context of 4096"),
        ((text, out, "--method", "no"), "unknown method"),
    ):
        assert expected in error_line(build(*args))
    asked: tuple[tuple[tuple[str, ...], str], ...] = (
        (("--method", "h2o"), "has its method; leave out --method"),
        (("--prefill", "stream"), "has its prefill; leave out --prefill"),
        (("--set", "bits=2"), "has its settings; leave out --set bits"),
        (("--dtype", "bfloat16"), "in bfloat16, as this model has them, got float32"),
    )
    for args, expected in asked:
        assert expected in error_line(generate("cpu", "--cache", str(book), ASK, *args))
    assert "no such file" in error_line(generate("cpu", "--cache", str(out), ASK))
    assert "expected a cache as safetensors" in error_line(kvc_run("cache", "verify", str(text)))
    assert not list(tmp_path.glob("*.kvc"))
    assert other.exists()


def test_a_damaged_file_is_told_before_a_model_is_loaded(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "x.kvc", bytearray(book.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("kvc.api.load_engine", None)
    for args in (("cache", "info"), ("cache", "verify"), ("info",), ("generate", "a", "--cache")):
        assert "the file is damaged: its checksum is" in error_line(kvc_run(*args, str(path)))


def test_a_forged_method_cannot_do_harm(book: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "x.kvc", book.read_bytes()
    n = int.from_bytes(data[:8], "little")
    forged: tuple[dict[str, Any], ...] = (
        {"method": "@/etc/passwd"},
        {"settings": {"gear.layer_bits": "0-99999999999:2"}},
        {"settings": {"kvsharer.map": "/dev/zero"}, "method": "kvsharer"},
        {"settings": {"less.kernels": "/dev/zero"}, "method": "less"},
        {"settings": {"gear.bits": [2]}},
        {"name": "gear\x1b[2J"},
    )
    for change in forged:
        table, body = json.loads(data[8 : 8 + n]), data[8 + n :]
        meta = table["__metadata__"]
        meta["method"] = json.dumps({**json.loads(meta["method"]), **change})
        meta["checksum"] = seal(table, body)
        path.write_bytes(joined(table, body))
        line = error_line(generate("cpu", "--cache", str(path), ASK))
        assert line.startswith(f"kvc: {path}: "), line


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_backend("cpu")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (tmp_path / "book.txt").write_text(TEXT)
    hidden, pieces = Engine.hidden, []

    def interrupted(*args: Any) -> Any:
        pieces.append(args)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return hidden(*args)

    monkeypatch.setattr(Engine, "hidden", interrupted)
    result = build(tmp_path / "book.txt", tmp_path / "x.kvc", "--prefill-step", "16")
    assert result.exit_code == 130
    assert result.stderr == "kvc: interrupted\n"
    assert len(pieces) == 3
    assert [x.name for x in tmp_path.iterdir()] == ["book.txt"]
