"""End to end: MLX and PyTorch give the same greedy tokens with every preset and every pair.

`backend_table` measures; `python -m tests.backend_table` prints its figures for any model.
"""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvc.demo
from kvc.backends.base import ops_of
from kvc.errors import ConfigError
from kvc.methods import PRESETS, parse
from kvc.ops.codec import encode
from kvc.ops.quant import grouped, ungrouped, unpack_tokens
from kvc.ops.residual import Seed
from tests.backend_table import NAMES, PROMPT, compare, engines, method_of
from tests.conftest import need
from tests.tolerances import LOGITS

STREAMED = ("none", "kivi", "gear", "h2o", "less", "minicache+gear", "kvsharer+gear2")
# names of which each alone works, and why two of them do not go together
REFUSED = {
    ("minicache", "kvsharer"): "both fill the seam layout",
    ("minicache", "streaming"): "evict or merge, not both",
    ("minicache", "h2o"): "evict or merge, not both",
    ("minicache", "tova"): "evict or merge, not both",
    ("minicache", "less"): "evict or merge, not both",
}


@pytest.fixture(scope="module")
def bundled() -> list[Any]:
    """The bundled model on both libraries."""
    for library in ("torch", "mlx"):
        need(library)
    return engines(str(kvc.demo.path()))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A random model with heads of 8 channels and no groups of query heads, on both libraries."""
    for library in ("torch", "mlx"):
        need(library)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        initializer_range=0.15,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved["rope_theta"] = 10000.0  # where mlx-lm looks for it
    (folder / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    for file in kvc.demo.path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return engines(str(folder))


def check(row: Any) -> None:
    """Same tokens; the same logits, but where a code fell on the other side of a tie."""
    assert row.tokens, row
    assert row.off <= LOGITS["coded" if row.n_codes else "exact"] or row.flips, row


@pytest.mark.parametrize("name", NAMES)
def test_same_tokens(bundled: list[Any], name: str, tmp_path: Path) -> None:
    check(compare(bundled, method_of(name, bundled[0].shape, tmp_path), "exact", 40))


@pytest.mark.parametrize("name", STREAMED)
def test_same_tokens_from_a_streamed_prompt(bundled: list[Any], name: str, tmp_path: Path) -> None:
    check(compare(bundled, method_of(name, bundled[0].shape, tmp_path), "stream", 16))


@pytest.mark.parametrize("name", NAMES)
def test_narrow_heads(narrow: list[Any], name: str, tmp_path: Path) -> None:
    settings = {"gear.group_size": "8", "gear.buffer": "16"}
    method = method_of(name, narrow[0].shape, tmp_path, **settings)
    check(compare(narrow, method, "exact", 20, PROMPT[:400]))


@pytest.mark.parametrize("name", ["kivi", "kcvt", "token"])
def test_codes_differ_on_ties_alone(bundled: list[Any], name: str) -> None:
    """Where two backends' codes of one prompt differ, a number lay between two levels."""
    codec = parse(name).codec
    assert codec is not None
    caches = [engine.make_cache(parse("none")) for engine in bundled]
    for engine, cache in zip(bundled, caches, strict=True):
        list(engine.stream(engine.encode(PROMPT), cache, max_tokens=1))
    stores = [engine.store(cache) for engine, cache in zip(bundled, caches, strict=True)]
    flips = 0
    for layer, role in product(range(bundled[0].shape.n_layers), ("k", "v")):
        tensors = [store.dense(layer)["kv".index(role)][:, :, :192] for store in stores]
        spec = codec.spec(role, 192, tensors[0].shape[3])
        found = [encode(x, spec, rank=0, outliers=0, n_iter=1, seed=Seed(0, 0, 0)) for x in tensors]
        codes = [
            np.asarray(
                ops_of(x).to_numpy(unpack_tokens(code.d.codes, spec.bits, role, 64, 0, 192))
            ).astype(int)
            for x, code in zip(tensors, found, strict=True)
        ]
        x, step, low = (
            t.numpy().astype(np.float64) for t in (tensors[0], found[0].d.step, found[0].d.low)
        )
        z, _ = grouped(x, role, spec.backbone, spec.group_size)
        z = ungrouped((z - low) / step, x.shape, role, spec.backbone)
        at = codes[0] != codes[1]
        flips += int(at.sum())
        assert (np.abs(codes[0] - codes[1])[at] == 1).all()
        assert (np.abs(z[at] % 1 - 0.5) < 2e-3).all()
    assert flips < 20  # of 393,216


def test_every_pair_works_or_says_why() -> None:
    """Of any two presets: two on one seam, a pair of the table, or refused with the reason."""
    given = {"kvsharer.map": "7:3"}
    for a in PRESETS:
        for b in PRESETS:
            settings = {k: v for k, v in given.items() if k.split(".")[0] in (a, b)}
            if "none" in (a, b) or f"{a}+{b}" in NAMES or f"{b}+{a}" in NAMES:
                parse(f"{a}+{b}", settings)
                continue
            reason = REFUSED.get((a, b)) or REFUSED.get((b, a))
            with pytest.raises(ConfigError, match=reason or "both fill the seam|preset token"):
                parse(f"{a}+{b}", settings)
