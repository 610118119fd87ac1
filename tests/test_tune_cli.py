"""`kvc tune`: the profile that it writes, its errors, and how it goes on when interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import Result

import kvc
from kvc import demo
from kvc.calibrate.tune.quality import Quality
from kvc.files import read_profile
from kvc.measure.held import hold
from kvc.measure.tasks import DECODED
from tests.conftest import need
from tests.run_cli import both, error_line, kvc_run, need_backend

T = 256
SMALL = ("--rows", "1", "--length", str(T), "--context", str(T), "--dtype", "float32")
OTHER = {"cpu": "mlx", "mlx": "cpu"}


def tune(out: Path, *more: str, backend: str = "cpu") -> Result:
    need_backend(backend)
    text = str(demo.path() / "text.txt")
    methods = () if "--methods" in more else ("--methods", "kcvt")
    args = ("--text", text, "--out", str(out), "--backend", backend, *SMALL, *methods, *more)
    return kvc_run("tune", *args)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Result]]:
    """A profile made on a backend, and what the command said; made once."""
    need("matplotlib")

    @cache
    def made(backend: str) -> tuple[Path, Result]:
        folder = tmp_path_factory.mktemp(backend)
        out, plot = folder / "profile.json", folder / "front.svg"
        got = tune(out, "--memory", "40%", "--plot", str(plot), backend=backend)
        assert got.exit_code == 0, got.output
        return out, got

    return made


@both
def test_a_profile_is_written_and_the_other_backend_takes_it(
    backend: str, tuned: Callable[[str], tuple[Path, Result]]
) -> None:
    other = OTHER[backend]
    need_backend(other)
    out, got = tuned(backend)
    assert sorted(path.name for path in out.parent.iterdir()) == ["front.svg", "profile.json"]
    assert ElementTree.parse(out.parent / "front.svg").getroot().tag.endswith("svg")
    found = read_profile(out)
    assert found.config["memory"] == 0.4
    assert f"{100 * found.measured['share']:.2f}% of the dense cache" in got.stdout
    assert "fits; weights" in got.stdout
    assert got.stdout.splitlines()[-1] == f"written to {out}; take it with --method @{out}"
    engine: Any = kvc.load_engine(other, str(demo.path()), "float32")
    ids = engine.encode((demo.path() / "text.txt").read_text()[5000:8000])[:T]
    report = hold(engine, ids, kvc.parse(f"@{out}"), T - DECODED).report
    assert report.nbytes == found.measured["nbytes"] <= 0.4 * report.dense_bytes


def test_both_backends_find_the_same(tuned: Callable[[str], tuple[Path, Result]]) -> None:
    for backend in OTHER:
        need_backend(backend)
    one, two = (read_profile(tuned(backend)[0]) for backend in OTHER)
    assert one.settings == two.settings
    assert one.calibration == two.calibration
    assert one.measured["nbytes"] == two.measured["nbytes"]
    kl = one.measured["quality"]["kl"]
    assert kl == pytest.approx(two.measured["quality"]["kl"], rel=1e-2)


def test_interrupted_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "profile.json"
    measured, calls = Quality._measured, 0

    def some(self: Quality, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return measured(self, *args)

    monkeypatch.setattr(Quality, "_measured", some)
    got = tune(out, "--memory", "40%")
    assert got.exit_code == 130
    assert got.stderr == f"kvc: interrupted; the same command goes on from {out}.work\n"
    assert not out.exists()
    scores = Path(f"{out}.work") / "scores.jsonl"
    assert len(scores.read_text().splitlines()) == 10

    changed = error_line(tune(out, "--memory", "40%", "--seed", "1"))
    assert "expected what this run has done, got that of one with text" in changed
    calls = 100
    got = tune(out, "--memory", "40%")
    assert got.exit_code == 0, got.output
    again = calls - 100
    assert not Path(f"{out}.work").exists()
    calls = 100
    fresh = tune(tmp_path / "fresh.json", "--memory", "40%")
    assert fresh.exit_code == 0, fresh.output
    assert calls - 100 == again + 10
    assert read_profile(out) == read_profile(tmp_path / "fresh.json")


def test_few_bytes_are_found_for_a_perplexity(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    got = tune(out, "--max-ppl-increase", "2%", "--json")
    assert got.exit_code == 0, got.output
    row = json.loads(got.stdout)
    fit = row["fit"]
    assert fit["needed"] == fit["weights"] + fit["cache"] + (fit["beside"] or 0)
    assert row["config"]["max_ppl_increase"] == 0.02
    assert row["measured"]["quality"]["ppl_increase"] <= 0.02
    assert row["measured"]["share"] < 0.5


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "expected --memory or --max-ppl-increase, got neither"),
        (("--memory", "25%", "--max-ppl-increase", "1%"), "got both"),
        (("--memory", "250%"), "--memory: expected a part of the dense cache such as 25%"),
        (("--memory", "5%"), "expected a budget of at least 30.2% of"),
        (("--memory", "25%", "--methods", "kivvi"), "--methods: expected some of kivi,"),
        (("--memory", "25%", "--context", "9000"), "--context: expected 64 to 4096 tokens"),
        (("--memory", "25%", "--length", "9000"), "--length 9000: expected at most the model's"),
        (("--memory", "25%", "--rows", "900"), "--text: expected 900 pieces of 256 tokens"),
        (("--memory", "25%", "--length", "100"), "expected rows of at least 256 tokens"),
        (("--memory", "25%", "--out", "profile.txt"), "expected a name that ends in .json"),
        (("--memory", "25%", "--text", "nowhere"), "cannot read it"),
        (("--memory", "25%", "--plot", "x.gif"), "expected a name that ends in .png or .svg"),
    ],
)
def test_errors_are_one_line_before_any_work(
    args: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("matplotlib")
    monkeypatch.setattr(Quality, "_measured", None)
    assert says in error_line(tune(tmp_path / "profile.json", *args))
    assert not any(tmp_path.iterdir())


def test_a_profile_that_is_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    out.write_text("{}")
    assert "there is one already" in error_line(tune(out, "--memory", "25%"))
    assert out.read_text() == "{}"
