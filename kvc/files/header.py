"""What files made for a model have in common: a header, a checksum, writing whole or not at all.

The checksum is over the content, not the bytes: white space in JSON may change, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np

from kvc.errors import ArtifactError
from kvc.version import __version__

FORMAT = 1
MAP, KERNELS, PROFILE, CACHE = "kvsharer-map", "less-kernels", "profile", "cache"
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def header_of(kind: str, fingerprint: str, calibration: str) -> dict[str, Any]:
    """What every file begins with; its content and its checksum are to be added."""
    return {
        "format": FORMAT,
        "kind": kind,
        "model": fingerprint,
        "version": __version__,
        "calibration": calibration,
    }


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Any] = _NOTHING) -> str:
    """SHA-256 of a header, as it is read back, and of tensors: names, dtypes, shapes and bytes.

    Args:
        header: All keys count but `checksum` itself.
        tensors: NumPy arrays by name.
    """
    digest = hashlib.sha256(canonical({k: x for k, x in header.items() if k != "checksum"}))
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(canonical([name, x.dtype.name, list(x.shape)]))
        digest.update(np.ascontiguousarray(x, x.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def canonical(data: Any) -> bytes:
    """JSON that is the same for the same content."""
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def check_header(
    path: str | Path, header: Mapping[str, Any], kind: str, expected: Mapping[str, type]
) -> None:
    """Compare a header with what a file of a kind has; the format first, a newer one may differ.

    Args:
        path: For the message.
        header: As read.
        kind: `MAP`, `KERNELS`, `PROFILE` or `CACHE`.
        expected: The types of the keys that only this kind has.

    Raises:
        ArtifactError: If something is missing, or not what it should be.
    """
    found = header.get("format", FORMAT) if "kind" in header else FORMAT  # others have formats too
    if not re.fullmatch(r"\d{1,9}", str(found), re.ASCII):
        raise ArtifactError(f"{path}: expected format {FORMAT}, got {found!r}")
    if int(found) > FORMAT:
        raise ArtifactError(
            f"{path}: expected format {FORMAT} or older, got {found}; upgrade kvc to read it"
        )
    if header.get("kind", kind) != kind:
        raise ArtifactError(f"{path}: expected a {kind}, got {header['kind']!r}")
    common = {"kind": str, "model": str, "version": str, "calibration": str}
    types = {**common, **expected, "checksum": str}
    if missing := [key for key in ("format", *types) if key not in header]:
        raise ArtifactError(
            f"{path}: this is no {kind} file of kvc: it has no {', '.join(missing)}"
        )
    for key, wanted in types.items():
        if not isinstance(header[key], wanted):
            raise ArtifactError(f"{path}: {key}: expected a {wanted.__name__}, got {header[key]!r}")


def check_sum(
    path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Any] = _NOTHING
) -> None:
    """Compare what was read with the checksum in its header.

    Raises:
        ArtifactError: If they differ.
    """
    if (found := checksum(header, tensors)) != header["checksum"]:
        raise ArtifactError(
            f"{path}: the file is damaged: its checksum is {header['checksum'][:12]!r}..., that of "
            f"its content {found[:12]!r}...; get it or make it again"
        )


def check_model(artifact: str, model: str, path: str | Path) -> None:
    """Compare the fingerprints of a file and of the model that it is to serve.

    Raises:
        ArtifactError: If they differ.
    """
    if artifact != model:
        raise ArtifactError(
            f"{path}: expected a file made for this model, {model}, got one for {artifact!r}; "
            "make one for this model"
        )


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file under another name and rename it, so that nobody ever sees a part of it.

    Raises:
        ArtifactError: If that fails; what was there before stays.
    """
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece, which gets its name when all of it is on the disk.

    Raises:
        ArtifactError: If that fails; what was there before stays.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot write it: {reason(error)}") from None
    finally:
        with suppress(OSError):
            part.unlink()


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file or folder"
    return getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
