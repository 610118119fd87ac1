"""The command line: the bundled model speaks, and every mistake is one line and exit code 2."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvc.cli import main
from tests.conftest import need


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, args, input=stdin)


@pytest.mark.parametrize(("backend", "library"), [("cpu", "torch"), ("mlx", "mlx")])
def test_generates(backend: str, library: str) -> None:
    need(library)
    result = run("generate", "--backend", backend, "--max-tokens", "8", "--json", "Once upon")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["tokens"] == len(figures["token_ids"]) == 8
    assert figures["text"]
    assert figures["cache_bytes"] > 0
    text = run("generate", "--backend", backend, "--max-tokens", "8", stdin="Once upon")
    assert text.stdout.strip() == figures["text"].strip()
    assert "tokens at" in text.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "geer", "Hi"], "unknown method 'geer'; nearest: gear"),
        (["--set", "bits", "Hi"], "expected key=value, got 'bits'"),
        (["--set", "bits=3", "Hi"], "bits must be 2, 4 or 8, got 3"),
        (["--method", "gear+kivi", "Hi"], "both fill the seam codec"),
        (["--backend", "tpu", "Hi"], "expected one of auto, mlx, cuda, cpu, got 'tpu'"),
        (["--model", "/nowhere", "Hi"], "/nowhere"),
        (["--prefill", "lazy", "Hi"], "expected exact or stream, got 'lazy'"),
        (["--max-tokens", "5000", "Hi"], "the model's context is 4096 tokens"),
        (["   "], "expected a prompt, got an empty one"),
        (["--prompt-file", "/nowhere.txt"], "cannot be read"),
        (["--set", "gear.group_size=48", "--set", "gear.buffer=48", "Hi"], "must divide"),
    ],
)
def test_mistakes(args: list[str], message: str) -> None:
    need("torch")
    backend = [] if "--backend" in args else ["--backend", "cpu"]
    result = run("generate", *backend, *args)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_prompt_file_must_be_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\xe9".encode("latin-1"))
    result = run("generate", "--prompt-file", str(file))
    assert result.exit_code == 2
    assert "expected UTF-8" in result.stderr


def test_info_lists_every_op() -> None:
    result = run("info")
    assert result.exit_code == 0
    for name in ("attend_dense", "attend_coded", "quantize", "encode", "torch", "mlx"):
        assert name in result.stdout
