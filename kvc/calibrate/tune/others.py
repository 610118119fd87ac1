"""Methods that a search measures as they are: presets, merged layers, and eviction where asked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from kvc.calibrate.tune.quality import Level, Quality
from kvc.calibrate.tune.sizes import Sizes
from kvc.calibrate.tune.space import Kind, choice_of, takes
from kvc.measure.choice import Choice, read_choice
from kvc.methods import PRESETS, Less, MiniCache, parse

WIDTHS = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))  # of merged layers' keys and values
KEPT = (64, 128)  # tokens at which an evicting method's bytes are measured


def others(
    sizes: Sizes,
    quality: Quality,
    level: Level,
    presets: Sequence[str],
    kinds: Sequence[Kind],
    budget: float,
    bound: float,
) -> Iterator[Choice]:
    """What has at most so many bytes.

    Args:
        sizes: Measures bytes.
        quality: Measures whether merging is worth a closer look.
        level: How much is read for that.
        presets: Names that may be used.
        kinds: Codes that merged layers are joined with.
        budget: Bytes.
        bound: KL that others reached: what loses more without any code is left out.
    """
    for name in presets:
        if not takes(sizes.shape, parse(name)):
            continue
        kind = PRESETS[name][0]
        if kind is Less:
            yield from evicting(sizes, name, budget)
        elif kind is not MiniCache or quality(read_choice(name), level).kl < bound:
            if sizes.of(parse(name)) <= budget:
                yield read_choice(name)
            if kind is MiniCache:
                yield from merging(sizes, name, kinds, budget)


def merging(sizes: Sizes, name: str, kinds: Sequence[Kind], budget: float) -> Iterator[Choice]:
    """Merged layers whose directions are coded, in the most bits that fit."""
    for kind in kinds:
        if kind.layout:
            continue
        joined = Kind(f"{name}+{kind.name}", kind.settings)
        choices = (joined.uniform(*widths) for widths in WIDTHS)
        if fits := next((c for c in choices if sizes.of(c.method) <= budget), None):
            yield fits


def evicting(sizes: Sizes, name: str, budget: float) -> Iterator[Choice]:
    """An evicting preset that keeps as many tokens as fit, as they came and in 4 bits."""
    for text in (name, f"{name}+token"):
        few, many = (sizes.of(_keeping(text, n).method) for n in KEPT)
        token = (many - few) / (KEPT[1] - KEPT[0])
        n = min(KEPT[0] + int((budget - few) / token), sizes.context)
        if n > 1:  # buffers grow in steps, so that the line may end above the budget
            n -= max(0, math.ceil((sizes.of(_keeping(text, n).method) - budget) / token))
        if n > 1 and sizes.of(_keeping(text, n).method) <= budget:
            yield _keeping(text, n)


def _keeping(text: str, n: int) -> Choice:
    policy = parse(text).memory
    assert policy is not None
    budget = Less.of_budget(policy.policy, n)
    return choice_of(text, {"less.heavy": f"{budget.heavy:g}", "less.recent": f"{budget.recent:g}"})
