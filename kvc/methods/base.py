"""A method as a value: at most one part for each seam, in the order share, merge, evict, code."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from kvc.backends.base import ALONE, ModelShape, Shard
from kvc.errors import ConfigError
from kvc.files import check_model, sharers
from kvc.methods.gear import Gear
from kvc.methods.kvsharer import KVSharer
from kvc.methods.less import Less
from kvc.methods.minicache import MiniCache
from kvc.methods.part import Part


@dataclass(frozen=True, slots=True)
class Method:
    """What fills each seam; `name` is as the user wrote it."""

    name: str = field(default="none", compare=False)
    layout: KVSharer | MiniCache | None = None
    memory: Less | None = None
    codec: Gear | None = None
    # the model's numbers of the layers that the store has, set by `check`
    numbers: tuple[int, ...] = field(default=(), compare=False)
    # which of the model's heads this process has; set by `check`
    shard: Shard = field(default=ALONE, compare=False)
    # fingerprint of the only model that it is for, if it was tuned for one
    model: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Refuses parts that make no sense together.

        Raises:
            ConfigError: with the reason.
        """
        for part in self.parts:
            for other in self.parts:
                if why := part.conflict(other):
                    raise ConfigError(f"{self.name}: {why}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that there are."""
        found: list[Part | None] = [self.layout, self.memory, self.codec]
        return tuple(part for part in found if part is not None)

    def __add__(self, other: Part | Method) -> Method:
        """The method that does both.

        Raises:
            ConfigError: if both fill one seam, or make no sense together.
        """
        other = method_of(other) if isinstance(other, Part) else other
        for f in fields(self):
            mine, its = getattr(self, f.name), getattr(other, f.name)
            if f.compare and mine is not None and its is not None:
                raise clash(self.name, other.name, f.name)
        return Method(
            f"{self.name}+{other.name}",
            self.layout or other.layout,
            self.memory or other.memory,
            self.codec or other.codec,
        )

    def check(self, shape: ModelShape) -> Method:
        """The same method with what depends on the model: budgets in tokens, layer numbers.

        Raises:
            ConfigError: if the method and the model do not go together.
            ArtifactError: if a profile, a map or kernels were made for another model, or the
                kernels were trained under another map.
        """
        if self.model:
            check_model(self.model, shape.fingerprint, self.name)
        numbers = shape.full_layers
        if self.codec:
            self.codec.check(shape.head_dim)
            self.codec.check_layers(numbers)
        layout = self.layout
        if isinstance(layout, MiniCache) and not layout.pairs(len(numbers)):
            raise ConfigError(
                f"{self.name}: expected two layers to merge behind the start, got a model with "
                f"{len(numbers)} layers that keep all tokens; set minicache.start=0 or leave it out"
            )
        if (
            isinstance(layout, MiniCache)
            and layout.granularity == "token"
            and shape.shard.count > 1
        ):
            raise ConfigError(
                f"{self.name}: expected one direction for each head where {shape.shard.count} "
                "processes share a model's heads, got granularity=token; set "
                "minicache.granularity=head"
            )
        shared: dict[int, int] = {}
        if isinstance(layout, KVSharer):
            layout = layout.check(shape)
            shared = sharers(layout.owners(shape.n_layers))
        memory = self.memory and self.memory.check(shape, shared)
        return replace(self, layout=layout, memory=memory, numbers=numbers, shard=shape.shard)

    @property
    def evicts(self) -> bool:
        """Whether tokens go for good; then attention must come to the store, as handles do."""
        return self.memory is not None

    def owners(self, n_layers: int) -> tuple[int, ...]:
        """The layer whose cache each layer reads."""
        if isinstance(self.layout, KVSharer):
            return self.layout.owners(n_layers, self.numbers)
        return tuple(range(n_layers))

    def pairs(self, n_layers: int) -> tuple[tuple[int, int], ...]:
        """The pairs of layers that are merged."""
        return self.layout.pairs(n_layers) if isinstance(self.layout, MiniCache) else ()


def method_of(part: Part) -> Method:
    """The method that is one part alone."""
    return Method(part.section, **{part.seam: part})  # type: ignore[arg-type]


def clash(a: str, b: str, seam: str) -> ConfigError:
    """The error of two methods on one seam."""
    return ConfigError(f"{a} and {b} both fill the seam {seam}; take one")
