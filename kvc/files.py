"""Files made for one model: maps of KVSharer (JSON) and kernels of LESS (safetensors).

Both name the format, the kind, the model's fingerprint, what made them, and the calibration data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvc.errors import ArtifactError
from kvc.ops.evict import Kernels

FORMAT = 1
MAP, KERNELS = "kvsharer-map", "less-kernels"

# The sizes of a layer's tensors in `Kernels`, by letters that stand for the same number.
_SHAPES = {
    "a1": ("Hq", "D", "M"),
    "a2": ("Hq", "M", "R"),
    "b1": ("H", "D", "M"),
    "b2": ("H", "M", "R"),
    "b3": ("H", "R", "R"),
    "s1": ("H", "R"),
    "s2": ("H", "R"),
}
_DTYPES = ("F16", "F32", "F64")


class MapFile(NamedTuple):
    """A map of layers to owners."""

    owners: tuple[int, ...]  # of each of the model's layers
    model: str  # its fingerprint
    config: dict[str, Any]
    calibration: str  # SHA-256 of the data, or empty
    note: str = ""


class KernelsFile(NamedTuple):
    """LESS kernels as NumPy arrays, by the model's number of the layer."""

    layers: dict[int, Kernels]
    model: str  # its fingerprint
    config: dict[str, Any]
    calibration: str  # SHA-256 of the data, or empty


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
        "format": FORMAT,
        "kind": MAP,
        "model": fingerprint,
        "map": list(owners),
        "config": dict(config),
        "calibration": calibration,
        **({"note": note} if note else {}),
    }
    write_whole(path, (json.dumps(data) + "\n").encode())


def read_map(path: str | Path) -> MapFile:
    """Read a map and check that every layer reads an earlier one or itself.

    Raises:
        ArtifactError: If the file is missing, damaged, of another kind or of a newer format.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read it: {_why(error)}") from None
    except ValueError as error:  # of bytes that are no UTF-8 too
        raise ArtifactError(f"{path}: expected a map as JSON, got none: {_why(error)}") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: expected a map as a JSON object, got {type(data).__name__}")
    _check_header(path, data, MAP, {"map": list, "config": dict, "calibration": str})
    owners = data["map"]
    for i, owner in enumerate(owners):
        if type(owner) is not int or not 0 <= owner <= i:
            raise ArtifactError(
                f"{path}: expected the owner of layer {i} to be one of 0 to {i}, got {owner!r}"
            )
    note = str(data.get("note", ""))
    return MapFile(tuple(owners), data["model"], data["config"], data["calibration"], note)


def write_kernels(
    path: str | Path,
    kernels: Mapping[int, Kernels],
    fingerprint: str,
    config: Mapping[str, Any],
    calibration: str = "",
) -> None:
    """Write kernels of NumPy arrays, by the model's number of the layer, whole or not at all.

    Raises:
        ArtifactError: If the file cannot be written.
    """
    tensors = {
        _tensor(layer, field): np.ascontiguousarray(x)
        for layer, fields in kernels.items()
        for field, x in fields._asdict().items()
    }
    header = {
        "format": str(FORMAT),
        "kind": KERNELS,
        "model": fingerprint,
        "config": json.dumps(dict(config)),
        "calibration": calibration,
    }
    write_whole(path, save(tensors, header))


def read_kernels(path: str | Path) -> KernelsFile:
    """Read kernels and check that their shapes fit each other.

    Raises:
        ArtifactError: If the file is missing, damaged, of another kind or of a newer format.
    """
    try:
        with safe_open(path, "numpy") as file:
            header = dict(file.metadata() or {})
            _check_header(path, header, KERNELS, {"config": str, "calibration": str})
            names = list(file.keys())
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                    known = ", ".join(_DTYPES)
                    raise ArtifactError(f"{path}: {name}: expected numbers of {known}, got {dtype}")
            tensors = {name: file.get_tensor(name) for name in names}
        config = json.loads(header["config"])
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read it: {_why(error)}") from None
    except SafetensorError as error:
        raise ArtifactError(
            f"{path}: expected kernels as safetensors, got none: {_why(error)}"
        ) from None
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: expected its config as JSON: {_why(error)}") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: config: expected a JSON object, got {config!r}")
    layers = sorted({int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))})
    kernels = {layer: _kernels(path, tensors, layer) for layer in layers or (0,)}
    return KernelsFile(kernels, header["model"], config, header["calibration"])


def check_model(artifact: str, model: str, path: str | Path) -> None:
    """Compare the fingerprints of a file and of the model that it is to serve.

    Raises:
        ArtifactError: If they differ.
    """
    if artifact != model:
        raise ArtifactError(
            f"{path}: expected a file made for this model, {model}, got one for {artifact}; "
            "make one for this model"
        )


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file under another name and rename it, so that nobody ever sees a part of it.

    Raises:
        ArtifactError: If that fails; what was there before stays.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot write it: {_why(error)}") from None
    finally:
        with suppress(OSError):
            part.unlink()


def _check_header(
    path: str | Path, header: Mapping[str, Any], kind: str, expected: Mapping[str, type]
) -> None:
    """Format first: a newer one may have other keys."""
    found = header.get("format", FORMAT)
    if not str(found).isdecimal():
        raise ArtifactError(f"{path}: expected format {FORMAT}, got {found!r}")
    if int(found) > FORMAT:
        raise ArtifactError(
            f"{path}: expected format {FORMAT} or older, got {found}; upgrade kvc to read it"
        )
    if header.get("kind", kind) != kind:
        raise ArtifactError(f"{path}: expected a {kind}, got a {header['kind']}")
    types = {"kind": str, "model": str, **expected}
    if missing := [key for key in ("format", *types) if key not in header]:
        raise ArtifactError(
            f"{path}: this is no {kind} file of kvc: it has no {', '.join(missing)}"
        )
    for key, wanted in types.items():
        if not isinstance(header[key], wanted):
            raise ArtifactError(f"{path}: {key}: expected a {wanted.__name__}, got {header[key]!r}")


def _kernels(path: str | Path, tensors: Mapping[str, Any], layer: int) -> Kernels:
    """One layer's kernels; each letter of their shapes stands for the number it met first."""
    found: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for field, letters in _SHAPES.items():
        name = _tensor(layer, field)
        if name not in tensors:
            raise ArtifactError(f"{path}: expected a tensor {name}, got none")
        x = found[field] = tensors[name]
        if len(letters) == x.ndim:
            for letter, size in zip(letters, x.shape, strict=True):
                sizes.setdefault(letter, size)
        expected = tuple(sizes.get(letter, letter) for letter in letters)
        if expected != x.shape:
            raise ArtifactError(
                f"{path}: {name}: expected the shape {list(expected)}, got {list(x.shape)}"
            )
    if sizes["Hq"] % sizes["H"]:
        raise ArtifactError(
            f"{path}: layer {layer}: expected query heads by the group, got {sizes['Hq']} for "
            f"{sizes['H']} key/value heads"
        )
    return Kernels(**found)


def _tensor(layer: int, field: str) -> str:
    return f"layers.{layer}.{field.upper() if field[0] in 'ab' else field}"


def _why(error: Exception) -> str:
    """The first line of what an error says."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file or folder"
    return getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
