"""Recall by kind, count, length of the context and depth, as needle and RULER tests ask for it.

Hsieh et al. 2024, arXiv:2404.06654: a single needle; many with different keys; many values of one
key, any of which may be named first. Needles are facts in passages of any text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Engine
from kvc.measure.divergence import CHUNK
from kvc.measure.facts import Planted, plant
from kvc.measure.recall import ask
from kvc.methods import Method

# And facts in a context.
KINDS = (("single", 1), ("multi-key", 2), ("multi-key", 8), ("multi-value", 4))
DEPTHS = 4  # equal parts of the context
SHORTEST = 512  # tokens of a context that is not the longest


class Grid(NamedTuple):
    """Contexts of one kind and length."""

    kind: str
    length: int
    planted: Planted


class Cell(NamedTuple):
    """Recall of facts of one kind, told at one depth of contexts of one length."""

    kind: str
    facts: int  # in a context
    context: int  # tokens
    depth: tuple[float, float]  # share of the context before the telling
    distance: tuple[int, int]  # the least and the most tokens from telling to question
    asked: int
    exact: int  # of which every token was right
    digits: float  # share of right tokens


def grids(
    engine: Engine, texts: Sequence[NDArray[Any]], n: int, length: int, seed: int = 0
) -> list[Grid]:
    """Contexts of a quarter, a half and all of `length` tokens, `n` of each kind and length.

    Lone facts take turns in the parts of the context; many are spread over all of it.

    Raises:
        ConfigError: If the facts do not fit, or the texts are too short.
    """
    found = []
    lengths = [x for x in (length // 4, length // 2) if x >= SHORTEST]
    for size in (*lengths, length):
        for kind, F in KINDS:
            rng = np.random.default_rng([seed, size, F])
            first = np.arange(n)[:, None] / n if F == 1 else np.arange(F)[None] / F
            depths = first + rng.random((n, F)) / (n if F == 1 else F)
            one = kind == "multi-value"
            planted = plant(engine, texts, n, size, F, seed, depths=depths, one_name=one)
            found.append(Grid(kind, size, planted))
    return found


def needles(
    engine: Engine,
    found: Sequence[Grid],
    method: Method,
    *,
    prefill: str = "exact",
    on_step: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Asks for all facts of all contexts through the cache; see `kvc.measure.recall.ask`.

    Args:
        engine: The model.
        found: From `grids`.
        method: How the cache is compressed.
        prefill: How contexts are compressed, `exact` or `stream`.
        on_step: Called with the tokens fed so far, and how many there are.

    Raises:
        KVCError: If a probability is no number.
    """
    total = sum(grid.planted.ids.size for grid in found)
    cells, before = list[Cell](), 0
    for grid in found:
        planted = grid.planted

        def tell(done: int, _: int, before: int = before) -> None:
            if on_step is not None:
                on_step(before + done, total)

        answers = ask(engine, planted, method, prefill=prefill, chunk=CHUNK, on_step=tell)
        before += planted.ids.size
        for part in range(DEPTHS):
            low, high = part / DEPTHS, (part + 1) / DEPTHS
            inside = (planted.depths >= low) & (planted.depths < high)
            if inside.any():
                right, distances = answers.right[inside], planted.distances[inside]
                cells.append(
                    Cell(
                        grid.kind,
                        planted.told.shape[1],
                        grid.length,
                        (low, high),
                        (int(distances.min()), int(distances.max())),
                        len(right),
                        int(right.all(-1).sum()),
                        float(right.mean()),
                    )
                )
    return cells
