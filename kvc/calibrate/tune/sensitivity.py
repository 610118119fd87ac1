"""How much each layer's keys and values bear: one at a time in few bits, all others in eight.

What a layer's few bits cost is measured with one kind of code. Other kinds are better or worse in
all layers: for those all keys together, and all values, are measured, and shared out among layers
as with the first kind. That is 4 measurements for a layer and 4 for a kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from kvc.calibrate.tune.allocate import BITS, Bits, Item, Plan, Width, plans
from kvc.calibrate.tune.quality import Level, Quality
from kvc.calibrate.tune.sizes import Sizes
from kvc.calibrate.tune.space import Kind
from kvc.measure.choice import read_choice
from kvc.methods import parse
from kvc.ops.quant import Role

ROLES: tuple[Role, ...] = ("k", "v")
FEW, MOST = BITS[:-1], BITS[-1]


class Sensitivity:
    """Losses in nats for a token, of a model with one layout.

    Args:
        quality: Measures.
        sizes: Measures bytes.
        level: How much is read for each.
        first: The kind that is measured layer by layer.
        layout: `kvsharer`, or nothing.
    """

    def __init__(
        self, quality: Quality, sizes: Sizes, level: Level, first: Kind, layout: str = ""
    ) -> None:
        self.quality, self.sizes, self.level, self.first = quality, sizes, level, first
        self.layout = layout
        self.layers = sizes.owners(parse(first.name, first.settings))
        self._kinds: dict[Kind, Mapping[tuple[Role, int], float]] = {}  # by kind

    def of(self, kind: Kind) -> Sensitivity:
        """The same with another kind measured layer by layer; what is known of kinds stays."""
        found = Sensitivity(self.quality, self.sizes, self.level, kind, self.layout)
        found._kinds = self._kinds
        return found

    @cached_property
    def of_layout(self) -> float:
        """What the layout costs without any code."""
        return self.quality(read_choice(self.layout), self.level).kl if self.layout else 0.0

    @cached_property
    def by_layer(self) -> dict[tuple[Item, int], float]:
        """What few bits of one layer's keys or values cost."""
        most = self._most
        return {
            (item, bits): self._loss(self.first, {**most, item: bits})
            for item in most
            for bits in FEW
        }

    def of_kind(self, kind: Kind) -> Mapping[tuple[Role, int], float]:
        """What few bits of all layers' keys, or values, cost."""
        if kind not in self._kinds:
            self._kinds[kind] = {
                (role, bits): self._loss(
                    kind, {item: bits if item[1] == role else MOST for item in self._most}
                )
                for role in ROLES
                for bits in FEW
            }
        return self._kinds[kind]

    def plans(self, kind: Kind) -> list[Plan]:
        """Bits for every layer that no others beat, with bytes and loss of the whole cache."""
        total = self.of_kind(kind.root or kind)
        sizes, codec, least = self.sizes, kind.codec, BITS[0]
        base = sizes.layer(codec, least, least)
        items = {}
        for layer in self.layers:
            for role in ROLES:
                widths = []
                for bits in BITS:
                    pair = (bits, least) if role == "k" else (least, bits)
                    nbytes = sizes.layer(codec, *pair) - base
                    widths.append(Width(bits, nbytes, self._share((layer, role), bits, total)))
                items[layer, role] = widths
        found = plans(items, base * len(self.layers))
        return [plan._replace(loss=plan.loss + self.of_layout) for plan in found]

    def _share(self, item: Item, bits: int, total: Mapping[tuple[Role, int], float]) -> float:
        """A layer's part of what all layers' bits cost; nothing at the most bits."""
        if bits == MOST:
            return 0.0
        role = item[1]
        parts = {layer: max(self.by_layer[(layer, role), bits], 0.0) for layer in self.layers}
        everything = sum(parts.values())
        part = parts[item[0]] / everything if everything else 1 / len(parts)
        return part * max(total[role, bits], 0.0)

    @property
    def _most(self) -> dict[Item, int]:
        """Eight bits for everything."""
        return {(layer, role): MOST for layer in self.layers for role in ROLES}

    def _loss(self, kind: Kind, bits: Bits) -> float:
        """What a kind costs beyond the layout."""
        return self.quality(kind.with_bits(bits), self.level).kl - self.of_layout
