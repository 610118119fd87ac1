"""MLX and PyTorch find the same figures, to three digits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvc.measure.inputs import Inputs, Sizes
from tests.eval_small import QUALITY, figures, numbers, small_inputs
from tests.run_cli import need_backend
from tests.tolerances import FIGURES

SIZES = Sizes(context=136, rows=1, length=12)
BLOCKS = {"gear.group_size": 16, "gear.buffer": 16}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("kivi", {"gear.bits": 4, **BLOCKS}),
    ("gear", {"gear.bits": 4, **BLOCKS}),
    ("gear2", {"gear.sink": 4, "gear.window": 8, "gear.buffer": 16}),
    ("h2o", {"less.heavy": 12, "less.recent": 12}),
    ("less", {}),
    ("minicache", {}),
    ("kvsharer", {}),
]


@pytest.fixture(scope="module")
def both() -> Iterator[list[Inputs]]:
    for backend in ("cpu", "mlx"):
        need_backend(backend)
    with small_inputs("cpu", SIZES) as cpu, small_inputs("mlx", SIZES) as mlx:
        yield [cpu, mlx]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), METHODS, ids=lambda x: x if type(x) is str else "")
def test_every_quality_agrees_to_three_digits(
    both: list[Inputs], name: str, settings: dict[str, Any]
) -> None:
    cpu, mlx = (figures(inputs, name, settings) for inputs in both)
    rtol, atol = FIGURES
    for task in QUALITY:
        pairs = zip(numbers(mlx[task]), numbers(cpu[task]), strict=True)
        for (where, a), (_, b) in pairs:
            assert a == pytest.approx(b, rel=rtol, abs=atol), (task, where)
