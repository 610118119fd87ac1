"""What every task finds, by its keys and by hand; what one pass answers; the peak of memory."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kvc.errors import ConfigError
from kvc.measure import peak
from kvc.measure.divergence import Divergence
from kvc.measure.evaluate import plain
from kvc.measure.inputs import Sizes
from kvc.measure.peak import Peak, check_peak
from kvc.measure.tasks import LONG_BUCKETS, TASKS, parts, slope_of
from tests.eval_small import figures, small_inputs
from tests.run_cli import need_backend

KEYS = {
    "bytes": "nbytes dense_bytes ratio bytes_per_token tokens parts layers",
    "time": "prefill_s prefill_tokens_per_s compress_s decode_tokens_per_s step_ms_median "
    "step_ms_p99",
    "memory": "peak_bytes cache_bytes",
    "ppl": "ppl nll error rows by_position",
    "kl": "mean median p99 max by_position",
    "agree": "top1 same length runs",
    "recall": "exact digits cells",
    "layers": "attention k v",
    "answers": "length full_length ratio ended limit runs",
    "maps": "kvsharer minicache",
    "drift": "length runs by_position slope slope_error",
}
CELL = "kind facts context depth distance asked exact digits"


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    need_backend("cpu")
    tasks = TASKS if peak._REFS.exists() else tuple(t for t in TASKS if t != "memory")
    with small_inputs(sizes=Sizes(context=136, rows=1, length=20)) as inputs:
        return figures(inputs, "minicache", {}, tasks)


def test_rows_have_their_keys(found: dict[str, dict[str, Any]]) -> None:
    assert set(KEYS) == set(TASKS)
    for task, result in found.items():
        assert list(result) == KEYS[task].split()
    for cell in found["recall"]["cells"]:
        assert list(cell) == CELL.split()


def test_figures_go_together(found: dict[str, dict[str, Any]]) -> None:
    ppl, kl, recall = (found[task] for task in ("ppl", "kl", "recall"))
    assert ppl["ppl"] == pytest.approx(np.exp(ppl["nll"]), rel=1e-5)
    assert ppl["error"] is None  # of one row
    for by_position, mean in ((ppl["by_position"], ppl["nll"]), (kl["by_position"], kl["mean"])):
        edges = [(start, stop) for start, stop, *_ in by_position]
        assert edges[0][0] == 136 // 2
        assert edges[-1][1] == 135
        assert all(a[1] == b[0] for a, b in pairwise(edges))
        weighted = sum((stop - start) * x for start, stop, x, *_ in by_position)
        assert weighted / (135 - 136 // 2) == pytest.approx(mean, rel=1e-5)
    asked = sum(cell["asked"] for cell in recall["cells"])
    assert recall["exact"] == pytest.approx(sum(c["exact"] for c in recall["cells"]) / asked)
    assert found["memory"]["cache_bytes"] == found["bytes"]["nbytes"]
    assert found["memory"]["peak_bytes"] > 0
    assert found["time"]["prefill_tokens_per_s"] > 1
    assert found["maps"]["kvsharer"] is None
    assert len(found["maps"]["minicache"]["retained"]) == 2
    first, *_, last = found["drift"]["by_position"]
    assert (first[0], last[1]) == (64, 64 + 20 - 1)


def test_the_slope_by_hand() -> None:
    """A divergence that grows by a nat in 1000 tokens, about which parts go up and down."""
    places = 64 + np.arange(1600) + 0.5
    kl = np.array([0.3 + places / 1000])
    straight = Divergence(64, kl, kl, kl > 0, 1, 1)
    slope, error = slope_of(straight)
    assert slope == pytest.approx(1)
    assert error == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(0)
    noise = np.repeat(rng.standard_normal(LONG_BUCKETS), 100)[None]
    slope, error = slope_of(Divergence(64, kl, kl + noise, kl > 0, 1, 1))
    x = places.reshape(LONG_BUCKETS, 100).mean(1) / 1000
    y = (kl + noise).reshape(LONG_BUCKETS, 100).mean(1)
    line, cov = np.polyfit(x, y, 1, cov=True)
    assert slope == pytest.approx(line[0])
    assert error == pytest.approx(np.sqrt(cov[0, 0]))


def test_parts_of_a_pass_follow_each_other() -> None:
    seen: list[float] = []
    first, second = parts(lambda done, total: seen.append(done / total), 2)
    for part in (first, second):
        part(5, 10)
        part(10, 10)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_numbers_become_what_json_takes() -> None:
    x = {1: np.float64(1 / 3), "a": (np.int64(2), [np.arange(2.0)]), "b": None, "c": True}
    assert plain(x) == {"1": 0.3333333, "a": [2, [[0.0, 1.0]]], "b": None, "c": True}


class Named:
    """An engine of which only the name counts."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_the_peak_is_of_what_was_taken_since() -> None:
    if not peak._REFS.exists():
        pytest.skip("this system does not forget a process's peak")
    size = 64 << 20
    engine: Any = Named("cpu")
    before = np.ones(size // 8)
    del before
    watch = Peak(engine)
    assert watch.above() < size / 4
    taken = np.ones(size // 8)
    del taken
    assert size * 0.9 < watch.above() < size * 1.5


def test_a_system_that_keeps_its_peak_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peak, "_REFS", tmp_path / "none")
    engine: Any = Named("cpu")
    with pytest.raises(ConfigError, match="memory: expected a system that forgets"):
        check_peak(engine)
