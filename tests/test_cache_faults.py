"""Damaged cache files: refused in one line, or what they were; and files that are never half there.

A forged file whose checksum is right may hold another state than it did: it is refused in one line
too, or makes a store that answers.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import kvc
from kvc.backends.base import ops_of
from kvc.errors import CacheFileError
from kvc.files.cache import DTYPES
from kvc.store.archive import Writer
from tests import cache_faults
from tests.backend_table import PROMPT, method_of
from tests.cache_table import filled
from tests.test_backends_agree import narrow

__all__ = ["narrow"]  # a fixture

METHODS = (
    "none", "gear", "gear2", "less", "tova", "h2o+token", "minicache", "minicache+gear",
    "kvsharer+kivi",
)  # fmt: skip
KINDS = ("cut", "flip", "edit", "sealed", "sealed")
FAULTS = 112  # for each method, with deflated codes and without: 2016 in all
MEMORY = 64 * 2**20  # bytes that a damaged file of 200 KiB may cost at most
PATIENCE = 10  # seconds
State = tuple[dict[str, Any], dict[str, Any]]


def state(engine: Any, cache: Any) -> State:
    """All counts and all arrays of a cache, by name."""
    library = "mlx" if engine.name == "mlx" else "torch"
    store = engine.store(cache)
    archive = Writer(store.length(), import_module(f"kvc.backends.{library}.saved"))
    store.exchange(archive)
    entries = [*archive.entries, *archive.codes]  # torch's words are signed
    arrays = {x.name: np.array(x.raw(), order="C").view(DTYPES[x.dtype][1]) for x in entries}
    return archive.values, arrays


def same(a: State, b: State) -> bool:
    """Whether two states are one."""
    return (
        a[0] == b[0]
        and a[1].keys() == b[1].keys()
        and all(np.array_equal(x, b[1][name]) for name, x in a[1].items())
    )


def damaged(data: bytes, kind: str, rng: Random) -> bytes:
    if kind in ("edit", "sealed"):
        return cache_faults.edit(data, rng, sealed=kind == "sealed")
    return (cache_faults.cut if kind == "cut" else cache_faults.flip)(data, rng)


def answers(engine: Any, cache: Any, heads: int) -> None:
    """One query of every layer is answered."""
    store = engine.store(cache)
    for layer in range(engine.shape.n_layers):
        like = next(x for x in store.arrays() if "float" in ops_of(x).dtype_name(x))
        xp = ops_of(like)
        q = xp.zeros((1, heads, 1, engine.shape.head_dim), like.dtype, like) + 1
        assert store.attend(layer, q, 0.5).shape == q.shape


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_faults_are_refused_or_harmless(
    narrow: list[Any], backend: str, name: str, tmp_path: Path
) -> None:
    engine = narrow[backend == "mlx"]
    settings = {"gear.group_size": "8", "gear.buffer": "16"}
    method = method_of(name, engine.shape, tmp_path, **settings)
    cache, held = filled(engine, method, engine.encode(PROMPT[:300]))
    expected, path = state(engine, cache), tmp_path / "x.kvc"
    before, loaded, refused = peak(), 0, []
    for deflate in (False, True):
        kvc.save_cache(cache, path, held, model=engine.model, deflate=deflate)
        data = path.read_bytes()
        for i in range(FAULTS if backend == "cpu" else FAULTS // 8):
            rng = Random(f"{name} {deflate} {i}")
            kind = rng.choice(KINDS)
            path.write_bytes(damaged(data, kind, rng))
            start = time.monotonic()
            try:
                got, tokens = kvc.load_cache(engine.model, path)
            except CacheFileError as error:
                refused.append(str(error))
            else:
                loaded += 1
                if kind == "sealed":
                    answers(engine, got, engine.shape.n_heads)
                else:
                    assert tokens == held
                    assert same(state(engine, got), expected), (kind, i)
            assert time.monotonic() - start < PATIENCE, (kind, i)
    assert peak() - before < MEMORY
    assert not any("\n" in line for line in refused)
    assert refused
    assert loaded or backend == "mlx"  # some of many do no harm, or this would show nothing


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


KILLED = """
import os, random, signal, sys, time
import numpy as np
from kvc.files.cache import Entry, open_cache, write_cache
from kvc.files.header import CACHE, header_of

path, rng = sys.argv[1], random.Random(0)
header = {k: str(x) for k, x in header_of(CACHE, "m", "").items()}
header |= {"dtype": "float32", "method": "{}", "kernels": "", "library": "", "state": "{}"}

def save(i):
    entries = [Entry(str(j), "int32", (2**17,), lambda: np.full(2**17, i, "<i4")) for j in range(8)]
    write_cache(path, header, entries)

save(0)
start = time.perf_counter()
save(0)
takes, old, halves = time.perf_counter() - start, 0, 0
for i in range(1, 101):
    if not (child := os.fork()):
        save(i)
        os._exit(0)
    time.sleep(rng.uniform(0, 1.2 * takes))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open_cache(path) as file:
        found = {int(x) for name in file.tensors for x in np.unique(file.read(name))}
    assert found in ({old}, {i}), (found, old, i)
    halves += found == {old}
    old = found.pop()
print(halves)
"""


def test_a_killed_save_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "x.kvc")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 10 <= int(done.stdout) <= 99  # saves that were killed before their end


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_old_file(narrow: list[Any], tmp_path: Path) -> None:
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN  # Python's way: writing fails
    engine, path = narrow[0], tmp_path / "x.kvc"
    cache, held = filled(engine, kvc.parse("none"), engine.encode(PROMPT[:300]))
    kvc.save_cache(cache, path, held, model=engine.model)
    data = path.read_bytes()
    with small_files(len(data) // 2), pytest.raises(CacheFileError, match="cannot write it: "):
        kvc.save_cache(cache, path, held, model=engine.model)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_cache_file(narrow: list[Any], tmp_path: Path) -> None:
    engine, path = narrow[0], tmp_path / "x.kvc"
    contents = {
        b"": "expected a cache as safetensors",
        b"\xff" * 100: "expected a cache as safetensors",
        (2).to_bytes(8, "little") + b"{}": "this is no cache file of kvc",
        (2**40).to_bytes(8, "little") + b"{}": "expected a cache as safetensors",
    }
    for data, expected in contents.items():
        path.write_bytes(data)
        with pytest.raises(CacheFileError, match=expected):
            kvc.load_cache(engine.model, path)
    for other, expected in ((tmp_path, "it is no file"), (tmp_path / "y", "no such file")):
        with pytest.raises(CacheFileError, match=expected):
            kvc.load_cache(engine.model, other)
