"""The command line: what it prints where, and how it ends."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kvc
from kvc import api, demo
from kvc.backends.base import Piece
from kvc.cli import main
from kvc.errors import BackendError, ConfigError
from tests.conftest import need

PROMPT = "The code of Anna is 4821. The code of Anna is"


@pytest.fixture(params=["cpu", "mlx"])
def backend(request: pytest.FixtureRequest) -> str:
    for module in {"cpu": ("torch", "transformers"), "mlx": ("mlx", "mlx_lm")}[request.param]:
        need(module)
    return str(request.param)


def kvc_run(*args: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, args, **kwargs)


def generate(backend: str, *args: str) -> Result:
    return kvc_run("generate", "--backend", backend, "--max-tokens", "8", *args)


def no_engine(*_: Any) -> None:
    raise AssertionError("the model was loaded before the options were checked")


def test_text_on_stdout_statistics_on_stderr(backend: str) -> None:
    result = generate(backend, PROMPT)
    assert result.exit_code == 0, result.output
    assert "4821" in result.stdout
    assert "tokens/s" in result.stderr
    assert "ratio" in result.stderr
    assert "tokens/s" not in result.stdout


def test_json_is_all_there_is(backend: str) -> None:
    result = generate(backend, PROMPT * 8, "--json", "--set", "bits=4", "--prefill", "stream")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["tokens"] == 8
    assert row["backend"] == backend
    held, rest = divmod(row["dense_bytes"], 2 * 8 * 2 * 64 * 4)  # k, v; layers, heads, dim, float32
    assert rest == 0
    assert held - row["prompt_tokens"] - row["tokens"] in (-1, 0)  # MLX computes one step ahead
    assert row["ratio"] == pytest.approx(row["dense_bytes"] / row["cache_bytes"])
    assert row["cache_bytes"] > 0
    assert row["peak_bytes"] > 0


def test_quiet_leaves_the_text_alone(backend: str) -> None:
    result = generate(backend, PROMPT, "--quiet", "--raw")
    assert result.exit_code == 0, result.output
    assert "tokens/s" not in result.stderr


def test_seed_fixes_the_samples(backend: str) -> None:
    args = ("Once upon a time", "--temp", "1", "--top-p", "0.9", "--quiet", "--seed")
    first, again = generate(backend, *args, "3"), generate(backend, *args, "3")
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout


def test_prompt_beyond_the_context_names_both_numbers(backend: str, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("7" * 5000)
    result = generate(backend, "--prompt-file", str(tmp_path / "long.txt"))
    assert result.exit_code == 2
    assert "500" in result.stderr
    assert "4096" in result.stderr


def test_chat_without_a_template(backend: str) -> None:
    result = generate(backend, PROMPT, "--chat")
    assert result.exit_code == 2
    assert "chat template" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["--prompt-file -", "empty prompt"]),
        (("",), ["empty"]),
        ((" \n",), ["empty"]),
        (("\udcff",), ["UTF-8"]),
        (("a", "--prompt-file", "latin.txt"), ["both"]),
        (("--prompt-file", "latin.txt"), ["UTF-8", "0xe9", "at 3"]),
        (("--prompt-file", "missing.txt"), ["missing.txt"]),
        (("--prompt-file", "."), ["directory"]),
        (("a", "--set", "bits"), ["key=value"]),
        (("a", "--set", "bits=2", "--set", "bits=4"), ["twice"]),
        (("a", "--set", "bits=3"), ["bits", "3"]),
        (("a", "--set", "bots=3"), ["bots"]),
        (("a", "--method", "geer"), ["geer", "gear"]),
    ],
)
def test_errors_are_one_line_and_come_first(
    args: tuple[str, ...], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load_engine", no_engine)
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    result = kvc_run("generate", *args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words)


def test_prompt_from_stdin(backend: str) -> None:
    args = ("generate", "--backend", backend, "--prompt-file", "-", "--max-tokens", "8", "--json")
    result = kvc_run(*args, input=PROMPT)
    assert result.exit_code == 0, result.output
    assert "4821" in json.loads(result.stdout)["text"]


def test_unknown_model_folder(backend: str, tmp_path: Path) -> None:
    result = generate(backend, "a", "--model", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_there_is(
    backend: str, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = api.load_engine

    def interrupted(*args: Any) -> Any:
        engine: Any = load(*args)
        stream = engine.stream

        def two(*args: Any, **kwargs: Any) -> Iterator[Piece]:
            pieces = stream(*args, **kwargs)
            yield next(pieces)
            yield next(pieces)
            pieces.close()
            raise KeyboardInterrupt

        engine.stream = two
        return engine

    monkeypatch.setattr(api, "load_engine", interrupted)
    result = generate(backend, PROMPT, *["--json"] * as_json)
    assert result.exit_code == 130, result.output
    if as_json:
        row = json.loads(result.stdout)
        assert row["interrupted"]
        assert row["tokens"] == 2
    else:
        assert result.stdout.strip()
        assert "2 tokens" in result.stderr


def test_ctrl_c_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "load_engine", load)
    assert kvc_run("generate", "a").exit_code == 130


def test_info() -> None:
    result = kvc_run("info")
    assert result.exit_code == 0, result.output
    row = json.loads(kvc_run("info", "--json").stdout)
    assert set(row["backends"]) == {"mlx", "cuda", "cpu"}
    assert all(name in result.stdout for name in [*row["backends"], *row["ops"]])


def test_missing_backend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlx_lm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=r"kvc\[torch\]"):
        api.check_backend("cpu")
    with pytest.raises(BackendError, match=r"kvc\[mlx\]"):
        api.check_backend("mlx")
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


def test_make_cache_and_report(backend: str) -> None:
    engine: Any = api.load_engine(backend, str(demo.path()))
    assert api.report(api.make_cache(engine.model, "gear", bits=4)).nbytes == 0
    with pytest.raises(ConfigError, match="parse"):
        api.make_cache(engine.model, kvc.parse("gear"), bits=4)


def test_strangers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"builtins\.object"):
        kvc.make_cache(object())
    with pytest.raises(ConfigError, match="make_cache"):
        kvc.report([])


def test_import_is_light() -> None:
    code = (
        "import sys, kvc, kvc.cli; "
        "sys.exit(' '.join({'torch', 'mlx', 'mlx_lm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
