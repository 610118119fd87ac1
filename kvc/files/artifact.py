"""Every kind of file: read by what it is, explained, and found beside the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvc import demo
from kvc.errors import ArtifactError
from kvc.files.header import KERNELS, MAP, PROFILE, reason
from kvc.files.kernels import KernelsFile, read_kernels
from kvc.files.maps import MapFile, read_map, sharers
from kvc.files.profile import ProfileFile, read_profile

Artifact = MapFile | KernelsFile | ProfileFile


def read_artifact(path: str | Path) -> Artifact:
    """Read a file as a map, as kernels or as a profile, by what it is.

    Raises:
        ArtifactError: If it is missing, damaged, none of them, or of a newer format.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read it: {reason(error)}") from None
    # safetensors begin with the length of a JSON object in 8 bytes, of which the last is 0
    if head[7:] == b"\0{" or Path(path).suffix == ".safetensors":
        return read_kernels(path)
    return read_profile(path) if _is_profile(path) else read_map(path)


def _is_profile(path: str | Path) -> bool:
    """Whether a file says so; one that says nothing is left to the reader of maps."""
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("kind") == PROFILE


def bundled_kernels(fingerprint: str) -> dict[str, KernelsFile]:
    """Kernels for a model beside the bundled one, by path.

    Raises:
        ArtifactError: If one of the files there is damaged.
    """
    files = {str(p): read_kernels(p) for p in sorted(demo.path().glob("less-*.safetensors"))}
    return {path: file for path, file in files.items() if file.model == fingerprint}


def bundled_maps(fingerprint: str) -> dict[str, MapFile]:
    """Maps for a model beside the bundled one, by path.

    Raises:
        ArtifactError: If one of the files there is damaged.
    """
    files = {str(p): read_map(p) for p in sorted(demo.path().glob("kvsharer-*.json"))}
    return {path: file for path, file in files.items() if file.model == fingerprint}


def facts(artifact: Artifact) -> dict[str, Any]:
    """What a reader wants to know of a file, ready for JSON.

    Kernels: the numbers of their `layers`; all values of `rank`, `hidden` and `dtype`, of which
    there is one but in a file of merged parts; the number of `parameters` and their `bytes`; and
    `sharers`, the map that they were trained under. Maps: the number of `layers`; `sharers`, the
    owner by layer; the `share` of layers that store nothing; the `ratio` of a full cache to this.
    Profiles: the `method` and its `settings`, and what is `measured`; the `front`.
    """
    common = {
        "kind": kind_of(artifact),
        "model": artifact.model,
        "version": artifact.version,
        "calibration": artifact.calibration,
        "config": artifact.config,
    }
    if isinstance(artifact, ProfileFile):
        return {
            **common,
            "method": artifact.method,
            "settings": artifact.settings,
            "measured": artifact.measured,
            "front": artifact.front,
        }
    if isinstance(artifact, MapFile):
        n, shared = len(artifact.owners), sharers(artifact.owners)
        return {
            **common,
            "note": artifact.note,
            "layers": n,
            "sharers": shared,
            "share": len(shared) / n if n else 0.0,
            "ratio": n / (n - len(shared)) if n else 1.0,
        }
    layers = artifact.layers
    return {
        **common,
        "layers": list(layers),
        "sharers": artifact.sharers,
        "rank": _distinct(k.s1.shape[-1] for k in layers.values()),
        "hidden": _distinct(k.a1.shape[-1] for k in layers.values()),
        "dtype": _distinct(x.dtype.name for k in layers.values() for x in k),
        "parameters": sum(x.size for k in layers.values() for x in k),
        "bytes": sum(x.nbytes for k in layers.values() for x in k),
    }


def kind_of(artifact: Artifact) -> str:
    """What a file's header calls it."""
    kinds = {KernelsFile: KERNELS, MapFile: MAP, ProfileFile: PROFILE}
    return kinds[type(artifact)]


def _distinct(values: Iterable[Any]) -> list[Any]:
    return sorted(set(values))
