"""End to end: MLX and PyTorch give the same greedy tokens with every preset and every pair.

`backend_table` measures; `python -m tests.backend_table` prints its figures for any model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import kvc.demo
from kvc.errors import ConfigError
from kvc.methods import PRESETS, parse
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
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in kvc.demo.path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return engines(str(folder))


def check(row: Any) -> None:
    """Same tokens; the same logits, but where a code fell on the other side of a tie."""
    assert row.tokens, row
    assert row.off <= LOGITS["coded" if row.n_codes else "exact"] or row.flips, row


@pytest.mark.parametrize("name", NAMES)
def test_same_tokens(bundled: list[Any], name: str, tmp_path: Path) -> None:
    check(compare(bundled, method_of(name, bundled[0].shape, tmp_path), "exact", 48))


@pytest.mark.parametrize("name", STREAMED)
def test_same_tokens_from_a_streamed_prompt(bundled: list[Any], name: str, tmp_path: Path) -> None:
    check(compare(bundled, method_of(name, bundled[0].shape, tmp_path), "stream", 24))


@pytest.mark.parametrize("name", NAMES)
def test_narrow_heads(narrow: list[Any], name: str, tmp_path: Path) -> None:
    settings = {"gear.group_size": "8", "gear.buffer": "16"}
    method = method_of(name, narrow[0].shape, tmp_path, **settings)
    check(compare(narrow, method, "exact", 24, PROMPT[:400]))


def test_every_pair_works_or_says_why() -> None:
    """Of any two presets: two on one seam, a pair of the table, or refused with the reason."""
    given = {"kvsharer.map": "7:3", "less.kernels": "maps.safetensors"}
    for a in PRESETS:
        for b in PRESETS:
            settings = {k: v for k, v in given.items() if k.split(".")[0] in (a, b)}
            if "none" in (a, b) or f"{a}+{b}" in NAMES or f"{b}+{a}" in NAMES:
                parse(f"{a}+{b}", settings)
                continue
            reason = REFUSED.get((a, b)) or REFUSED.get((b, a))
            with pytest.raises(ConfigError, match=reason or "both fill the seam|preset token"):
                parse(f"{a}+{b}", settings)
