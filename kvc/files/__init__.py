"""Files made for one model: maps of KVSharer, kernels of LESS (safetensors), tuned profiles.

All name the format, the kind, the model's fingerprint, what made them, the calibration data and
the version of kvc, and carry a checksum over all of it. Compressed caches are in `kvc.files.cache`.
"""

from kvc.files.artifact import (
    Artifact,
    bundled_kernels,
    bundled_maps,
    facts,
    kind_of,
    read_artifact,
)
from kvc.files.header import FORMAT, KERNELS, MAP, PROFILE, check_model, write_whole
from kvc.files.kernels import KernelsFile, read_kernels, write_kernels
from kvc.files.maps import MapFile, map_text, read_map, sharers, write_map
from kvc.files.profile import ProfileFile, read_profile, write_profile

__all__ = [
    "FORMAT",
    "KERNELS",
    "MAP",
    "PROFILE",
    "Artifact",
    "KernelsFile",
    "MapFile",
    "ProfileFile",
    "bundled_kernels",
    "bundled_maps",
    "check_model",
    "facts",
    "kind_of",
    "map_text",
    "read_artifact",
    "read_kernels",
    "read_map",
    "read_profile",
    "sharers",
    "write_kernels",
    "write_map",
    "write_profile",
    "write_whole",
]
