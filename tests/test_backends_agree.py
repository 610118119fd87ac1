"""End to end: the bundled model writes the same tokens on MLX as on PyTorch, with every method."""

from importlib import import_module
from typing import Any

import pytest

import kvc.demo
from kvc.methods import parse
from tests.conftest import need

PROMPT = (
    "The code of Anna is 4821. "
    + "It was a dark night and the old house stood by the river. " * 10
    + "The code of Anna is"
)
METHODS: tuple[tuple[str, dict[str, str]], ...] = (
    ("none", {}),
    ("kivi", {}),
    ("gear-l", {}),
    ("gear-s", {}),
    ("gear", {}),
    ("kvsharer", {"kvsharer.map": "7:3"}),
    ("kvsharer+gear", {"kvsharer.map": "7:3", "gear.bits": "4"}),
)


@pytest.fixture(scope="module")
def engines() -> list[Any]:
    """The bundled model on both libraries, in float32."""
    for library in ("torch", "mlx"):
        need(library)
    path = str(kvc.demo.path())
    return [
        import_module(f"kvc.backends.{name}.engine").load(path, "cpu", "float32")
        for name in ("torch", "mlx")
    ]


@pytest.mark.parametrize("prefill", ["exact", "stream"])
@pytest.mark.parametrize(("name", "settings"), METHODS, ids=[name for name, _ in METHODS])
def test_same_tokens(engines: list[Any], name: str, settings: dict[str, str], prefill: str) -> None:
    texts = []
    for engine in engines:
        cache = engine.make_cache(parse(name, settings), prefill)
        pieces = engine.stream(
            engine.encode(PROMPT), cache, max_tokens=70, temp=0.0, prefill_step=100
        )
        texts.append([piece.token for piece in pieces])
        report = engine.store(cache).report()
        assert sum(report.layers) == report.nbytes == engine.store(cache).nbytes
        if "gear" in name or name == "kivi":
            assert report.ratio > 2
    assert texts[0] == texts[1]
    assert len(texts[0]) == 70
