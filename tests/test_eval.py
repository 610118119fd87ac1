"""`kvc eval`: its methods and tasks, its rows, how it goes on when killed, and its errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import kvc
from kvc import demo
from kvc.errors import ConfigError
from kvc.measure import choice
from kvc.measure import evaluate as evaluation
from kvc.measure.choice import read_choice, read_choices
from kvc.measure.evaluate import read_tasks
from kvc.measure.inputs import sizes_for
from kvc.measure.results import identity, results_file
from kvc.measure.table import table
from kvc.measure.tasks import TASKS, USUAL
from kvc.methods import PRESETS
from tests.run_cli import copied_model, error_line, kvc_run, need_backend
from tests.search_text import text_file

SMALL = ("--backend", "cpu", "--context", "64", "--rows", "1")
KEYS = [
    "version", "kvc", "model", "fingerprint", "backend", "dtype", "device", "context", "rows",
    "text", "seed", "method", "settings", "label", "task", "date", "seconds", "result",
]  # fmt: skip
COMMAND = [sys.executable, "-c", "from kvc.cli import main; main()"]
PATIENCE = 60  # seconds


def run_eval(*args: str) -> Result:
    need_backend("cpu")
    return kvc_run("eval", *SMALL, *args)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_rows_say_what_was_asked_for_and_what_was_found(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    args = ("--method", "kivi buffer=16 group_size=16", "--tasks", "ppl,bytes", "--out", str(out))
    got = run_eval(*args, "--json")
    assert got.exit_code == 0, got.output
    rows = rows_of(got.stdout)
    assert rows == rows_of(out.read_text())
    assert [(row["label"], row["task"]) for row in rows] == [
        (label, task)
        for label in ("none", "kivi buffer=16 group_size=16")
        for task in ("bytes", "ppl")
    ]
    for row in rows:
        assert list(row) == KEYS
    coded = rows[2]
    assert coded["method"] == "kivi"
    assert coded["settings"] == {"gear.buffer": "16", "gear.group_size": "16"}
    assert (coded["model"], coded["backend"], coded["dtype"]) == ("bundled", "cpu", "float32")
    assert coded["text"]["name"] == "text.txt"
    held = coded["result"]
    assert held["tokens"] == 64
    assert held["nbytes"] == sum(held["layers"]) == sum(held["parts"].values())
    assert held["dense_bytes"] == 64 * 2 * 8 * 2 * 64 * 4  # K and V, layers, heads, head_dim
    assert held["ratio"] == pytest.approx(held["dense_bytes"] / held["nbytes"])
    assert rows[0]["result"]["ratio"] <= 1 < held["ratio"]
    parsed = kvc.parse(coded["method"], coded["settings"])
    assert parsed.codec is not None
    assert parsed.codec.buffer == 16


def test_the_table_has_a_line_for_each_method_and_a_column_for_each_figure() -> None:
    got = run_eval("--method", "h2o heavy=4 recent=8", "--tasks", "bytes,kl")
    assert got.exit_code == 0, got.output
    head, none, h2o = (line.split() for line in got.stdout.splitlines())
    assert head == ["method", "bytes/token", "ratio", "kl", "kl", "p99"]
    assert none[0] == "none"
    assert float(none[3]) == 0
    assert h2o[:3] == ["h2o", "heavy=4", "recent=8"]
    assert float(h2o[-2]) > 0.001


def test_what_a_method_has_no_row_for_is_a_dash() -> None:
    rows = [
        {"label": "none", "task": "ppl", "result": {"ppl": 2.0}},
        {"label": "x", "task": "memory", "result": {"peak_bytes": 3 << 20}},
    ]
    assert [line.split() for line in table(rows).splitlines()] == [
        ["method", "ppl", "peak", "MiB"], ["none", "2.000", "-"], ["x", "-", "3.0"],
    ]  # fmt: skip


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "rows.jsonl")
    first = run_eval("--method", "h2o", "--tasks", "bytes", "--out", out, "--json")
    made: list[str] = []
    plain = evaluation.evaluate

    def watched(*args: Any) -> Any:
        return plain(*args[:-1], lambda what, done, total: made.append(what))

    monkeypatch.setattr(evaluation, "evaluate", watched)
    again = run_eval("--method", "h2o", "--tasks", "bytes", "--out", out, "--json")
    assert again.stdout == first.stdout
    assert made == []
    more = run_eval("--method", "h2o", "--tasks", "bytes,maps", "--rows", "2", "--out", out)
    assert more.exit_code == 0, more.output
    assert {what for what in made if what} == {"none: bytes", "h2o: bytes"}  # h2o has no map
    assert len(rows_of(Path(out).read_text())) == 4


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    row = {"label": "none", "task": "ppl", "seconds": 1, "result": {"ppl": 2.0}}
    other = {"label": "gear", "task": "ppl", "seconds": 1, "result": {"ppl": 3.0}}
    out.write_text(json.dumps(row) + "\n" + json.dumps(other)[:20])
    with results_file(out) as results:
        assert list(results.rows.values()) == [row]
        assert results.get({"label": "none", "task": "ppl"}) == row
        results.add(other)
        with pytest.raises(ConfigError, match="another run adds to it"), results_file(out):
            pass
    assert rows_of(out.read_text()) == [row, other]
    assert identity({**row, "seconds": 9, "result": {}, "kvc": "9"}) == identity(row)
    assert identity({**row, "rows": 9}) != identity(row)


def test_killed_it_goes_on(tmp_path: Path) -> None:
    need_backend("cpu")
    out = tmp_path / "rows.jsonl"
    args = ["eval", "--backend", "cpu", "--context", "256", "--rows", "2", "--out", str(out)]
    args += ["--method", "gear", "--tasks", "bytes,ppl,layers", "--quiet"]
    process = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    limit = time.monotonic() + PATIENCE
    while not (out.exists() and out.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = out.read_text().rpartition("\n")[0]
    got = kvc_run(*args)
    assert got.exit_code == 0, got.output
    assert out.read_text().startswith(before)
    tasks = [(row["label"], row["task"]) for row in rows_of(out.read_text())]
    assert len(tasks) == len(set(tasks)) == 6


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, out = evaluation.evaluate, str(tmp_path / "rows.jsonl")

    def pressed(*args: Any) -> Any:
        def show(what: str, done: float, total: int) -> None:
            if done >= 1.5:
                os.kill(os.getpid(), signal.SIGINT)
            args[-1](what, done, total)

        return plain(*args[:-1], show)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "evaluate", pressed)
            got = run_eval("--method", "h2o", "--tasks", "bytes,ppl", "--out", out)
    finally:
        signal.signal(signal.SIGINT, before)
    assert got.exit_code == 130
    assert got.stderr == f"kvc: interrupted; the same command goes on from {out}\n"
    assert [row["task"] for row in rows_of(Path(out).read_text())] == ["bytes"]
    rest = run_eval("--method", "h2o", "--tasks", "bytes,ppl", "--out", out)
    assert rest.exit_code == 0, rest.output


def test_methods_as_words_parse_back() -> None:
    common = {"gear.bits": "4", "less.heavy": "8"}
    gear, mixed = read_choices(["gear bits=8 'seed=1'", "kvsharer+h2o kvsharer.map=3:1"], common)[
        1:
    ]
    assert (gear.label, dict(gear.settings)) == (
        "gear bits=8 seed=1", {"gear.bits": "8", "gear.seed": "1"},
    )  # fmt: skip
    assert mixed.label == "kvsharer+h2o kvsharer.map=3:1 less.heavy=8"
    for each in (gear, mixed):
        assert read_choice(each.label) == each
    assert read_choices(["none", "gear"], {})[0].label == "none"
    assert len(read_choices(["none", "gear"], {})) == 2
    assert read_choices(["gear"], {"bits": "4"})[1].label == "gear bits=4"
    for text in ("kvsharer 'map=5:1, 7:3'", "gear2 rotate="):  # a space; an empty value
        assert read_choice(read_choice(text).label) == read_choice(text)


@pytest.mark.parametrize(
    ("texts", "common", "says"),
    [(["gear bits"], {}, "expected settings such as bits=4 behind the name, got 'bits'"),
     (["gear bits=4 gear.bits=2"], {}, "gear.bits is given twice"),
     (["gear", "gear"], {}, "--method gear: it is given twice"),
     (["gear", "gear bits=4"], {"gear.bits": "4"}, "--method gear bits=4: it is given twice"),
     (["gear", "h2o"], {"bits": "4"}, "--set: expected section.key such as gear.bits"),
     (["h2o"], {"gear.bits": "4"}, "--set: expected section.key such as gear.bits"),
     ([""], {}, "expected a method such as gear, got nothing"),
     (["gear 'bits=4"], {}, "expected a method such as gear, got No closing quotation"),
     (["gaer"], {}, "unknown method 'gaer'; nearest: gear"),
     (["gear bits=3"], {}, "gear: bits must be 2, 4 or 8, got 3"),
     (["none bits=4"], {}, "no method takes the setting 'bits'")],
    ids=str,
)  # fmt: skip
def test_choices_that_cannot_be(texts: list[str], common: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_choices(texts, common)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_tasks_come_in_their_own_order() -> None:
    assert read_tasks(None) == USUAL
    assert read_tasks("kl, bytes") == ("bytes", "kl")
    assert read_tasks("all") == TASKS
    said = kvc_run("eval", "--help").stdout.replace("\n", " ")
    assert f"Of {', '.join(TASKS)};" in " ".join(said.split())
    assert f"[default: {','.join(USUAL)}]" in " ".join(said.split())


def test_sizes_are_as_the_model_has_room() -> None:
    small, large = (sizes_for(limit, None, 4, None, 0) for limit in (512, None))
    assert (small.context, small.length) == (512, 448)
    assert (large.context, large.length) == (2048, 4096)


@pytest.mark.parametrize(
    ("args", "says"),
    [(["--tasks", "pll"], "--tasks: expected some of bytes,"),
     (["--context", "4097"], "--context: expected 64 to 4096 tokens, got 4097: the model has room"),
     (["--context", "9"], "--context: expected 64 to 4096 tokens, got 9"),
     (["--length", "4033"], "--length: expected 2 to 4032 tokens behind an opening of 64"),
     (["--text", "none.txt"], "--text none.txt: cannot read it"),
     (["--text", "TEXT", "--context", "2048"], "--text: expected 1 pieces of 2048 tokens, got 0"),
     (["--tasks", "recall"], "recall: expected rows of at least"),
     (["--method", "gear group_size=48 buffer=48"], "group_size must divide the model's head_dim"),
     (["--method", "minicache start=9"], "minicache: start must be below the model's 8 layers"),
     (["--out", "/nowhere/rows.jsonl"], "--out /nowhere/rows.jsonl: cannot write there"),
     (["--report", "page.txt"], "--report page.txt: expected a name that ends in .html"),
     (["--out", "TEXT"], "expected rows of kvc eval or a new file")],
    ids=str,
)  # fmt: skip
def test_errors_are_one_line_before_any_work(
    args: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_file(tmp_path)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("it began to work"))
    line = error_line(run_eval(*(text if arg == "TEXT" else arg for arg in args)))
    assert says in line


def test_a_report_shows_all_rows_of_the_file(tmp_path: Path) -> None:
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    asked = ("--tasks", "bytes", "--out", str(out), "--report", str(page))
    for method in ("h2o", "streaming"):  # the second page replaces the first
        got = run_eval("--method", method, *asked)
        assert got.exit_code == 0, got.output
    text = page.read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html>")
    for name in ("none", "h2o", "streaming"):
        assert name in text


def test_presets_that_the_model_does_not_take_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: PRESETS[name] for name in ("none", "less", "streaming")}
    monkeypatch.setattr(choice, "PRESETS", some)
    model = str(copied_model(tmp_path, num_hidden_layers=4))  # nobody learned kernels for it
    args = ("--model", model, "--tasks", "bytes")
    got = run_eval(*args)
    assert got.exit_code == 0, got.output
    assert [line.split()[0] for line in got.stdout.splitlines()] == ["method", "none", "streaming"]
    said = [line for line in got.stderr.splitlines() if line.startswith("kvc: ")]
    assert len(said) == 1
    assert said[0].startswith("kvc: less is left out: ")


def test_the_bundled_text_is_long_enough_for_the_defaults() -> None:
    engine: Any = need_backend("cpu") or kvc.load_engine("cpu", str(demo.path()))
    text = (demo.path() / "text.txt").read_text(encoding="utf-8")
    assert len(engine.encode(text)) > 8 * 2048
