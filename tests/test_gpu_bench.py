"""The races of `python -m benchmarks.gpu`: a dry run of all, and what happens when one breaks."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import configs
from benchmarks.gpu import main
from benchmarks.races.correctness import ran
from benchmarks.races.device import Device
from benchmarks.races.plan import RACES, Options, Race, guarded, measured, starting
from benchmarks.races.rows import Row, Rows, Task, read
from benchmarks.races.table import tables
from benchmarks.races.targets import targets
from kvc.cuda_kernels.launch import Config
from kvc.measure.speed.clock import NotRaced
from tests.conftest import need
from tests.triton_device import kernels, on_gpu

COMMON = {"commit": "c", "versions": {"torch": "2"}, "date": "2026-01-01", "dry": False}
MODES = {"fused", "reference", "both", "library"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    need("torch")
    need("transformers")
    if sys.platform != "linux":
        pytest.skip("the CPU's peak memory is read from Linux")
    out = tmp_path_factory.mktemp("races") / "gpu.jsonl"
    done = CliRunner().invoke(main, ["--dry-run", "--mode", "reference", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return list(read(out))


def test_every_race_has_rows_and_none_fails(rows: list[Row]) -> None:
    assert {row["race"] for row in rows} == {race.name for race in RACES}
    assert [row for row in rows if "failed" in row] == []


def test_what_is_missing_says_why(rows: list[Row]) -> None:
    lost = {row["key"]: row["not_raced"] for row in rows if "not_raced" in row}
    assert lost["pytest -m cuda"] == "there is no GPU"
    for name in ("flashinfer", "flash_attn", "flash_attn_interface"):
        if name not in sys.modules:
            assert any(why.startswith(f"{name} does not import") for why in lost.values())


def test_every_figure_has_its_circumstances(rows: list[Row]) -> None:
    for row in rows:
        assert row["versions"]["torch"]
        assert row["device"] == "cpu"
        assert row["dry"]
        assert "commit" in row
        if "not_raced" not in row:
            assert row["mode"] in MODES
            assert row["head_dim"] == 64
            assert row["bytes"] > 0 if "bytes" in row else row["race"] != "kernel"


def test_errors_are_those_of_float32(rows: list[Row]) -> None:
    errors = [row["error"] for row in rows if row.get("error") is not None]
    assert len(errors) > 30
    assert max(errors) < 2e-5


def test_codes_are_fewer_bytes_and_lose_something(rows: list[Row]) -> None:
    kernels = {row["key"]: row for row in rows if row["race"] == "kernel" and "bytes" in row}
    dense, four, two = (
        kernels[f"2 x 256 {arm}"] for arm in ("sdpa flash", "kivi 4 bits", "kivi 2 bits")
    )
    assert dense["bytes"] > 4 * four["bytes"] > 4 * two["bytes"]
    assert 0.01 < four["loss_of_codes"] < two["loss_of_codes"]


def test_table_shows_every_race(rows: list[Row]) -> None:
    text = tables(rows)
    for title in ("Attention kernels", "Decode steps", "Encoding", "Generation", "Not raced"):
        assert f"## {title}" in text
    assert "no figure here means anything" in text


def test_table_is_made_of_the_rows_there_are(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    Rows(out, {**COMMON, "device": "H"}).write("kernel", "1 x 8 sdpa flash", kernel_row(1.0))
    done = CliRunner().invoke(main, ["--table", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8") + "\n" == done.stdout
    assert "1 x 8 sdpa flash | library" in done.output


def test_no_rows_and_no_gpu_are_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--table", "--out", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 2
    assert "expected rows in" in done.output
    need("torch")
    import torch

    if not torch.cuda.is_available():
        done = CliRunner().invoke(main, ["--out", str(tmp_path / "none.jsonl")])
        assert done.exit_code == 2
        assert "--dry-run" in done.output


def kernel_row(ms: float, **fields: Any) -> Row:
    row = {"mode": "library", "batch": 64, "tokens": 8192, "ms": ms, "error": 0.0, **fields}
    return row | {"copy_rate": 4e12, "rate": 3e12, "share_of_copy": 0.75, "bytes": 2**30}


def test_targets_compare_with_the_best_rival() -> None:
    found = [
        {"race": "kernel", "key": "64 x 8192 sdpa flash", **kernel_row(4.0)},
        {"race": "kernel", "key": "64 x 8192 sdpa cudnn", **kernel_row(3.1)},
        {"race": "kernel", "key": "64 x 8192 kivi 4 bits", **kernel_row(1.0, mode="fused")},
        {"race": "kernel", "key": "64 x 8192 kivi 2 bits", **kernel_row(1.0, mode="reference")},
    ]
    lines = {line.split(" |")[0]: line for line in targets(found)}
    assert lines["| kernel, kivi 4 bits: over the best SDPA"].endswith("| >= 3.0 | 3.1 | yes |")
    assert lines["| kernel, kivi 4 bits: of the copy's rate"].endswith("| >= 0.75 | 0.75 | yes |")
    assert lines["| kernel, kivi 2 bits: over the best SDPA"].endswith("| >= 4.5 | - | - |")
    slow = [*found[:2], {**found[2], "ms": 2.0}]
    assert any("over the best SDPA | >= 3.0 | 1.55 | no |" in line for line in targets(slow))


def test_a_row_is_made_whatever_happens() -> None:
    def fails() -> Row:
        raise RuntimeError("no memory\nat all")

    def lacks() -> Row:
        raise NotRaced("no peer")

    assert measured(Task("a", fails))["failed"] == "RuntimeError: no memory"
    assert measured(Task("a", lacks))["not_raced"] == "no peer"


def breaking(race: Race, options: Options, end: float, tell: Connection) -> None:
    """A race of three rows, of which the second ends its process."""
    rows = Rows(options.path, options.common)
    for key in ("first", "second", "third"):
        if key not in rows.done(race.name):
            tell.send(key)
            if key == "second":
                os._exit(3)
            rows.write(race.name, key, {"ms": 1.0})


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_broken_process_costs_one_row(tmp_path: Path) -> None:
    options = Options(tmp_path / "rows.jsonl", True, "fused", COMMON)
    context = multiprocessing.get_context("fork")
    guarded(RACES[1], options, time.monotonic() + 60, context, breaking)
    found = {row["key"]: row.get("failed") for row in read(options.path)}
    assert found == {"first": None, "second": "its process ended with 3", "third": None}


class Hanging:
    """A context whose processes never end by themselves."""

    exitcode = None

    def __init__(self, **wanted: Any) -> None:
        self.killed = False
        if wanted:
            wanted["args"][-1].send("a kernel")

    Pipe = staticmethod(multiprocessing.Pipe)

    def start(self) -> None: ...

    def join(self, seconds: float | None = None) -> None:
        assert self.killed or seconds is not None

    def is_alive(self) -> bool:
        return not self.killed

    def kill(self) -> None:
        self.killed, self.exitcode = True, -9

    Process = property(lambda self: Hanging)


def test_a_process_that_hangs_is_killed(tmp_path: Path) -> None:
    options = Options(tmp_path / "rows.jsonl", True, "fused", COMMON)
    guarded(RACES[1], options, time.monotonic(), Hanging(), breaking)
    found = {row["key"]: row["failed"] for row in read(options.path)}
    assert found == {"a kernel": "killed"}


@pytest.mark.slow
def test_processes_start_anew_where_forked_ones_have_no_gpu() -> None:
    need("torch")
    import torch

    expected = "forkserver" if torch.cuda.is_available() else "spawn"
    assert starting().get_start_method() == expected


def test_half_a_line_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Rows(path, COMMON).write("kernel", "a", {"ms": 1.0})
    path.write_text(path.read_text(encoding="utf-8") + json.dumps({"race": 1})[:5])
    assert [row["key"] for row in read(path)] == ["a"]
    assert Rows(path, COMMON).done("kernel") == {"a"}


def test_pytest_is_asked_and_cut() -> None:
    said = "print('2 failed, 13 passed, 1 skipped, 1 error in 2.0s'); raise SystemExit(1)"
    row = ran([sys.executable, "-c", said], 30)
    assert (row["passed"], row["failed_tests"], row["skipped"], row["errors"]) == (13, 2, 1, 1)
    assert (row["exit_status"], row["cut"]) == (1, False)
    slow = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('5 passed')"
    row = ran([sys.executable, "-c", slow], 3)  # a busy machine starts Python in seconds
    assert (row["passed"], row["cut"]) == (5, True)


def test_candidates_for_a_table_are_timed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_gpu():
        pytest.skip("kernels are interpreted on the CPU")
    device, rows = Device("cpu"), Rows(tmp_path / "configs.jsonl", {})
    sweep = next(configs.of_dense(device))
    refused = sweep._replace(candidates=((64, Config(24, 4, 3)),))  # no power of two
    monkeypatch.setattr(configs, "sweeps", lambda _: iter([refused]))
    for _ in range(2):
        with kernels():
            configs.search(device, rows, ((1, 40),), 1)
    now, other = read(rows.path)
    assert now["now"]
    assert now["ms"] > 0
    assert "power of" in other["why"]
    assert [line.count("1.000x") for line in configs.table(rows.path)] == [1]
