"""What a cache holds, in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvc.store.slot import Slot


@dataclass(frozen=True, slots=True)
class Report:
    """Bytes of a cache; `ratio` is the dense cache's over its own."""

    nbytes: int
    dense_bytes: int
    ratio: float
    # codes, scales, low rank, outliers; directions, norms, retained, thresholds; kept, positions,
    # scores, queries, state; window: tokens as they came; slack: room that nothing uses yet
    parts: dict[str, int]
    layers: list[int]  # bytes by layer of the store; 0 for a layer that reads another's
    kinds: list[str] = field(default_factory=list)  # what each of the model's layers keeps


def measure(slots: Iterable[Slot], n_layers: int, dense_bytes: int) -> Report:
    """The report of a store's slots."""
    parts: Counter[str] = Counter()
    layers = [0] * n_layers
    for slot in slots:
        for layer, (name, x, slack) in slot.parts():
            unused = slack() if callable(slack) else slack
            parts[name] += x.nbytes - unused
            parts["slack"] += unused
            layers[layer] += x.nbytes
    total = sum(layers)
    ratio = dense_bytes / total if total else 1.0
    return Report(total, dense_bytes, ratio, {k: v for k, v in parts.items() if v}, layers)
