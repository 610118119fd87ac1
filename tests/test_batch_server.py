"""mlx-lm's server with compressed caches: requests that come together are batched."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="the mlx backend needs mlx")
pytest.importorskip("mlx_lm", reason="the mlx backend needs mlx-lm")

import kvc
import kvc.demo
from kvc.backends.mlx.engine import load
from kvc.backends.mlx.rows import KVCRows
from kvc.methods import parse
from tests.settings import lossy
from tests.test_serving import Server

TEXTS = (
    "The old man walked down to the harbour, and the boats lay still. He looked at",
    "The sea was calm that night, and",
    "Once upon a time there was a king who had three daughters, and he said to them",
)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step of a layer had."""
    seen: list[int] = []
    update: Callable[..., Any] = KVCRows.update_and_fetch

    def watched(self: KVCRows, *args: Any) -> Any:
        seen.append(len(self.stores))
        return update(self, *args)

    monkeypatch.setattr(KVCRows, "update_and_fetch", watched)
    return seen


def test_requests_that_come_together_are_batched(rows: list[int]) -> None:
    method = parse("gear", lossy(16)["gear"])
    engine = load(kvc.demo.path(), dtype="float32")
    expected = []
    for text in TEXTS:
        ids, cache = engine.encode(text), engine.make_cache(method)
        expected.append("".join(p.text for p in engine.stream(ids, cache, max_tokens=16)))
    server = Server(lambda model: kvc.make_cache(model, method))
    try:
        with ThreadPoolExecutor(3) as clients:
            got = [answer for answer, _ in clients.map(server.ask, TEXTS)]
    finally:
        server.close()
    assert [text.strip() for text in got] == [text.strip() for text in expected]
    assert max(rows) > 1
