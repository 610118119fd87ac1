"""`kvc generate`: what it prints where, and what it measures."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import kvc
from kvc import api, demo
from kvc.backends.sequences import Piece
from kvc.cli.run import Stats, in_units, run
from kvc.errors import ConfigError
from tests.run_cli import PROMPT, both, copied_model, generate, generate_json, need_backend

PEAK = {"cpu": "of the process", "mlx": "held by MLX"}


@both
def test_text_on_stdout_statistics_on_stderr(backend: str) -> None:
    result = generate(backend, PROMPT)
    assert result.exit_code == 0, result.output
    assert "4821" in result.stdout
    for words in ("prefill", "decode", "tokens/s", "dense, ratio", PEAK[backend]):
        assert words in result.stderr
        assert words not in result.stdout


@both
def test_json_is_all_there_is(backend: str) -> None:
    result = generate(backend, PROMPT * 8, "--json", "--set", "bits=4", "--prefill", "stream")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    row = json.loads(result.stdout)
    assert row["tokens"] == len(row["token_ids"]) == 8
    assert row["backend"] == backend
    assert row["prefill_tokens"] == row["prompt_tokens"]
    held, rest = divmod(row["dense_bytes"], 2 * 8 * 2 * 64 * 4)  # k, v; layers, heads, dim, float32
    assert rest == 0
    assert held - row["prompt_tokens"] - row["tokens"] in (-1, 0)  # MLX computes one step ahead
    assert row["ratio"] == pytest.approx(row["dense_bytes"] / row["cache_bytes"])
    assert sum(row["parts"].values()) == sum(row["layers"]) == row["cache_bytes"] > 0
    assert len(row["layers"]) == 8
    assert row["peak_bytes"] > 0
    assert row["peak_of"] == PEAK[backend]
    engine = api.load_engine(backend, str(demo.path()))
    text = engine.tokenizer.decode(row["token_ids"])  # type: ignore[attr-defined]
    assert text.lstrip() == row["text"].lstrip()  # mlx-lm drops a space at the beginning


@both
def test_quiet_leaves_the_text_alone(backend: str) -> None:
    result = generate(backend, PROMPT, "--quiet", "--raw")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""


@both
def test_seed_fixes_the_samples(backend: str) -> None:
    args = ("Once upon a time", "--temp", "1", "--top-p", "0.9", "--seed")
    first, again, other = (generate_json(backend, *args, seed) for seed in ("3", "3", "4"))
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]


@both
def test_prompt_from_argument_file_and_stdin(backend: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    rows = [
        generate_json(backend, PROMPT),
        generate_json(backend, "--prompt-file", str(tmp_path / "prompt.txt")),
        generate_json(backend, "--prompt-file", "-", input=PROMPT),
        generate_json(backend, input=PROMPT),
    ]
    assert "4821" in rows[0]["text"]
    assert all(row["token_ids"] == rows[0]["token_ids"] for row in rows)


@both
def test_what_exceeds_the_context_is_shortened_with_a_notice(backend: str, tmp_path: Path) -> None:
    model = str(copied_model(tmp_path, max_position_embeddings=32))
    result = generate(backend, PROMPT, "--model", model, "--max-tokens", "50", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("\n") == 1
    row = json.loads(result.stdout)
    assert row["tokens"] == 32 - row["prompt_tokens"]
    assert f"room for {row['tokens']} tokens" in result.stderr
    assert "32" in result.stderr


@both
def test_chat_template_where_there_is_one(backend: str, tmp_path: Path) -> None:
    model = copied_model(tmp_path)
    template = "{% for m in messages %}Question: {{ m['content'] }} Answer:{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    args = ("Who is Anna?", "--model", str(model))
    with_it, raw, asked = (generate_json(backend, *args, *o) for o in ((), ["--raw"], ["--chat"]))
    assert with_it["prompt_tokens"] == asked["prompt_tokens"] > raw["prompt_tokens"]


@both
def test_prefill_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load, done = api.load_engine, [0]

    def watched(*args: Any) -> Any:
        engine: Any = load(*args)
        stream = engine.stream

        def recording(*args: Any, on_prefill: Any, **kwargs: Any) -> Iterator[Piece]:
            def record(n: int, total: int) -> None:
                done.append(n)
                on_prefill(n, total)

            return stream(*args, on_prefill=record, **kwargs)  # type: ignore[no-any-return]

        engine.stream = recording
        return engine

    monkeypatch.setattr(api, "load_engine", watched)
    row = generate_json(backend, PROMPT * 5, "--prefill-step", "32", "--prefill", "stream")
    steps = [b - a for a, b in pairwise(done)]
    assert max(steps) <= 32
    assert sum(steps) == row["prompt_tokens"]


class Clocked:
    """An engine for which everything takes a known time."""

    name = "cpu"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def stream(self, ids: list[int], cache: Any, *, on_prefill: Any) -> Iterator[Piece]:
        self.now += 1.5
        on_prefill(len(ids) - 1, len(ids))
        self.now += 0.5
        for token in range(5):
            yield Piece(f"{token} ", token)
            self.now += 0.25


def test_speeds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, shown = Stats("cpu", "gear", 60), []
    run(Clocked(monkeypatch), list(range(60)), None, stats, shown.append, quiet=True)  # type: ignore[arg-type]
    assert "".join(shown) == "0 1 2 3 4 "
    assert stats.token_ids == [0, 1, 2, 3, 4]
    assert stats.prefill_tokens_per_s == pytest.approx(60 / 2)
    assert stats.decode_tokens_per_s == pytest.approx(4 / 1)
    assert "prefill  60 tokens, 30.0 tokens/s\ndecode   5 tokens, 4.0 tokens/s" in stats.lines()


@both
def test_loading_counts_for_no_speed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_backend(backend)
    load, clock = api.load_engine, time.perf_counter
    late = [0.0]

    def slow(*args: Any) -> Any:
        late[0] += 1000
        return load(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(api, "load_engine", slow)
    row = generate_json(backend, PROMPT)
    assert row["prefill_tokens_per_s"] > 1


def test_bytes_as_people_read_them() -> None:
    got = [in_units(n) for n in (0, 1023, 1024, 1536 * 2**10, 3 * 2**30, 2048 * 2**30)]
    assert got == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "3.00 GiB", "2048.00 GiB"]


@both
def test_make_cache_and_report(backend: str) -> None:
    need_backend(backend)
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
