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

# Parts whose bytes are not divided evenly: outliers of values and MiniCache's extremes are of all
# heads, and heads retain different numbers of originals. So it is with the steps of kcvt's values.
UNEVEN = {"outliers", "thresholds", "retained", "slack"}
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
    refused = both.pop("refused")
    assert len(alone.pop("refused")) == 2  # an empty cache is not saved, no CPU records
    assert len(refused) == 4
    assert all("all heads in one process" in x for x in refused[:2])
    assert "granularity=token" in refused[2]
    assert library == "mlx" or "span the heads of 2 processes" in refused[3]
    assert alone.keys() == both.keys() == METHODS.keys()
    for name in METHODS:
        one, two = alone[name], both[name]
        assert one["tokens"] == two["tokens"], name
        assert one["parts"].keys() == two["parts"].keys(), name
        for part, nbytes in one["parts"].items():
            if part not in UNEVEN and (name, part) != ("kcvt", "scales"):
                assert two["parts"][part] * 2 == nbytes, (name, part)
    assert "outliers" in both["gear"]["parts"]
