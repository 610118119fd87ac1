"""States in files: whatever a cache has come to, the one from its file goes on as it would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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


@pytest.mark.parametrize("name", ["none", "gear", "h2o", "minicache+gear"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_rows_behind_padding_go_on(narrow: list[Any], name: str, at: int, tmp_path: Path) -> None:
    import torch

    engine, path = narrow[0], tmp_path / "x.kvc"
    ids = torch.tensor(engine.encode(PROMPT)[:180]).reshape(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :25], mask[2, :4] = 0, 0
    cuts = [0, 20, 50, 51, 52, 53, 58, 59, 60]

    def step(cache: Any, i: int) -> Any:
        with torch.no_grad():
            return engine.model(
                ids[:, cuts[i] : cuts[i + 1]], attention_mask=mask[:, : cuts[i + 1]],
                past_key_values=cache, use_cache=True,
            ).logits[:, -1]  # fmt: skip

    cache = engine.make_cache(method_of(name, engine.shape, tmp_path, **SMALL))
    for i in range(at):
        step(cache, i)
    kvc.save_cache(cache, path, ids[:, : cuts[at]].tolist(), model=engine.model)
    again, held = kvc.load_cache(engine.model, path)
    assert held == ids[:, : cuts[at]].tolist()
    for i in range(at, len(cuts) - 1):
        np.testing.assert_allclose(step(again, i), step(cache, i), rtol=1e-4, atol=1e-4)
    assert counts(engine, again) == counts(engine, cache)
