"""Kernels of LESS: safetensors with seven tensors for each layer, and a header in its metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvc.errors import ArtifactError
from kvc.files.header import (
    KERNELS,
    check_header,
    check_sum,
    checksum,
    header_of,
    reason,
    write_whole,
)
from kvc.files.maps import check_owners, sharers
from kvc.ops.evict import Kernels

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


class KernelsFile(NamedTuple):
    """LESS kernels as NumPy arrays, by the model's number of the layer."""

    layers: dict[int, Kernels]
    model: str  # its fingerprint
    config: dict[str, Any]
    calibration: str  # SHA-256 of the data, or empty
    version: str = ""  # of the kvc that wrote it

    @property
    def sharers(self) -> dict[int, int]:
        """Owner by layer in the map that they were trained under, `config["map"]`."""
        return sharers(self.config.get("map") or ())


def write_kernels(
    path: str | Path,
    kernels: Mapping[int, Kernels],
    fingerprint: str,
    config: Mapping[str, Any],
    calibration: str = "",
) -> None:
    """Write kernels of NumPy arrays, by the model's number of the layer, whole or not at all.

    Args:
        path: A `.safetensors` file.
        kernels: In float16, float32 or float64.
        fingerprint: Of the model.
        config: What made them. Some keys have a meaning: `policy`, `heavy` and `recent` (tokens)
            find the bundled kernels that are nearest to a method; `map` is the list of owners that
            layers had in training, if they shared caches.
        calibration: SHA-256 of the data.

    Raises:
        ArtifactError: If the file cannot be written.
    """
    tensors = {
        _tensor(layer, field): np.ascontiguousarray(x)
        for layer, fields in kernels.items()
        for field, x in fields._asdict().items()
    }
    header = header_of(KERNELS, fingerprint, calibration)
    header |= {"format": str(header["format"]), "config": json.dumps(dict(config))}
    header["checksum"] = checksum(header, tensors)
    write_whole(path, _in_order(save(tensors, header)))


def _in_order(data: bytes) -> bytes:
    """The same safetensors with its metadata sorted: the library's order is another each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:end])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_kernels(path: str | Path) -> KernelsFile:
    """Read kernels and check that their shapes fit each other.

    Raises:
        ArtifactError: If the file is missing, damaged, of another kind or of a newer format.
    """
    try:
        with safe_open(path, "numpy") as file:
            header = dict(file.metadata() or {})
            check_header(path, header, KERNELS, {"config": str})
            names = list(file.keys())
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                    known = ", ".join(_DTYPES)
                    raise ArtifactError(
                        f"{path}: {name!r}: expected numbers of {known}, got {dtype}"
                    )
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read it: {reason(error)}") from None
    except SafetensorError as error:
        raise ArtifactError(
            f"{path}: expected kernels as safetensors, got none: {reason(error)}"
        ) from None
    check_sum(path, header, tensors)
    config = _config(path, header["config"])
    layers = sorted(
        {int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d{1,6})\.", name))}
    )
    kernels = {layer: _kernels(path, tensors, layer) for layer in layers or (0,)}
    return KernelsFile(kernels, header["model"], config, header["calibration"], header["version"])


def _config(path: str | Path, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: expected its config as JSON: {reason(error)}") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: config: expected a JSON object, got {config!r}")
    if not isinstance(owners := config.get("map") or [], list):
        raise ArtifactError(f"{path}: config: expected map as a list of owners, got {owners!r}")
    check_owners(path, owners)
    return config


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
    if not sizes["H"] or sizes["Hq"] % sizes["H"]:
        raise ArtifactError(
            f"{path}: layer {layer}: expected query heads by the group, got {sizes['Hq']} for "
            f"{sizes['H']} key/value heads"
        )
    return Kernels(**found)


def _tensor(layer: int, field: str) -> str:
    return f"layers.{layer}.{field.upper() if field[0] in 'ab' else field}"
