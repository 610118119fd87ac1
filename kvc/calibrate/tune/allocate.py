"""Bits for each layer's keys and values under a budget of bytes: a knapsack with choices.

Each item (a layer's keys, or its values) takes one of several widths, with bytes and a loss. Losses
of different items add up, as those of small independent errors do. All sums that are not beaten in
both are kept, item by item, so that what is found at a number of bytes is the least loss there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvc.ops.quant import Role

BITS = (2, 4, 8)
STEPS = 4096  # numbers of bytes that are told apart, where more come up

Item = tuple[int, Role]  # the model's number of a layer, and keys or values
Bits = Mapping[Item, int]


class Width(NamedTuple):
    """One of the choices that an item has."""

    bits: int
    nbytes: int
    loss: float


class Plan(NamedTuple):
    """A width for every item. `picks` holds the last item's, and before it those of the others."""

    nbytes: int
    loss: float
    picks: tuple[Item, int, object] | None

    @property
    def bits(self) -> dict[Item, int]:
        """The width of every item."""
        found: dict[Item, int] = {}
        at = self.picks
        while at is not None:
            item, bits, before = at
            found[item] = bits
            at = before  # type: ignore[assignment]
        return dict(sorted(found.items()))


def plans(items: Mapping[Item, Sequence[Width]], fixed: int = 0) -> list[Plan]:
    """All plans that no other beats in bytes and loss, the smallest first.

    Args:
        items: The widths that each may take.
        fixed: Bytes that are held whatever the widths.
    """
    front = [Plan(fixed, 0.0, None)]
    for item, widths in items.items():
        sums = [
            Plan(plan.nbytes + width.nbytes, plan.loss + width.loss, (item, width.bits, plan.picks))
            for plan in front
            for width in widths
        ]
        front = _thin(_undominated(sums))
    return front


def best_within(front: Sequence[Plan], budget: float) -> Plan | None:
    """The plan of least loss that has at most so many bytes; None if all have more."""
    return max((plan for plan in front if plan.nbytes <= budget), default=None)


def _undominated(sums: list[Plan]) -> list[Plan]:
    kept: list[Plan] = []
    for plan in sorted(sums, key=lambda plan: (plan.nbytes, plan.loss)):
        if not kept or plan.loss < kept[-1].loss:
            kept.append(plan)
    return kept


def _thin(front: list[Plan]) -> list[Plan]:
    """At most `STEPS` plans: of those whose bytes are nearly equal the one of least loss."""
    if len(front) <= STEPS:
        return front
    low, high = front[0].nbytes, front[-1].nbytes
    best: dict[int, Plan] = {}
    for plan in front:  # losses fall, so that the last one of a step is its best
        best[(plan.nbytes - low) * (STEPS - 1) // (high - low)] = plan
    return [front[0], *(plan for step, plan in best.items() if step)]


def settings_of(bits: Bits) -> dict[str, str]:
    """The same as `gear.k_bits`, `gear.v_bits` and `gear.layer_bits` take it.

    What most layers have is said once.
    """
    layers = sorted({layer for layer, _ in bits})
    pairs = {layer: (bits[layer, "k"], bits[layer, "v"]) for layer in layers}
    (k_bits, v_bits), _ = Counter(pairs.values()).most_common(1)[0]
    entries: list[str] = []
    run: list[int] = []
    for layer, following in zip(layers, [*layers[1:], -1], strict=True):
        pair = pairs[layer]
        if pair == (k_bits, v_bits):
            continue
        run.append(layer)
        if following != layer + 1 or pairs[following] != pair:
            span = f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}"
            entries.append(f"{span}:{pair[0]}/{pair[1]}")
            run = []
    found = {"gear.k_bits": str(k_bits), "gear.v_bits": str(v_bits)}
    return found | ({"gear.layer_bits": ",".join(entries)} if entries else {})
