"""What `kvc info` says a method costs is what the specified formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvc import demo
from kvc.backends.base import FULL, ModelShape
from kvc.files import write_kernels, write_map
from kvc.measure.memory import Cost, cost_table
from kvc.methods import PRESETS
from kvc.ops.evict import Kernels
from tests.oracles import gear, less
from tests.oracles.gear_cache import role_bytes
from tests.oracles.less_features import random_weights

L, HQ, H, D, E, CONTEXT = 5, 4, 2, 64, 2, 4096
KINDS = (FULL, "sliding_attention") * L  # layers with a window cost what they cost anyway
VARIANTS: dict[str, dict[str, Any]] = {
    "kivi": {"variant": "quant"},
    "gear-l": {"variant": "gear_l"},
    "gear-s": {"variant": "gear_s"},
    "gear": {"variant": "gear"},
    "kcvt": {"variant": "quant", "backbone": "kcvt", "k_bits": 4, "v_bits": 4},
    "token": {"variant": "quant", "backbone": "token", "k_bits": 4, "v_bits": 4},
    "gear2": {"variant": "gear_l", "k_bits": 4, "buffer": 128, "tile": 128, "scales": "dual"},
}


@pytest.fixture(scope="module")
def table() -> dict[str, Cost]:
    shape = ModelShape("llama", 2 * L, HQ, H, D, 1000, CONTEXT, E, KINDS)
    return {cost.method: cost for cost in cost_table(shape)}


def test_every_preset_has_a_row(table: dict[str, Cost]) -> None:
    assert list(table) == list(PRESETS)
    assert table["none"].bytes_per_token == L * 2 * H * D * E
    assert table["none"].ratio == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_codecs_cost_their_formula(table: dict[str, Cost], name: str) -> None:
    settings = gear.Settings(**VARIANTS[name])
    rank = 2 if name == "gear2" else settings.prefill_rank
    total = {}
    for n in (512, 1024):
        parts = (role_bytes(role, n, H, D, settings, rank, E, E) for role in ("k", "v"))
        total[n] = sum(sum(part.values()) for part in parts)
    slope = L * (total[1024] - total[512]) / 512
    assert table[name].bytes_per_token == slope
    assert table[name].ratio == L * 2 * H * D * E / slope


@pytest.mark.parametrize(
    ("name", "policy", "budget"),
    [("h2o", "h2o", 2 * int(0.025 * CONTEXT)), ("tova", "tova", int(0.05 * CONTEXT)),
     ("streaming", "sink", 4 + int(0.049 * CONTEXT))],
)  # fmt: skip
def test_evicting_caches_have_one_size(
    table: dict[str, Cost], name: str, policy: str, budget: int
) -> None:
    assert table[name].bytes_per_token == 0
    assert table[name].ratio is None
    assert table[name].fixed_bytes == L * sum(less.nbytes(H, D, budget, 0, policy, E).values())


def test_pairs_of_layers_save_a_third_of_themselves(table: dict[str, Cost]) -> None:
    """Of five layers the upper pair shares its directions; norms and originals cost something."""
    assert 1 < table["minicache"].ratio < 5 / 4  # type: ignore[operator]


def test_what_cannot_be_priced_says_why(table: dict[str, Cost]) -> None:
    assert "kvc search kvsharer" in table["kvsharer"].note
    assert "kvc train less" in table["less"].note


def test_learned_parts_are_priced_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ModelShape("llama", 4, HQ, H, D, 1000, CONTEXT, E, (FULL,) * 4)
    maps = random_weights(HQ, H, D, hidden=8, rank=4, seed=0, s1=0.05)
    config = {"policy": "h2o", "heavy": 102, "recent": 102}
    write_map(tmp_path / "kvsharer-25.json", [0, 1, 2, 0], shape.fingerprint, {"share": 0.25})
    write_kernels(
        tmp_path / "less-h2o-5.safetensors",
        {layer: Kernels(**vars(maps)) for layer in range(4)},
        shape.fingerprint,
        config,
    )
    monkeypatch.setattr(demo, "path", lambda: tmp_path)
    found = {cost.method: cost for cost in cost_table(shape)}
    assert found["kvsharer"].bytes_per_token == 3 * 2 * H * D * E
    assert found["kvsharer"].ratio == 4 / 3
    assert found["kvsharer"].note == "with the map 3:0"
    size = sum(less.nbytes(H, D, 2 * int(0.025 * CONTEXT), 4, "h2o", E).values())
    assert found["less"].fixed_bytes == 4 * size
    assert found["less"].note == "with less-h2o-5.safetensors"
