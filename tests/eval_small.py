"""An evaluation so small that it costs seconds: every task, on a few tokens of the bundled text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

import kvc
from kvc import demo
from kvc.measure import needles
from kvc.measure.choice import Choice
from kvc.measure.evaluate import check, evaluate
from kvc.measure.inputs import Inputs, Sizes
from kvc.measure.results import Results

QUALITY = ("ppl", "kl", "agree", "recall", "layers", "answers", "drift")
SIZES = Sizes(context=192, rows=2, length=48)
KINDS = (("single", 1), ("multi-key", 2), ("multi-value", 2))
END = 282  # the token of a comma: where answers end


@contextmanager
def small_inputs(backend: str = "cpu", sizes: Sizes = SIZES) -> Iterator[Inputs]:
    """What the bundled model reads; its answers end at a comma."""
    engine: Any = kvc.load_engine(backend, str(demo.path()), "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(needles, "KINDS", KINDS)
        if backend == "cpu":
            patch.setattr(engine.model.generation_config, "eos_token_id", END)
        else:
            patch.setattr(engine.tokenizer, "_eos_token_ids", {END})
        yield Inputs(engine, [demo.path() / "text.txt"], sizes)


def figures(
    inputs: Inputs, name: str, settings: Mapping[str, Any] | None = None, tasks: Any = QUALITY
) -> dict[str, dict[str, Any]]:
    """The results of one method by task."""
    parsed = kvc.parse(name, settings or {})
    choices = [Choice(name, {k: str(v) for k, v in (settings or {}).items()}, parsed)]
    check(inputs, choices, tasks)
    return {row["task"]: row["result"] for row in evaluate(inputs, choices, tasks, Results(), "")}


def numbers(x: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a result, with where it stands."""
    if isinstance(x, dict):
        for key, value in x.items():
            yield from numbers(value, f"{path}.{key}")
    elif isinstance(x, list):
        for i, value in enumerate(x):
            yield from numbers(value, f"{path}[{i}]")
    elif isinstance(x, int | float):
        yield path, float(x)
