"""Profiles of `kvc tune`: JSON with a method for one model, and what it was measured to cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvc.errors import ArtifactError
from kvc.files.header import (
    PROFILE,
    check_header,
    check_sum,
    checksum,
    header_of,
    reason,
    write_whole,
)


class ProfileFile(NamedTuple):
    """A method and its settings, as `kvc.methods.parse` takes them, and how they were found.

    Attributes:
        method: Presets joined by `+`.
        settings: By `section.key`.
        model: Fingerprint of the model that it was tuned for.
        measured: `context` (tokens), `dtype` (of the cache), `nbytes`, `dense_bytes`, `ratio`,
            `bytes_per_token`, `fixed_bytes`, and `quality`.
        front: What was measured and is best at its bytes, the smallest first.
        config: What was asked for.
        calibration: SHA-256 of the tokens that it was tuned on.
        version: Of the kvc that wrote it.
    """

    method: str
    settings: dict[str, str]
    model: str
    measured: dict[str, Any]
    front: list[dict[str, Any]]
    config: dict[str, Any]
    calibration: str
    version: str = ""


def write_profile(path: str | Path, profile: ProfileFile) -> None:
    """Write a profile, whole or not at all.

    Raises:
        ArtifactError: If the file cannot be written.
    """
    data = {
        **header_of(PROFILE, profile.model, profile.calibration),
        "method": profile.method,
        "settings": dict(profile.settings),
        "measured": profile.measured,
        "front": profile.front,
        "config": profile.config,
    }
    data["checksum"] = checksum(json.loads(json.dumps(data)))
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())


def read_profile(path: str | Path) -> ProfileFile:
    """Read a profile; whether its method is one is for `kvc.methods.parse` to say.

    Raises:
        ArtifactError: If the file is missing, damaged, of another kind or of a newer format.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read it: {reason(error)}") from None
    except (ValueError, RecursionError) as error:  # of bytes that are no UTF-8 too
        raise ArtifactError(
            f"{path}: expected a profile as JSON, got none: {reason(error)}"
        ) from None
    if not isinstance(data, dict):
        raise ArtifactError(
            f"{path}: expected a profile as a JSON object, got {type(data).__name__}"
        )
    types: Mapping[str, type] = {
        "method": str,
        "settings": dict,
        "measured": dict,
        "front": list,
        "config": dict,
    }
    check_header(path, data, PROFILE, types)
    check_sum(path, data)
    return ProfileFile(
        data["method"],
        {key: str(value) for key, value in data["settings"].items()},
        data["model"],
        data["measured"],
        data["front"],
        data["config"],
        data["calibration"],
        data["version"],
    )
