"""KVSharer: dissimilar layers share one cache.

Yang et al. 2024, arXiv:2410.18517.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvc.errors import ArtifactError, ConfigError


@dataclass(frozen=True, slots=True)
class KVSharer:
    """Which layers read the cache of which: `5:1,7:3`, or a JSON file with the key `map`."""

    map: str = ""

    def __post_init__(self) -> None:
        """Reads the map.

        Raises:
            ConfigError: if there is none, or a sharer's owner is not an earlier layer.
            ArtifactError: if its file cannot be read.
        """
        if not self.map:
            raise ConfigError(
                "kvsharer: expected a map from sharers to owners, got none; "
                "set kvsharer.map=5:1,7:3 or the path of a JSON file"
            )
        for sharer, owner in self.pairs().items():
            if not 0 <= owner < sharer:
                raise ConfigError(
                    f"kvsharer: a layer shares with an earlier one, got {sharer}:{owner}"
                )

    def pairs(self) -> dict[int, int]:
        """Owner by sharer, as written."""
        if not self.map.endswith(".json"):
            try:
                pairs = [entry.split(":") for entry in self.map.split(",")]
                return {int(sharer): int(owner) for sharer, owner in pairs}
            except ValueError:
                raise ConfigError(
                    f"kvsharer: expected a map such as 5:1,7:3, got {self.map!r}"
                ) from None
        try:
            owners = json.loads(Path(self.map).read_text(encoding="utf-8"))["map"]
            return {i: int(owner) for i, owner in enumerate(owners) if int(owner) != i}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"kvsharer: cannot read the map {self.map}: {error}") from None

    def owners(self, n_layers: int) -> tuple[int, ...]:
        """The owner of each layer, chains followed to their end.

        Raises:
            ConfigError: if the map names a layer that the model has not.
        """
        pairs = self.pairs()
        if pairs and max(pairs) >= n_layers:
            raise ConfigError(
                f"kvsharer: the map names layer {max(pairs)}, the model has {n_layers} layers"
            )
        owners: list[int] = []
        for layer in range(n_layers):
            owner = pairs.get(layer, layer)
            owners.append(owners[owner] if owner < layer else layer)
        return tuple(owners)
