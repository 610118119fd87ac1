"""Two processes that share a model's heads write what one process does, each with its own heads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from tests.tensor_parallel import METHODS, prepare

# What these go by spans all heads, of which a process has its own only: the steps of kcvt's values,
# the mean of TOVA, the extremes of MiniCache. So do outliers of values, where there are some.
SPANNING = {"kcvt", "tova", "minicache", "minicache+gear"}
ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("torch")
    found = tmp_path_factory.mktemp("model")
    prepare(found)
    return found


def run(library: str, folder: Path, *launch: str) -> dict[str, Any]:
    """The line that the first process prints."""
    command = [sys.executable, *launch, "-m", "tests.tensor_parallel", library, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    line = next((x for x in done.stdout.splitlines() if x.startswith("{")), None)
    assert line is not None, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "mlx"])
def test_two_processes_write_what_one_does(library: str, folder: Path) -> None:
    need(library)
    launch = TORCHRUN
    if library == "torch":
        need("accelerate")  # which transformers asks for
    else:
        script = Path(sys.executable).with_name("mlx.launch")
        launch = [str(script), "-n", "2", "--python", sys.executable, "--"]
    alone, both = run(library, folder), run(library, folder, *launch)
    assert alone.keys() == both.keys() == METHODS.keys()
    for name in METHODS:
        one, two = alone[name], both[name]
        if name in SPANNING:
            assert one["tokens"][0] == two["tokens"][0]  # of the prompt, which is exact
            assert one["nbytes"] / 2 <= two["nbytes"] < 0.56 * one["nbytes"]
        else:
            assert one["tokens"] == two["tokens"], name
            assert two["nbytes"] * 2 == one["nbytes"], name
