"""Files of compressed caches: safetensors, and in their metadata what is no array.

Metadata, all of it text: `format`, `kind` ("cache"), `model` (fingerprint), `version`,
`calibration` (empty), `dtype` of keys and values, `method` (JSON: the text and the settings that
`kvc.methods.parse` takes), `kernels` (SHA-256 of LESS's kernels, or empty), `library` that wrote
it, `state` (JSON: counts and phases by name, see `kvc.store.state`), `checksum`, and `notes` (any
text, such as a conversation's messages) where there are some.

Tensors: `tokens`, int32 [B, T], and those that `kvc.store.state` names. A tensor may be deflated:
it has `.deflated` behind its name then, and holds the bytes of a zlib stream.

The checksum is SHA-256 over the metadata but for itself, as JSON with sorted keys, and over each
tensor in the order of the file: its name, dtype and shape as JSON, and its bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from kvc.errors import ArtifactError, CacheFileError
from kvc.files.header import CACHE, canonical, check_header, reason, whole_file

Raw = np.ndarray[Any, np.dtype[Any]]  # of the file's numbers; bfloat16 as uint16

# What the format calls a dtype, and how NumPy holds its bytes.
DTYPES = {
    "float64": ("F64", "<f8"),
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "uint32": ("U32", "<u4"),
    "int32": ("I32", "<i4"),
    "int16": ("I16", "<i2"),
    "uint8": ("U8", "|u1"),
}
NAMES = {code: name for name, (code, _) in DTYPES.items()}
KEYS = ("dtype", "method", "kernels", "library", "state")
DEFLATED = ".deflated"
CHUNK = 1 << 20  # bytes that are read and hashed at a time
# A stream without repeats spends one bit or more on a byte: no more than this comes out of it.
EXPANSION = 8


class Entry(NamedTuple):
    """A tensor to be written; `raw` makes its numbers when their turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: Callable[[], Raw]


class Tensor(NamedTuple):
    """A tensor of a file, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def deflated(entry: Entry) -> Entry:
    """The entry with its bytes entropy-coded: by Huffman's codes alone, without repeats."""
    packer = zlib.compressobj(9, zlib.DEFLATED, strategy=zlib.Z_HUFFMAN_ONLY)
    data = np.frombuffer(packer.compress(_bytes(entry.raw())) + packer.flush(), np.uint8)
    return Entry(entry.name + DEFLATED, "uint8", data.shape, lambda: data)


def write_cache(path: str | Path, header: Mapping[str, str], entries: Sequence[Entry]) -> None:
    """Write a cache file whole or not at all, one tensor at a time.

    Args:
        path: Where to.
        header: The metadata but for the checksum.
        entries: The tensors.

    Raises:
        CacheFileError: If it cannot be written; what was there before stays.
    """
    # by falling size of their numbers, so that each begins at a multiple of that size
    ordered = sorted(entries, key=lambda e: (-np.dtype(DTYPES[e.dtype][1]).itemsize, e.name))
    table: dict[str, Any] = {"__metadata__": {**header, "checksum": "0" * 64}}
    end = 0
    for name, dtype, shape, _ in ordered:
        code, kind = DTYPES[dtype]
        start, end = end, end + math.prod(shape) * np.dtype(kind).itemsize
        table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    digest = hashlib.sha256(canonical(dict(header)))
    with _ours(), whole_file(path) as file:
        file.write(_head(table))
        for entry in ordered:
            data = _bytes(entry.raw())
            digest.update(_of_tensor(entry.name, entry.dtype, entry.shape))
            digest.update(data)
            file.write(data)
        table["__metadata__"]["checksum"] = digest.hexdigest()
        file.seek(0)
        file.write(_head(table))


def _head(table: Mapping[str, Any]) -> bytes:
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _of_tensor(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    return canonical([name, dtype, list(shape)])


def _bytes(x: Raw) -> memoryview:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


@contextmanager
def _ours() -> Iterator[None]:
    """What is wrong with a file, as an error of a cache file."""
    try:
        yield
    except CacheFileError:
        raise
    except ArtifactError as error:
        raise CacheFileError(str(error)) from None


@contextmanager
def open_cache(path: str | Path) -> Iterator[CacheFile]:
    """A cache file whose header and checksum are right.

    Raises:
        CacheFileError: If it is missing, damaged, of another kind or of a newer format.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise CacheFileError(f"{path}: expected a cache file, got none: it is no file")
        file = Path(path).open("rb")  # noqa: SIM115 - what fails later is no error of opening
    except OSError as error:
        raise CacheFileError(f"{path}: cannot read it: {reason(error)}") from None
    with file:
        yield CacheFile(path, file)


def is_cache(path: str | Path) -> bool:
    """Whether a file says that it is a cache; it may be damaged still."""
    if not Path(path).is_file():
        return False
    with suppress(OSError, SafetensorError), safe_open(path, "numpy") as file:
        return (file.metadata() or {}).get("kind") == CACHE
    return False


class CacheFile:
    """An open cache file; its tensors are read when they are asked for.

    Attributes:
        path: Where it is.
        header: The metadata.
        state: Counts and phases by name.
        tensors: By name.
        size: Bytes of the file.
    """

    def __init__(self, path: str | Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._mapped: Raw | None = None
        try:
            with safe_open(path, "numpy") as known:  # the library knows what the format allows
                self.header: dict[str, str] = dict(known.metadata() or {})
            self.size = file.seek(0, 2)
            self.tensors = self._tensors()
        except OSError as error:
            raise CacheFileError(f"{path}: cannot read it: {reason(error)}") from None
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise CacheFileError(
                f"{path}: expected a cache as safetensors, got none: {reason(error)}"
            ) from None
        with _ours():
            check_header(path, self.header, CACHE, dict.fromkeys(KEYS, str))
        self._check_sum()
        self.state = self.json("state")

    def json(self, key: str) -> dict[str, Any]:
        """A JSON object of the header.

        Raises:
            CacheFileError: If it is none.
        """
        try:
            found = json.loads(self.header[key])
        except (ValueError, RecursionError) as error:
            raise CacheFileError(f"{self.path}: {key}: expected JSON: {reason(error)}") from None
        if not isinstance(found, dict):
            raise CacheFileError(f"{self.path}: {key}: expected a JSON object, got {found!r:.60}")
        return found

    def _tensors(self) -> dict[str, Tensor]:
        """The table of the file; the library, which checked it, does not tell offsets."""
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        table = json.loads(self._file.read(min(length, self.size)))
        found = {}
        for name, entry in table.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] not in NAMES:
                known = ", ".join(NAMES)
                raise ValueError(f"{name!r:.80}: expected numbers of {known}, got {entry['dtype']}")
            found[name] = Tensor(NAMES[entry["dtype"]], tuple(entry["shape"]), start, stop)
        return dict(sorted(found.items(), key=lambda item: item[1].start))

    def _check_sum(self) -> None:
        rest = {key: text for key, text in self.header.items() if key != "checksum"}
        digest = hashlib.sha256(canonical(rest))
        for name, x in self.tensors.items():
            digest.update(_of_tensor(name, x.dtype, x.shape))
            self._file.seek(x.start)
            for start in range(x.start, x.stop, CHUNK):
                digest.update(self._file.read(min(CHUNK, x.stop - start)))
        if (found := digest.hexdigest()) != self.header["checksum"]:
            raise CacheFileError(
                f"{self.path}: the file is damaged: its checksum is "
                f"{self.header['checksum'][:12]!r}..., that of its content {found[:12]!r}...; "
                "get it or make it again"
            )

    def read(self, name: str, mapped: bool = True) -> Raw:
        """A tensor's numbers.

        Args:
            name: Of a tensor that there is.
            mapped: As a view of the file in memory, private: what is written there stays there.
        """
        x = self.tensors[name]
        kind = np.dtype(DTYPES[x.dtype][1])
        if mapped and x.start % kind.itemsize == 0 and x.stop > x.start:
            if self._mapped is None:
                self._mapped = np.memmap(self._file, np.uint8, "c")
            return np.asarray(self._mapped[x.start : x.stop]).view(kind).reshape(x.shape)
        self._file.seek(x.start)
        return np.fromfile(self._file, kind, math.prod(x.shape)).reshape(x.shape)

    def inflate(self, name: str, dtype: str, shape: tuple[int, ...]) -> Raw:
        """A deflated tensor's numbers, of which there must be as many as the shape says.

        Raises:
            CacheFileError: If there are others.
        """
        data, kind = self.read(name + DEFLATED), np.dtype(DTYPES[dtype][1])
        wanted = math.prod(shape) * kind.itemsize
        try:
            if data.dtype != np.uint8 or wanted > EXPANSION * data.size:
                raise zlib.error("its sizes do not fit")
            stream = zlib.decompressobj()
            found = stream.decompress(_bytes(data), wanted + 1)
            if len(found) != wanted or not stream.eof or stream.unused_data:
                raise zlib.error("it has another length")
        except zlib.error as error:
            raise CacheFileError(f"{self.path}: {name}: cannot inflate it: {error}") from None
        return np.frombuffer(bytearray(found), kind).reshape(shape)
