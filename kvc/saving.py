"""Compressed caches as files: what a library holds, written by it, taken up by the same or another.

A file continues as the cache would have: with the same method and settings, whose tokens stay as
they were coded. It is for one model and for keys and values of one dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from kvc import demo
from kvc.backends.base import ModelShape
from kvc.errors import CacheFileError, KVCError
from kvc.files.cache import DEFLATED, CacheFile, Entry, deflated, open_cache, write_cache
from kvc.files.header import CACHE, header_of
from kvc.methods import Method, parse
from kvc.store.archive import Archive, Reader, Writer

LIBRARIES = {"mlx": "mlx-lm", "torch": "transformers"}
_NAME = re.compile(r"[a-z]+(\+[a-z]+){0,2}", re.ASCII)
_MAP = re.compile(r"[\d:,]{1,9999}", re.ASCII)
_LAYER_BITS = re.compile(r"(\d{1,4}(-\d{1,4})?:\d(/\d)?,?){0,999}", re.ASCII)


def save(
    library: str,
    model: Any,
    cache: Any,
    path: str | Path,
    tokens: Sequence[Any],
    deflate: bool,
    notes: str,
) -> None:
    """Writes a cache whole or not at all; see `kvc.save_cache`."""
    saved = import_module(f"kvc.backends.{library}.saved")
    shape = import_module(f"kvc.backends.{library}.cache").shape_of(model)
    _check_whole(path, shape)
    store = saved.store_of(cache)
    ids = np.asarray(tokens, np.int64)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or not ids.size or ids.shape[1] != store.length():
        raise CacheFileError(
            f"{path}: expected the {store.length()} tokens that the cache holds, got "
            f"{list(ids.shape)[1:] or 'none'}; give the ids of all that was read and written"
        )
    archive = Writer(ids.shape[1], saved)
    store.exchange(archive)
    saved.exchange(archive, cache)
    if archive.rows != ids.shape[0]:
        raise CacheFileError(f"{path}: expected tokens of {archive.rows} rows, got {ids.shape[0]}")
    small = ids.astype("<i4")
    header = {
        **{key: str(x) for key, x in header_of(CACHE, shape.fingerprint, "").items()},
        "dtype": archive.dtype,
        "method": json.dumps(written(store.method)),
        "kernels": kernels_sum(store.method.memory.kernels or "") if store.method.memory else "",
        "library": LIBRARIES[library],
        "state": json.dumps(archive.values, separators=(",", ":")),
        **({"notes": notes} if notes else {}),
    }
    codes = [deflated(code) if deflate else code for code in archive.codes]
    entries = [Entry("tokens", "int32", small.shape, lambda: small), *codes, *archive.entries]
    write_cache(path, header, entries)


def load(
    library: str, model: Any, path: str | Path, kernels: str | Path | None, **options: bool
) -> tuple[Any, list[Any]]:
    """A cache that goes on where a file ends, and its tokens; see `kvc.load_cache`."""
    saved = import_module(f"kvc.backends.{library}.saved")
    adapter = import_module(f"kvc.backends.{library}.cache")
    with open_cache(path) as file:
        shape = adapter.shape_of(model)
        _check_whole(path, shape)
        if file.header["model"] != shape.fingerprint:
            raise CacheFileError(
                f"{path}: expected a cache of this model, {shape.fingerprint}, got one of "
                f"{file.header['model']!r:.80}; read the text again with this model"
            )
        make = partial(saved.array, like=saved.place(model))
        reader = Reader(file, make, saved.MAPPED)
        if reader.dtype != (dtype := saved.key_dtype(model)):
            raise CacheFileError(
                f"{path}: expected keys and values in {dtype}, as this model has them, got "
                f"{reader.dtype}; load the model in {reader.dtype}"
            )
        method = method_of_file(file, kernels)
        _check_sizes(reader, shape.full_layers[0], (shape.n_kv_heads, shape.head_dim))
        with _of_file(file):
            cache = adapter.make_cache(model, method, **options)
            saved.store_of(cache).exchange(reader)
            saved.exchange(reader, cache)
        ids = reader.ids(shape.vocab_size)
        reader.end()
    return cache, ids[0] if len(ids) == 1 else ids


def _check_whole(path: str | Path, shape: ModelShape) -> None:
    """That this process has all heads, as a file does."""
    if shape.shard.count > 1:
        raise CacheFileError(
            f"{path}: expected a model with all heads in one process, got one whose heads "
            f"{shape.shard.count} processes share; load it in one to keep its cache in files"
        )


def _check_sizes(reader: Archive, layer: int, expected: tuple[int, int]) -> None:
    at = reader.at(f"layers.{layer}")
    found = tuple(at.numbers("size", [], 2, 1, 2**20))
    if found != expected:
        at.refuse("size", f"{list(expected)}, as the model has it", found)


def written(method: Method) -> dict[str, Any]:
    """A method as text and all its settings, which `kvc.methods.parse` takes.

    A profile's are those that it stands for. A map is written out; kernels are a path.
    """
    settings = {
        f"{part.section}.{f.name}": getattr(part, f.name)
        for part in method.parts
        for f in fields(part)  # type: ignore[arg-type]
    }
    if settings.get("less.kernels"):
        settings["less.kernels"] = str(Path(settings["less.kernels"]).absolute())
    text = "+".join(part.section for part in method.parts) or "none"
    return {"name": method.name, "method": text, "settings": settings}


def facts(path: str | Path) -> dict[str, Any]:
    """What a reader wants to know of a cache file, ready for JSON.

    `name` is the method as its user wrote it; `method` and `settings` what it stands for, as far as
    it differs from that method's defaults; `tokens` are those of one row.

    Raises:
        CacheFileError: If there is no such file or it is damaged.
    """
    with open_cache(path) as file:
        text, settings = _described(file)
        reader = Reader(file, lambda x, _: x, mapped=False)
        with _of_file(file):
            plain = dict(written(parse(text))["settings"])
            parse(text, {key: x for key, x in settings.items() if key != "less.kernels"})
        return {
            "file": str(path),
            "kind": CACHE,
            "model": file.header["model"],
            "name": str(file.json("method").get("name", text)),
            "method": text,
            "settings": {key: x for key, x in settings.items() if plain.get(key, x) != x},
            "tokens": reader.columns,
            "rows": reader.rows,
            "dtype": reader.dtype,
            "bytes": file.size,
            "deflated": any(name.endswith(DEFLATED) for name in file.tensors),
            "library": file.header["library"],
            "version": file.header["version"],
            "checksum": file.header["checksum"],
        }


def notes_of(path: str | Path) -> str:
    """The text that `kvc.save_cache` kept with a cache; empty where there is none.

    Raises:
        CacheFileError: If there is no such file or it is damaged.
    """
    with open_cache(path) as file:
        return file.header.get("notes", "")


def method_of_file(file: CacheFile, kernels: str | Path | None = None) -> Method:
    """The method of a cache file.

    Args:
        file: The file.
        kernels: Those of LESS, if they are not where they were; the checksum must be the same.

    Raises:
        CacheFileError: If there is none, or its kernels cannot be had.
    """
    text, settings = _described(file)
    if file.header["kernels"]:
        settings["less.kernels"] = _kernels(file, settings, kernels)
    elif settings.get("less.kernels") or kernels is not None:
        raise CacheFileError(f"{file.path}: expected no kernels, as it was made without, got some")
    with _of_file(file):
        name = str(file.json("method").get("name", text))
        return replace(parse(text, settings), name=name)


@contextmanager
def _of_file(file: CacheFile) -> Iterator[None]:
    """What is refused of a file's method or state, as the file's fault."""
    try:
        yield
    except CacheFileError:
        raise
    except KVCError as error:
        raise CacheFileError(f"{file.path}: it does not work here: {error}") from None


def _described(file: CacheFile) -> tuple[str, dict[str, Any]]:
    """The method's text and settings: plain values, of which none costs more than it is long."""
    found = file.json("method")
    text, settings = str(found.get("method")), found.get("settings")
    printable = str(found.get("name", "")).isprintable()
    if not isinstance(settings, dict) or not _NAME.fullmatch(text) or not printable:
        raise CacheFileError(
            f"{file.path}: method: expected a name and settings, got {found!r:.60}"
        )
    texts = {"kvsharer.map": _MAP, "gear.layer_bits": _LAYER_BITS}
    for key, x in settings.items():
        plain = type(x) in (str, int, float, bool) and str(x).isprintable()
        if not plain or (key in texts and not texts[key].fullmatch(str(x).replace(" ", ""))):
            raise CacheFileError(
                f"{file.path}: method: expected a setting, got {key!r:.60} = {x!r:.60}"
            )
    return text, settings


def _kernels(file: CacheFile, settings: dict[str, Any], given: str | Path | None) -> str:
    """Where the kernels are that a file was made with."""
    bundled = demo.path().glob("less-*.safetensors")
    known: list[str | Path] = [str(settings.get("less.kernels", "")), *sorted(bundled)]
    for path in known if given is None else [given]:
        if kernels_sum(path) == file.header["kernels"]:
            return str(path)
    raise CacheFileError(
        f"{file.path}: expected the LESS kernels that it was made with, of checksum "
        f"{file.header['kernels'][:12]!r:.20}..., found {'none' if given is None else 'others'}; "
        "give their file as kernels"
    )


def kernels_sum(path: str | Path) -> str:
    """What a file of kernels says is its checksum, or nothing if it is none."""
    if Path(path).is_file():
        with suppress(OSError, SafetensorError), safe_open(path, "numpy") as file:
            return str((file.metadata() or {}).get("checksum", ""))
    return ""
