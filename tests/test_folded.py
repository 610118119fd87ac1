"""Products with coded tokens are those with the decoded ones, on every backend."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvc.methods import Gear
from kvc.ops import folded
from kvc.ops.attention import attend_coded, attend_dense
from kvc.store.coded import Coded
from tests.tolerances import TOLERANCES

B, H, R, D = 2, 2, 3, 64
FIELDS: dict[str, dict[str, Any]] = {
    "kivi": {"group_size": 32, "buffer": 32},
    "groups of 8": {"group_size": 8, "buffer": 8},
    "kcvt": {"backbone": "kcvt"},
    "token": {"backbone": "token", "group_size": 32},
    "dual": {"scales": "dual", "rotate": "hadamard", "buffer": 32, "group_size": 32},
}
PARTS = {"plain": {"rank": 0, "outliers": 0.0}, "gear": {"rank": 2, "outliers": 0.1}}


def draw(xp: ModuleType, *shape: int, seed: int = 0) -> Any:
    kind = "float64" if xp.name == "numpy" else "float32"
    return xp.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(kind))


def coded(xp: ModuleType, role: Any, gear: Gear, blocks: tuple[int, ...]) -> Coded:
    past = Coded(gear, role, 0)
    for i, n in enumerate(blocks):
        past.append(draw(xp, B, H, n, D, seed=i), gear.rank)
    return past


def close(xp: ModuleType, got: Any, want: Any) -> None:
    rtol, _ = TOLERANCES["float64" if xp.name == "numpy" else "float32"]
    want = xp.to_numpy(want)
    np.testing.assert_allclose(xp.to_numpy(got), want, rtol=0, atol=10 * rtol * np.abs(want).max())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_products_are_those_of_decoded_tokens(
    xp: ModuleType, fields: dict[str, Any], parts: dict[str, Any], bits: int
) -> None:
    gear = Gear(bits=bits, **{**fields, **parts})
    k, v = (coded(xp, role, gear, (64, 64, 96, 32)) for role in ("k", "v"))
    q = draw(xp, B, H, R, D, seed=9)
    for start, stop in ((0, 256), (0, 64), (64, 128), (3, 5), (60, 131), (130, 250)):
        p = draw(xp, B, H, R, stop - start, seed=10)
        close(xp, k.scores(q, start, stop), q @ k.read(start, stop).swapaxes(-1, -2))
        close(xp, v.sums(p, start, stop), p @ v.read(start, stop))


@pytest.mark.parametrize("n", [1, 7, 20, 65])
def test_blocks_of_any_length(xp: ModuleType, n: int) -> None:
    gear = Gear(backbone="kcvt", rank=0, outliers=0.0)
    k, v = (coded(xp, role, gear, (n, n)) for role in ("k", "v"))
    q, p = draw(xp, B, H, R, D, seed=9), draw(xp, B, H, R, 2 * n, seed=10)
    close(xp, k.scores(q, 0, 2 * n), q @ k.read(0, 2 * n).swapaxes(-1, -2))
    close(xp, v.sums(p, 0, 2 * n), p @ v.read(0, 2 * n))


def test_nothing_is_decoded_that_folds(xp: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gear = Gear(outliers=0.0)
    k, v = (coded(xp, role, gear, (64, 64)) for role in ("k", "v"))
    q = draw(xp, B, 2 * H, 1, D)
    want = attend_dense(q, k.read(0, 128), v.read(0, 128), 0.125)

    def never(*args: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(folded, "decode", never)
    got = attend_coded(q, k, v, 0.125)
    close(xp, got.out, want.out)
    close(xp, got.lse, want.lse)
