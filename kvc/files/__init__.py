"""Files made for one model: maps of KVSharer (JSON) and kernels of LESS (safetensors).

Both name the format, the kind, the model's fingerprint, what made them, the calibration data and
the version of kvc, and carry a checksum over all of it.
"""

from kvc.files.artifact import (
    Artifact,
    bundled_kernels,
    bundled_maps,
    facts,
    read_artifact,
)
from kvc.files.header import FORMAT, KERNELS, MAP, check_model, write_whole
from kvc.files.kernels import KernelsFile, read_kernels, write_kernels
from kvc.files.maps import MapFile, map_text, read_map, sharers, write_map

__all__ = [
    "FORMAT",
    "KERNELS",
    "MAP",
    "Artifact",
    "KernelsFile",
    "MapFile",
    "bundled_kernels",
    "bundled_maps",
    "check_model",
    "facts",
    "map_text",
    "read_artifact",
    "read_kernels",
    "read_map",
    "sharers",
    "write_kernels",
    "write_map",
    "write_whole",
]
