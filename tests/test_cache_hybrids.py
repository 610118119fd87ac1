"""Cache files of models some of whose layers keep a window, or a state of one size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvc
from kvc.errors import CacheFileError
from kvc.methods import parse
from tests.cache_faults import joined, seal
from tests.conftest import need
from tests.families import BLOCKS, library

METHOD = parse("kivi", BLOCKS)
FAMILIES = {
    "torch": ("gemma3_text", "gemma4_text", "gpt_oss", "qwen3_next", "llama4_text"),
    "mlx": ("gemma3_text", "gemma4_text", "gpt_oss", "qwen3_next", "llama4_text", "lfm2"),
}
LENGTHS = (5, 7, 8, 30)  # of texts, with a window of 8


def logits(model: Any, cache: Any, ids: list[int]) -> Any:
    """The last logits [V] of tokens behind those in a cache."""
    if isinstance(cache, list):
        import mlx.core as mx

        return np.array(model(mx.array([ids]), cache=cache)[0, -1])
    import torch

    with torch.no_grad():
        return (
            model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1].numpy()
        )


def goes_on(writer: Any, reader: Any, n: int, path: Path, step: int = 1) -> tuple[Any, Any]:
    """Logits of some steps behind `n` tokens, and of the same behind the file of those."""
    cache, ids = kvc.make_cache(writer, METHOD), [(7 * i + 3) % 150 for i in range(n + 6)]
    for part in (ids[: n - 2], ids[n - 2 : n - 1], ids[n - 1 : n]):
        logits(writer, cache, part)
    kvc.save_cache(cache, path, ids[:n], model=writer)
    again, held = kvc.load_cache(reader, path)
    assert held == ids[:n]
    rest = [ids[i : i + step] for i in range(n, n + 6, step)]
    return tuple(
        np.stack([logits(model, x, part) for part in rest])
        for model, x in ((writer, cache), (reader, again))
    )


@pytest.mark.parametrize(("name", "family"), [(n, f) for n, fs in FAMILIES.items() for f in fs])
def test_the_same_library_goes_on(name: str, family: str, tmp_path: Path) -> None:
    need(name)
    model = library(name).model(family)
    for n in LENGTHS:
        for step in (1, 3):
            expected, got = goes_on(model, model, n, tmp_path / "x.kvc", step)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small model with sliding windows, on both libraries."""
    for name in ("torch", "mlx"):
        need(name)
    from mlx_lm.utils import load_model

    folder = tmp_path_factory.mktemp("gemma")
    model = library("torch").model("gemma3_text")
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for kind, name in (("full", "rope_theta"), ("sliding", "rope_local_base_freq")):
        config[name] = config["rope_parameters"][f"{kind}_attention"]["rope_theta"]
    config["sliding_window_pattern"] = 2  # where mlx-lm looks for these
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model, load_model(folder)[0]


def test_what_only_one_library_knows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.kvc"
    for name in ("torch", "mlx"):
        need(name)
        goes_on(library(name).model("qwen3_next"), library(name).model("qwen3_next"), 8, path)
        other = {"torch": "mlx-lm", "mlx": "transformers"}[name]
        forged(path, f" of {other}")
        with pytest.raises(CacheFileError, match=r"layers\.0\.kind: expected 'linear_attention of"):
            kvc.load_cache(library(name).model("qwen3_next"), path)


def forged(path: Path, library: str) -> None:
    """The file as if another library had written its states."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    table, body = json.loads(data[8 : 8 + n]), data[8 + n :]
    meta = table["__metadata__"]
    meta["state"] = re.sub(r" of (mlx-lm|transformers)", library, meta["state"])
    meta["checksum"] = seal(table, body)
    path.write_bytes(joined(table, body))


@pytest.mark.parametrize("n", LENGTHS)
def test_windows_go_from_one_library_to_the_other(
    gemma: tuple[Any, Any], n: int, tmp_path: Path
) -> None:
    for writer, reader in (gemma, gemma[::-1]):
        expected, got = goes_on(writer, reader, n, tmp_path / "x.kvc")
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
