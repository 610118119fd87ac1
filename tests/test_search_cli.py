"""`kvc search kvsharer`: what it prints and writes, its errors, and how it goes on when killed."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import Result

from kvc import api, demo
from kvc.calibrate.kvsharer.search import Search
from kvc.files import read_map
from kvc.methods import parse
from tests.run_cli import error_line, kvc_run, need_backend
from tests.search_text import SHORT, text_file

LONG = ("--share", "75%", "--threshold", "0.95")  # rejects many pairs
COMMAND = [sys.executable, "-c", "from kvc.cli import main; main()"]
PATIENCE = 60  # seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the map goes; the text lies beside it."""
    text_file(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def args(folder: Path, *more: str, name: str = "map.json") -> list[str]:
    text, out = str(folder.parent / "text.txt"), str(folder / name)
    backend = () if "--backend" in more else ("--backend", "cpu")
    return ["search", "kvsharer", "--text", text, "--out", out, *SHORT, *backend, *more]


def search(folder: Path, *more: str, name: str = "map.json") -> Result:
    need_backend("mlx" if "mlx" in more else "cpu")
    return kvc_run(*args(folder, *more, name=name))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_a_map_is_found(backend: str, folder: Path) -> None:
    got = search(folder, "--backend", backend, "--share", "25%")
    assert got.exit_code == 0, got.output
    lines = got.stderr.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["accepted", "accepted"]
    assert lines[-1] == f"2 of 8 layers read another's cache; written to {folder / 'map.json'}"
    assert names(folder) == ["map.json"]
    file = read_map(folder / "map.json")
    config = file.config
    assert {"backend": backend, "dtype": "float32", "model": "bundled"}.items() <= config.items()
    assert (config["sentences"], config["length"], config["share"]) == (4, 24, 0.25)
    assert file.note == "searched on text.txt"
    printed, written = (
        parse("kvsharer", {"map": text}).owners(8)
        for text in (got.stdout.strip(), str(folder / "map.json"))
    )
    assert printed == written == file.owners
    pairs = [(int(i), int(j)) for i, j in (line.split()[1].split(":") for line in lines[:-1])]
    assert [(pair["layer"], pair["owner"]) for pair in config["accepted"]] == pairs


def test_fractions_are_percentages(folder: Path) -> None:
    a, b = (search(folder, "--share", s, "--quiet", name=f"{s}.json") for s in ("0.25", "25%"))
    assert (a.exit_code, a.stderr, a.stdout) == (0, "", b.stdout)
    assert (folder / "0.25.json").read_bytes() == (folder / "25%.json").read_bytes()


def test_json_is_one_object_and_a_partial_map_a_warning(folder: Path) -> None:
    got = search(folder, *LONG, "--json", "--quiet")
    assert got.exit_code == 0, got.output
    row = json.loads(got.stdout)
    n = sum(tried["accepted"] for tried in row["tried"])
    assert 0 < n < 6
    assert not row["complete"]
    assert got.stderr.startswith(f"kvc: warning: only {n} of 6 layers share: no other pair of 28 ")
    assert len(got.stderr.splitlines()) == 1
    assert tuple(row["owners"]) == read_map(folder / "map.json").owners
    assert row["out"] == str(folder / "map.json")


def test_nothing_accepted_is_an_error(folder: Path) -> None:
    got = search(folder, "--share", "25%", "--threshold", "1.01", "--quiet")
    assert "none of 28 pairs is above the threshold 1.01" in error_line(got)
    assert names(folder) == []


def test_compression_may_act(folder: Path) -> None:
    few = ("--with", "h2o", "--set", "heavy=4", "--set", "recent=4")
    got = search(folder, "--share", "12.5%", *few)
    assert got.exit_code == 0, got.output
    less = read_map(folder / "map.json").config["with"]["less"]
    assert (less["heavy"], less["recent"], less["policy"]) == (4, 4, "h2o")


# Errors


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--share", "25"], "a part of the layers such as 25% or 0.25, got '25'"),
        (["--share", "a lot"], "a part of the layers such as 25% or 0.25, got 'a lot'"),
        (["--share", "nan%"], "got 'nan%'"),
        (["--share", "95%"], "expected 1 to 7 of the 8 layers that keep all tokens, got 8"),
        (["--share", "1%"], "got 0; ask for more"),
        (["--share", "25%", "--sentences", "4000"], "expected 4000 pieces of 24 tokens"),
        (["--share", "25%", "--text", "none.txt"], "--text none.txt: cannot read it"),
        (["--share", "25%", "--length", "5000"], "at most the model's context, 4096 tokens"),
        (["--share", "25%", "--threshold", "nan"], "expected a cosine such as 0.5, got nan"),
        (["--share", "25%", "--set", "bits=4"], "got no --with"),
        (["--share", "25%", "--with", "none"], "a method that compresses, got 'none'"),
        (["--share", "25%", "--with", "minicache"], "kvsharer and minicache both fill"),
        (["--share", "25%", "--with", "gear"], "--length 96 does"),
        (["--share", "25%", "--model", "./nowhere"], "no model in './nowhere'"),
        (["--share", "25%", "--plot", "map.gif"], "a name that ends in .png or .svg"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(more: list[str], says: str, folder: Path) -> None:
    assert says in error_line(search(folder, *more))
    assert names(folder) == []


def test_targets_are_checked_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load_engine", lambda *_: pytest.fail("the model was loaded"))
    (folder / "map.json").write_text("mine")
    (folder / "dir.json").mkdir()
    for name, says in (
        ("map.json", "there is one already; take another name, or --force"),
        ("dir.json", "there is one already; take another name\n"),
        ("map.txt", "expected a name that ends in .json"),
        ("none/map.json", "cannot write there: No such file or directory"),
    ):
        assert says in error_line(search(folder, "--share", "25%", name=name))
    plot = str(folder / "none" / "map.png")
    got = search(folder, "--share", "25%", "--plot", plot, name="new.json")
    assert f"--plot {plot}: cannot write there" in error_line(got)
    assert (folder / "map.json").read_text() == "mine"


def test_force_writes_over(folder: Path) -> None:
    (folder / "map.json").write_text("mine")
    assert search(folder, "--share", "25%", "--force").exit_code == 0
    assert read_map(folder / "map.json").owners


def test_without_matplotlib_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load_engine", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    got = search(folder, "--share", "25%", "--plot", str(folder / "map.png"))
    line = error_line(got)
    assert line.startswith("kvc: --plot: matplotlib does not import")
    assert line.endswith("pip install 'kvc[plot]'\n")


# Pictures


def test_pictures_show_the_pairs(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    for suffix, few in (("png", ("--share", "12.5%")), ("svg", LONG)):
        plot = folder / f"map.{suffix}"
        got = search(folder, *few, "--plot", str(plot), name=f"{suffix}.json")
        assert got.exit_code == 0, got.output
    data = (folder / "map.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 800 < height < width < 1200
    root = ElementTree.parse(folder / "map.svg").getroot()
    marks = {
        group.get("id"): sum(node.tag.endswith("}use") for node in group.iter())
        for group in root.iter()
        if group.get("id") in ("accepted", "rejected")
    }
    verdicts = [line.split()[0] for line in got.stderr.splitlines()]
    assert marks == {name: verdicts.count(name) for name in ("accepted", "rejected")}
    assert len(marks) == 2


# Interrupted


def unbroken(folder: Path) -> bytes:
    got = search(folder, *LONG, "--quiet", name="unbroken.json")
    assert got.exit_code == 0, got.output
    return (folder / "unbroken.json").read_bytes()


def test_killed_it_goes_on(folder: Path) -> None:
    need_backend("cpu")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    part = folder / "map.json.part"
    pipe = subprocess.PIPE
    command = [*COMMAND, *args(folder, *LONG)]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env) as process:
        end = time.monotonic() + PATIENCE
        n = 0
        while n < 3 and process.poll() is None and time.monotonic() < end:
            n = len(json.loads(part.read_bytes())["tried"]) if part.exists() else 0
            time.sleep(0.002)
        process.kill()  # SIGKILL: nothing of it runs any more
        process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    left = json.loads(part.read_bytes())["tried"]
    assert len(left) >= 3
    assert not (folder / "map.json").exists()
    got = search(folder, *LONG)
    assert got.exit_code == 0, got.output
    assert f"kvc: going on from {part}: {len(left)} pairs are tried\n" in got.stderr
    assert not part.exists()
    assert (folder / "map.json").read_bytes() == unbroken(folder)


def test_ctrl_c_keeps_the_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    similarity = Search._similarity

    def pressed(self: Search, *pair: int) -> float:
        if len(self.tried) == 2:
            signal.raise_signal(signal.SIGINT)
        return similarity(self, *pair)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "_similarity", pressed)
        got = search(folder, *LONG, "--quiet")
    signal.signal(signal.SIGINT, before)
    part = folder / "map.json.part"
    assert (got.exit_code, got.stdout) == (130, "")
    assert got.stderr == f"kvc: interrupted; the same command goes on from {part}\n"
    assert len(json.loads(part.read_bytes())["tried"]) == 3  # the pair in hand was finished
    other = search(folder, "--share", "25%")
    assert f"{part}: expected a search with share 0.25, got one with 0.75" in error_line(other)
    assert names(folder) == ["map.json.part"]
    assert search(folder, *LONG, "--quiet").exit_code == 0
    assert (folder / "map.json").read_bytes() == unbroken(folder)


def test_ctrl_c_before_the_first_pair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "prepare", pressed)
    got = search(folder, *LONG)
    assert (got.exit_code, got.stderr) == (130, "kvc: interrupted\n")
    assert names(folder) == []


def test_the_default_model_is_the_bundled_one(folder: Path) -> None:
    a = search(folder, "--share", "25%", "--quiet", name="a.json")
    b = search(folder, "--share", "25%", "--quiet", "--model", str(demo.path()), name="b.json")
    assert a.stdout == b.stdout
    assert read_map(folder / "b.json").config["model"] == str(demo.path())
