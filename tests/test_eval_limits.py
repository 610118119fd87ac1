"""Nothing is lost at the limits, and every task says so; what is broken is seen by every task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc.files import write_kernels
from kvc.measure.inputs import Inputs
from kvc.ops import codec
from kvc.ops.evict import Kernels
from kvc.ops.quant import Quantized
from tests.eval_small import QUALITY, figures, numbers, small_inputs
from tests.oracles.less_features import random_weights
from tests.run_cli import need_backend
from tests.settings import lossless
from tests.tolerances import LOGITS

pytestmark = pytest.mark.slow
CODED = {"gear.bits": 8, "gear.group_size": 16, "gear.buffer": 16}
EVERYTHING = 1000  # tokens, of a budget


@pytest.fixture(scope="module")
def inputs() -> Iterator[Inputs]:
    need_backend("cpu")
    with small_inputs() as found:
        yield found


@pytest.fixture(scope="module")
def full(inputs: Inputs) -> dict[str, dict[str, Any]]:
    return figures(inputs, "none")


def settings_of(name: str, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """The method's limit at which it keeps all of these contexts."""
    given = dict(lossless(16)[name])
    if given.get("less.kernels"):
        shape = inputs.engine.shape
        sizes = (shape.n_heads, shape.n_kv_heads, shape.head_dim, 8, 4)
        weights = random_weights(*sizes, seed=0, s1=0.5)
        fields = {field: np.float32(getattr(weights, field)) for field in Kernels._fields}
        path = folder / "kernels.safetensors"
        layers = {layer: Kernels(**fields) for layer in range(shape.n_layers)}
        write_kernels(path, layers, shape.fingerprint, {})
        given["less.kernels"] = str(path)
    return {
        key: EVERYTHING if key in ("less.heavy", "less.recent") else value
        for key, value in given.items()
    }


@pytest.mark.parametrize("name", sorted(set(lossless(16)) - {"none"}))
def test_lossless_limits_have_the_full_caches_figures(
    inputs: Inputs, full: dict[str, dict[str, Any]], name: str, tmp_path: Path
) -> None:
    found = figures(inputs, name, settings_of(name, inputs, tmp_path))
    assert set(found) == set(QUALITY)
    for task, expected in full.items():
        got = {"k": None, "v": None, **found[task]} if task == "layers" else found[task]
        if got.get("k", 0) is None:  # there are no keys to compare where tokens could be evicted
            expected = {**expected, "k": None, "v": None}
        pairs = zip(numbers(got), numbers(expected), strict=True)
        for (where, a), (_, b) in pairs:
            # perplexity multiplies an error of -log p
            loose = b if where == ".ppl" else 1
            assert a == pytest.approx(b, abs=LOGITS["exact"] * loose), (task, where)
    assert found["agree"]["top1"] == 1
    assert found["agree"]["same"] == found["agree"]["length"]
    assert found["recall"] == full["recall"]
    assert found["answers"] == full["answers"]


@pytest.fixture(scope="module")
def right(inputs: Inputs) -> dict[str, dict[str, Any]]:
    return figures(inputs, "kivi", CODED)


@pytest.fixture(scope="module")
def broken(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """The same method, whose steps are half as large again as they should be."""
    plain = codec.quantize

    def wrong(*args: Any) -> Quantized:
        found = plain(*args)
        return found._replace(step=found.step * 1.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "quantize", wrong)
        return figures(inputs, "kivi", CODED)


def test_a_broken_codec_is_seen_by_every_task(
    full: dict[str, Any], right: dict[str, Any], broken: dict[str, Any]
) -> None:
    """Eight bits cost next to nothing; with wrong steps every figure tells."""
    assert right["ppl"]["nll"] == pytest.approx(full["ppl"]["nll"], abs=0.01)
    assert broken["ppl"]["nll"] > full["ppl"]["nll"] + 0.1
    assert broken["kl"]["mean"] > 0.1 > 0.001 > right["kl"]["mean"]
    assert broken["agree"]["top1"] < 0.9 < right["agree"]["top1"]
    assert broken["agree"]["same"] < right["agree"]["same"]
    assert broken["recall"]["digits"] < right["recall"]["digits"]
    assert min(broken["layers"]["attention"]) > 0.05 > max(right["layers"]["attention"])
    assert min(broken["layers"]["k"]) > 0.1 > max(right["layers"]["k"])
    assert min(broken["layers"]["v"]) > 0.1 > max(right["layers"]["v"])
    assert broken["answers"]["length"] != right["answers"]["length"]
    assert right["answers"] == full["answers"]
    worst, best = (
        np.mean([part[2] for part in found["drift"]["by_position"]]) for found in (broken, right)
    )
    assert worst > 0.1 > 0.001 > best


def test_the_full_models_answers_end(full: dict[str, Any]) -> None:
    assert 0 < full["answers"]["ended"] <= 1
    assert full["answers"]["length"] < full["answers"]["limit"]
