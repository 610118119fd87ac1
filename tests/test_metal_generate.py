"""The bundled model written by mlx-lm with every op in a Metal kernel, token by token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import kvc.demo
from kvc.methods import parse
from kvc.ops.dispatch import mode
from tests import metalsim
from tests.backend_table import PROMPT
from tests.conftest import need
from tests.metal import ATTENTION, op_of

TOKENS = 32
FEW = {"less.heavy": 24, "less.recent": 24}
SHARED = {"kvsharer.map": "7:3,6:2"}
METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("kivi", "kcvt", "token", "gear-l", "gear-s", "gear")},
    # less than its 64 sinks and window of 128, which leave nothing to code
    "gear2": {"gear.sink": 16, "gear.window": 32, "gear.buffer": 32},
    "streaming": {"less.recent": 24},
    "h2o": FEW,
    "tova": {"less.heavy": 48},
    "less": FEW,
    "minicache": {},
    "kvsharer": SHARED,
    "minicache+gear": {},
    "kvsharer+gear": SHARED,
    "h2o+token": FEW,
}
AT_MOST = 3  # launches of attention per layer and step


@pytest.fixture(scope="module")
def engine() -> Any:
    need("mlx")
    need("mlx_lm")
    metalsim.need()
    from kvc.api import load_engine

    return load_engine("mlx", str(kvc.demo.path()), "float32")


def write(engine: Any, name: str, settings: dict[str, Any]) -> tuple[list[int], Any]:
    """The greedy continuation of the prompt's first 100 tokens, and its cache."""
    method = parse(name, settings)
    cache = engine.make_cache(method)
    ids = engine.encode(PROMPT)[:100]
    pieces = engine.stream(ids, cache, max_tokens=TOKENS)
    return [piece.token for piece in pieces], engine.store(cache)


@pytest.mark.parametrize(("name", "settings"), METHODS.items(), ids=METHODS)
def test_kernels_write_what_definitions_write(
    engine: Any, name: str, settings: dict[str, Any]
) -> None:
    with mode("reference"):
        want, store = write(engine, name, settings)
    with metalsim.simulate("fast") as sim, mode("fused"):
        got, fused = write(engine, name, settings)
    assert got == want
    assert fused.nbytes == store.nbytes
    launched = Counter(op_of(launch.name) for launch in sim.launches)
    attending = sum(launched[op] for op in ATTENTION)
    if name != "kvsharer":  # which compresses nothing: the library attends
        # mlx-lm computes one step more than it is asked for
        assert attending <= AT_MOST * TOKENS * len(engine.shape.full_layers)
        assert attending >= (TOKENS - 1) * len(engine.shape.full_layers)
