"""KVSharer: dissimilar layers share one cache.

Yang et al. 2024, arXiv:2410.18517. A map m names the layer whose cache each layer reads: m(i) <= i
and m(m(i)) = m(i). An owner reads its own, m(i) = i; a sharer stores nothing, m(i) < i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from kvc.backends.base import ModelShape
from kvc.errors import ArtifactError, ConfigError
from kvc.files import MAP, MapFile, bundled_maps, check_model, map_text, read_map
from kvc.hub import locate
from kvc.methods.part import Part


@dataclass(frozen=True)
class KVSharer(Part):
    """Which layers read the cache of which: `5:1,7:3`, or a JSON file, or where the hub has one.

    Numbers are the model's, all its layers counted. The map is read once. Without one `check` takes
    that of the bundled maps for the model whose share is nearest.
    """

    seam: ClassVar[str] = "layout"
    section: ClassVar[str] = "kvsharer"

    map: str = ""
    share: float = 0.25  # of the layers, that store nothing; where no map is named

    def __post_init__(self) -> None:
        """Reads the map, if one is named.

        Raises:
            ConfigError: If a layer's owner is a later layer, or the share is no fraction.
            ArtifactError: If its file is missing, damaged, or says of no model.
        """
        if not 0 < self.share < 1:
            raise ConfigError(
                f"kvsharer: share must be a fraction of the layers, above 0 and below 1, got "
                f"{self.share}"
            )
        for layer, owner in self.pairs.items() if self.map else ():
            if not 0 <= owner <= layer:
                raise ConfigError(
                    f"kvsharer: a layer shares with an earlier one, got {layer}:{owner}"
                )

    @cached_property
    def file(self) -> MapFile | None:
        """The file's contents, if the map is one."""
        named = self.map.endswith(".json") or "/" in self.map
        return read_map(locate(self.map, (MAP,))) if named else None

    @cached_property
    def pairs(self) -> dict[int, int]:
        """Owner by layer, as written; layers that are not named own theirs.

        Raises:
            ConfigError: If the map is neither a file nor such a text, or there is none.
            ArtifactError: If its file cannot be had.
        """
        if not self.map:
            raise ConfigError(
                "kvsharer: expected a map from sharers to owners, got none; "
                "set kvsharer.map=5:1,7:3 or the path of a JSON file"
            )
        if self.file:
            return {i: owner for i, owner in enumerate(self.file.owners) if owner != i}
        try:
            entries = [entry.split(":") for entry in self.map.split(",")]
            pairs = {int(layer): int(owner) for layer, owner in entries}
        except ValueError:
            raise ConfigError(
                f"kvsharer: expected a map such as 5:1,7:3, got {self.map!r}"
            ) from None
        if len(pairs) < len(entries):
            raise ConfigError(f"kvsharer: expected one owner for a layer, got two in {self.map!r}")
        return pairs

    def check(self, shape: ModelShape) -> KVSharer:
        """The same map, or a bundled one, which needs no file any more.

        Raises:
            ArtifactError: If the map's file was made for another model.
            ConfigError: If the model has no such layers, or one of them keeps a window only; or if
                no map is named and none is bundled.
        """
        if not self.map:
            return replace(self, map=self._bundled(shape)).check(shape)
        if self.file:
            check_model(self.file.model, shape.fingerprint, self.map)
            if len(self.file.owners) != shape.n_layers:
                raise ArtifactError(
                    f"{self.map}: expected a map of {shape.n_layers} layers, got one of "
                    f"{len(self.file.owners)}"
                )
        self._check_layers(shape.n_layers)
        if len(shape.layer_kinds) != shape.n_layers:
            raise ConfigError(
                f"kvsharer: expected a cache for every layer, got {len(shape.layer_kinds)} for "
                f"{shape.n_layers} layers: this {shape.family} model shares caches already"
            )
        kept = shape.full_layers
        sharing = {layer for pair in self.pairs.items() if pair[0] != pair[1] for layer in pair}
        if others := sharing - {*kept}:
            raise ConfigError(
                "kvsharer: expected layers that keep all tokens "
                f"({', '.join(map(str, kept))}), got layer {min(others)} with "
                f"{shape.layer_kinds[min(others)]}"
            )
        return replace(self, map=map_text(self.pairs) or "0:0")

    def _bundled(self, shape: ModelShape) -> str:
        """The path of the bundled map for a model whose share is nearest; the smaller of two."""
        maps = bundled_maps(shape.fingerprint).items()
        shares: dict[str, float] = {path: file.config["share"] for path, file in maps}
        if not shares:
            raise ConfigError(
                f"kvsharer: expected a map for this model, {shape.fingerprint}, found none; make "
                "one with kvc search kvsharer --model MODEL --text FILE, or set "
                "kvsharer.map=5:1,7:3 or to a file"
            )
        off = {path: round(abs(share - self.share), 9) for path, share in shares.items()}
        return min(off, key=lambda path: (off[path], shares[path]))

    def owners(self, n_layers: int, numbers: Sequence[int] = ()) -> tuple[int, ...]:
        """The owner of each of the store's layers, by the store's numbers; chains are followed.

        Args:
            n_layers: How many layers the store has.
            numbers: The model's numbers of them; by default the store has all layers.

        Raises:
            ConfigError: If the map names a layer that the model has not.
        """
        numbers = numbers or range(n_layers)
        self._check_layers(numbers[-1] + 1)
        place = {layer: n for n, layer in enumerate(numbers)}
        owners: list[int] = []
        for n, layer in enumerate(numbers):
            owner = place[self.pairs.get(layer, layer)]
            owners.append(owners[owner] if owner < n else n)
        return tuple(owners)

    def _check_layers(self, n_layers: int) -> None:
        if (last := max(self.pairs, default=0)) >= n_layers:
            raise ConfigError(
                f"kvsharer: the map names layer {last}, the model has {n_layers} layers"
            )
