"""Maps of KVSharer: JSON that names the owner of each of a model's layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvc.errors import ArtifactError
from kvc.files.header import MAP, check_header, check_sum, checksum, header_of, reason, write_whole


class MapFile(NamedTuple):
    """A map of layers to owners."""

    owners: tuple[int, ...]  # of each of the model's layers
    model: str  # its fingerprint
    config: dict[str, Any]
    calibration: str  # SHA-256 of the data, or empty
    note: str = ""
    version: str = ""  # of the kvc that wrote it


def write_map(
    path: str | Path,
    owners: Sequence[int],
    fingerprint: str,
    config: Mapping[str, Any],
    calibration: str = "",
    note: str = "",
) -> None:
    """Write a map, whole or not at all.

    Raises:
        ArtifactError: If the file cannot be written.
    """
    data = {
        **header_of(MAP, fingerprint, calibration),
        "map": list(owners),
        "config": dict(config),
        **({"note": note} if note else {}),
    }
    read_back = json.loads(json.dumps(data))  # JSON has neither tuples nor keys that are numbers
    data["checksum"] = checksum(read_back)
    write_whole(path, (json.dumps(data) + "\n").encode())


def read_map(path: str | Path) -> MapFile:
    """Read a map and check that every layer reads an earlier one or itself.

    Raises:
        ArtifactError: If the file is missing, damaged, of another kind or of a newer format.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read it: {reason(error)}") from None
    except (ValueError, RecursionError) as error:  # of bytes that are no UTF-8 too
        raise ArtifactError(f"{path}: expected a map as JSON, got none: {reason(error)}") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: expected a map as a JSON object, got {type(data).__name__}")
    check_header(path, data, MAP, {"map": list, "config": dict})
    check_sum(path, data)
    check_owners(path, data["map"])
    return MapFile(
        tuple(data["map"]),
        data["model"],
        data["config"],
        data["calibration"],
        str(data.get("note", "")),
        data["version"],
    )


def check_owners(path: str | Path, owners: Sequence[Any]) -> None:
    """Check that every layer reads an earlier one or itself.

    Raises:
        ArtifactError: If one does not.
    """
    for i, owner in enumerate(owners):
        if type(owner) is not int or not 0 <= owner <= i:
            raise ArtifactError(
                f"{path}: expected the owner of layer {i} to be one of 0 to {i}, got {owner!r}"
            )


def sharers(owners: Sequence[int]) -> dict[int, int]:
    """Owner by layer, of the layers that read another one's cache; chains are followed."""
    ends: list[int] = []
    for i, owner in enumerate(owners):
        ends.append(ends[owner] if owner < i else i)
    return {i: owner for i, owner in enumerate(ends) if owner != i}


def map_text(pairs: Mapping[int, int]) -> str:
    """Owner by layer as `kvsharer.map` takes it, such as `5:1,7:3`."""
    return ",".join(f"{layer}:{owner}" for layer, owner in pairs.items())
