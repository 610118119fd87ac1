"""States in files: whatever a cache has come to, the one from its file goes on as it would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvc
from tests.backend_table import PROMPT, method_of
from tests.cache_table import feed
from tests.test_backends_agree import narrow
from tests.test_cache_faults import state

__all__ = ["narrow"]  # a fixture

SMALL = {"gear.group_size": "8", "gear.buffer": "16"}
STEPS = (40, 30, 1, 1, 1, 5, 1, 20, 1, 1)  # tokens of each; mlx-lm sends a prompt's last one alone
KEPT = 6  # steps after which a cache is written


@pytest.mark.parametrize("prefill", ["exact", "stream"])
@pytest.mark.parametrize("name", ["gear", "h2o", "tova", "minicache+gear", "kvsharer"])
def test_every_phase_goes_on(narrow: list[Any], name: str, prefill: str, tmp_path: Path) -> None:
    method = method_of(name, narrow[0].shape, tmp_path, **SMALL)
    ids = narrow[0].encode(PROMPT)
    parts = [ids[sum(STEPS[:i]) : sum(STEPS[: i + 1])] for i in range(len(STEPS))]
    for writer, reader in (narrow, narrow[::-1]):
        cache = writer.make_cache(method, prefill)
        expected = []
        for i, part in enumerate(parts):
            expected.append(feed(writer, cache, part))
            if i < KEPT:
                held = ids[: sum(STEPS[: i + 1])]
                kvc.save_cache(cache, tmp_path / f"{i}.kvc", held, model=writer.model)
        # behind one more piece of a prompt mlx-lm's way is to wait for its last token
        for i in range(writer.name == "cpu", KEPT):
            again, held = kvc.load_cache(reader.model, tmp_path / f"{i}.kvc")
            assert len(held) == sum(STEPS[: i + 1])
            got = [feed(reader, again, part) for part in parts[i + 1 :]]
            assert got == expected[i + 1 :], i
            assert counts(reader, again) == counts(writer, cache)


def counts(engine: Any, cache: Any) -> dict[str, Any]:
    """All counts and phases, but for what the libraries do each in their way."""
    return {key: x for key, x in state(engine, cache)[0].items() if key != "lone_tail"}
