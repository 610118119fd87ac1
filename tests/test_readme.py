"""The README's examples run as printed, on the bundled model; its table is what was measured."""

import re
from pathlib import Path

import pytest

import kvc.demo
from benchmarks.presets import table
from tests.conftest import need

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_there_is_one_for_each_library() -> None:
    assert ["mlx_lm" in block for block in BLOCKS] == [True, False]


@pytest.mark.parametrize(("block", "library"), [*zip(BLOCKS, ("mlx", "torch"), strict=True)])
@pytest.mark.filterwarnings("ignore")  # the libraries' own, of what a user's script would see
def test_it_runs(block: str, library: str, capsys: pytest.CaptureFixture[str]) -> None:
    need(library)
    names = re.findall(r'"([\w-]+/[\w.-]+)"', block)
    assert names, "the example names a model of the hub"
    for name in set(names):
        block = block.replace(name, str(kvc.demo.path()))
    exec(compile(block, str(README), "exec"), {})
    said = capsys.readouterr().out
    assert len(said.split()) > 10
    assert "nbytes=" in said


def test_figures_are_those_of_the_rows() -> None:
    assert table() in README.read_text(encoding="utf-8")
