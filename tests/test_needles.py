"""Needles by kind, count, length and depth: where they lie, what counts as right, who forgets."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import kvc
import kvc.demo
from kvc.measure.facts import Planted, plant
from kvc.measure.needles import DEPTHS, KINDS, grids, needles
from kvc.text import split_start
from tests.run_cli import need_backend

LENGTH = 320


@pytest.fixture(scope="module")
def engine() -> Any:
    need_backend("cpu")
    return kvc.load_engine("cpu", str(kvc.demo.path()))


@pytest.fixture(scope="module")
def text(engine: Any) -> Any:
    story = (kvc.demo.path() / "text.txt").read_text(encoding="utf-8")
    return np.asarray(split_start(engine, engine.encode(story))[1], np.int32)


def test_facts_lie_at_the_depths_that_were_asked_for(engine: Any, text: Any) -> None:
    depths = np.array([[0.1, 0.5, 0.9], [0.8, 0.2, 0.4]])
    found = plant(engine, [text], 2, LENGTH, 3, depths=depths)
    expected = np.sort(depths)[:, ::-1]  # the one told last is asked for first
    assert abs(found.depths - expected).max() < 0.1  # the facts themselves take room


def test_one_name_has_many_numbers(engine: Any, text: Any) -> None:
    found = plant(engine, [text], 3, LENGTH, 4, one_name=True)
    for row in found.ids:
        facts = re.findall(r" The code of (\w+) is (\d{4})\.", engine.tokenizer.decode(row))
        assert len(facts) == 8
        assert len({name for name, _ in facts}) == 1
        assert len({number for _, number in facts}) == 4


def test_of_many_values_any_that_is_left_is_right() -> None:
    row = [1, 2, 3, 1, 5, 6, 7, 8, 9]  # the numbers 123, 156 and 789 in three questions
    planted = Planted(np.array([row]), 0, np.zeros((1, 3)), np.array([0, 3, 6]), 3, one_name=True)
    best = np.array([[[7, 5, 3], [1, 2, 6], [1, 8, 9]]])
    # 7 begins 789, and 15 goes on as 156; at the second question 123 is told already
    expected = [[[True, False, True], [True, False, True], [False, True, True]]]
    expected[0][0][1] = True
    assert planted.right(best).tolist() == expected
    apart = planted._replace(one_name=False)
    assert apart.right(best).tolist() == [
        [[False, False, True], [True, False, True], [False, True, True]]
    ]


def test_contexts_of_three_lengths_and_all_kinds(engine: Any, text: Any) -> None:
    found = grids(engine, [text], 4, 2048)
    assert [(grid.length, grid.kind) for grid in found] == [
        (length, kind) for length in (512, 1024, 2048) for kind, _ in KINDS
    ]
    assert [grid.length for grid in grids(engine, [text], 1, LENGTH)] == [LENGTH] * len(KINDS)
    for grid in found:
        assert grid.planted.ids.shape == (4, grid.length)
        depths = grid.planted.depths
        assert set((depths * DEPTHS).astype(int).ravel()) == set(range(DEPTHS))
    again = grids(engine, [text], 4, 2048)
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a.planted.ids, b.planted.ids)


def test_a_full_cache_recalls_and_a_small_one_forgets(engine: Any, text: Any) -> None:
    found = grids(engine, [text], 4, LENGTH)
    asked = {(kind, facts): 4 * facts for kind, facts in KINDS}
    share = {}
    for name, settings in (("none", {}), ("streaming", {"heavy": 2, "recent": 40})):
        seen: list[tuple[int, int]] = []
        cells = needles(
            engine,
            found,
            kvc.parse(name, settings),
            on_step=lambda *now: seen.append(now),  # noqa: B023
        )
        for which, n in asked.items():
            assert sum(cell.asked for cell in cells if (cell.kind, cell.facts) == which) == n
        for cell in cells:
            assert 0 <= cell.exact <= cell.asked
            assert cell.exact / cell.asked <= cell.digits <= 1
            assert 0 < cell.distance[0] <= cell.distance[1] < LENGTH
            far, near = (LENGTH * (1 - depth) for depth in cell.depth)
            assert near - 60 < cell.distance[0] <= cell.distance[1] < far + 60
        share[name] = sum(cell.digits * cell.asked for cell in cells) / sum(asked.values())
        dones = [done for done, _ in seen]
        assert dones == sorted(dones)
        assert dones[-1] <= seen[-1][1]
    assert share["none"] > 0.9  # guessing: 0.1
    assert share["streaming"] < 0.6
