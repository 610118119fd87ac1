"""What `kvc info` says a method costs is what the specified formulas say."""

from __future__ import annotations

from typing import Any

import pytest

from kvc.backends.base import FULL, ModelShape
from kvc.measure.memory import Cost, cost_table
from kvc.methods import PRESETS
from tests.oracles import gear, less
from tests.oracles.gear_cache import role_bytes

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
    assert "expected a map" in table["kvsharer"].note
    assert "expected the learned maps" in table["less"].note
