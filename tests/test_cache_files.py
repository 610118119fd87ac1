"""Caches as files: one library goes on where the other wrote, and files are as small as caches.

`python -m tests.cache_table` prints the figures of all methods on the bundled model.
"""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import kvc
import kvc.demo
from kvc.api import load_engine
from kvc.errors import CacheFileError, ConfigError
from kvc.files import read_kernels, write_kernels
from kvc.files.cache import open_cache
from kvc.methods import parse
from kvc.ops.evict import Kernels
from kvc.saving import written
from tests.backend_table import NAMES, PROMPT, engines, method_of
from tests.cache_table import compare, feed, filled
from tests.conftest import need
from tests.test_backends_agree import narrow
from tests.test_cache_faults import same, state

__all__ = ["narrow"]  # a fixture

BUNDLED = ("gear", "less")
SMALL = {"gear.group_size": "8", "gear.buffer": "16"}
SLOTS = {
    "less.heavy": "1024"
}  # a cache of few tokens in 4 bits is no larger than the file's header


@pytest.fixture(scope="module")
def bundled() -> list[Any]:
    """The bundled model on both libraries."""
    for library in ("torch", "mlx"):
        need(library)
    return engines(str(kvc.demo.path()))


@pytest.fixture(scope="module")
def text(bundled: list[Any]) -> tuple[list[int], list[Any]]:
    """A text, and the keys and values of its tokens in each layer."""
    path = kvc.demo.path() / "text.txt"
    ids = bundled[0].encode(path.read_text(encoding="utf-8"))[:2000]
    cache = bundled[0].make_cache(parse("none"))
    feed(bundled[0], cache, ids)
    return ids, [bundled[0].store(cache).dense(layer) for layer in range(8)]


@pytest.mark.parametrize("name", NAMES)
def test_the_other_library_goes_on(narrow: list[Any], name: str, tmp_path: Path) -> None:
    method = method_of(name, narrow[0].shape, tmp_path, **SMALL)
    ids = narrow[0].encode(PROMPT[:400])
    for writer, reader in (narrow, narrow[::-1]):
        row = compare(writer, reader, method, ids, 20, tmp_path / "x.kvc")
        assert row.same == row.n, row


@pytest.mark.parametrize("name", BUNDLED)
def test_a_real_text_goes_on(
    bundled: list[Any], text: tuple[list[int], Any], name: str, tmp_path: Path
) -> None:
    method = method_of(name, bundled[0].shape, tmp_path)
    for writer, reader in (bundled, bundled[::-1]):
        row = compare(writer, reader, method, text[0][:500], 64, tmp_path / "x.kvc")
        assert row.same == row.n, row


@pytest.mark.parametrize("name", NAMES)
def test_files_are_as_small_as_caches(
    bundled: list[Any], text: tuple[list[int], Any], name: str, tmp_path: Path
) -> None:
    engine, path, (ids, dense) = bundled[0], tmp_path / "x.kvc", text
    method = method_of(name, engine.shape, tmp_path)
    if method.memory and method.codec:
        method = method_of(name, engine.shape, tmp_path, **SLOTS)
    cache = engine.make_cache(method)
    store = engine.store(cache)
    for layer, (k, v) in enumerate(dense):
        store.append(layer, k.clone(), v.clone())
        store.observe(layer, k[:, :, -1:].repeat(1, 2, 1, 1), 0.125)
    store.trim(0)
    store.settle()
    kvc.save_cache(cache, path, ids, model=engine.model)
    again, _ = kvc.load_cache(engine.model, path)
    live = store.nbytes - kvc.report(cache).parts.get("slack", 0)
    assert kvc.report(again).nbytes == live
    assert 0 <= path.stat().st_size - live <= 0.02 * live


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gear", "gear2", "less", "h2o+token", "minicache"])
def test_halves_are_the_same_on_both_libraries(
    narrow: list[Any], name: str, dtype: str, tmp_path: Path
) -> None:
    folder, path = narrow[0].model.name_or_path, tmp_path / "x.kvc"
    pair = [load_engine(backend, folder, dtype) for backend in ("cpu", "mlx")]
    assert pair[0].shape == pair[1].shape  # known before the thread below begins
    method = method_of(name, pair[0].shape, tmp_path, **SMALL)
    for writer, reader in (pair, pair[::-1]):
        cache, held = filled(writer, method, writer.encode(PROMPT[:200]))
        for deflate in (False, True):
            kvc.save_cache(cache, path, held, model=writer.model, deflate=deflate)
            with ThreadPoolExecutor(1) as pool:  # as a server does
                again, _ = pool.submit(kvc.load_cache, reader.model, path).result()
            (values, arrays), got = state(writer, cache), state(reader, again)
            assert same((values | {"lone_tail": got[0]["lone_tail"]}, arrays), got)
    with pytest.raises(CacheFileError, match=f"in float32, as this model has them, got {dtype}"):
        kvc.load_cache(narrow[0].model, path)


def test_files_are_safetensors(narrow: list[Any], tmp_path: Path) -> None:
    engine, path = narrow[0], tmp_path / "x.kvc"
    method = method_of("gear", engine.shape, tmp_path, **SMALL)
    cache, held = filled(engine, method, engine.encode(PROMPT[:200]))
    kvc.save_cache(cache, path, held, model=engine.model)
    window = engine.store(cache).units()[0].k.window.tokens()
    with safe_open(path, "numpy") as file, open_cache(path) as ours:
        assert set(file.keys()) == set(ours.tensors)
        for name in file.keys():  # noqa: SIM118 - it is no dict
            np.testing.assert_array_equal(file.get_tensor(name), ours.read(name))
            np.testing.assert_array_equal(ours.read(name), ours.read(name, mapped=False))
        assert file.get_tensor("tokens").tolist() == [held]
        np.testing.assert_array_equal(file.get_tensor("layers.0.k.window"), window.numpy())
        assert file.metadata()["model"] == engine.shape.fingerprint


def test_deflated_codes_are_a_fifth_smaller(
    bundled: list[Any], text: tuple[list[int], Any], tmp_path: Path
) -> None:
    engine, (ids, dense) = bundled[0], text
    cache = engine.make_cache(parse("kivi"))
    for layer, (k, v) in enumerate(dense):
        engine.store(cache).append(layer, k.clone(), v.clone())
    engine.store(cache).settle()
    sizes = []
    for deflate in (False, True):
        kvc.save_cache(cache, tmp_path / "x.kvc", ids, model=engine.model, deflate=deflate)
        with open_cache(tmp_path / "x.kvc") as file:
            sizes.append(sum(x.stop - x.start for n, x in file.tensors.items() if "codes" in n))
    assert 0.75 < sizes[1] / sizes[0] < 0.82


def test_a_file_serves_many_and_stays(narrow: list[Any], tmp_path: Path) -> None:
    """Arrays are maps of the file on torch: what is written to them stays in memory."""
    import torch

    from kvc.backends.torch import saved

    path = tmp_path / "x.kvc"
    for writer, reader in (narrow, narrow[::-1]):
        method = method_of("h2o", writer.shape, tmp_path, **SMALL)
        cache, held = filled(writer, method, writer.encode(PROMPT[:400]))
        kvc.save_cache(cache, path, held, model=writer.model)
        data, answers = path.read_bytes(), []
        for _ in range(2):
            again, _ = kvc.load_cache(reader.model, path)
            answers.append([feed(reader, again, [token]) for token in held[:30]])
        assert answers[0] == answers[1]
        assert path.read_bytes() == data
    with open_cache(path) as file:
        raw = file.read("layers.0.k.ring")
        x = saved.array(raw, "float32", torch.device("cpu"))
        assert x.data_ptr() == raw.ctypes.data
        x.zero_()
        assert not file.read("layers.0.k.ring").any()
    assert path.read_bytes() == data


def test_copies_and_caches_of_caches(narrow: list[Any], tmp_path: Path) -> None:
    """A cache from a file is written again as it was."""
    for engine in narrow:
        method = method_of("minicache+gear", engine.shape, tmp_path, **SMALL)
        cache, held = filled(engine, method, engine.encode(PROMPT[:200]))
        paths = [tmp_path / f"{engine.name}{i}.kvc" for i in range(2)]
        kvc.save_cache(cache, paths[0], held, model=engine.model)
        again, tokens = kvc.load_cache(engine.model, paths[0])
        kvc.save_cache(copy.deepcopy(again), paths[1], tokens, model=engine.model)
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name", [*NAMES, "gear bits"])
def test_methods_are_written_as_they_are(narrow: list[Any], name: str, tmp_path: Path) -> None:
    shape = narrow[0].shape
    if name == "gear bits":
        bits = {"gear.layer_bits": "0:8/4, 2-3:4"}
        method = parse("gear", {**SMALL, **bits}).check(shape)
    else:
        method = method_of(name, shape, tmp_path, **SMALL).check(shape)
    found = json.loads(json.dumps(written(method)))
    assert parse(found["method"], found["settings"]).check(shape) == method
    if name in ("gear bits", "kvsharer+gear"):
        cache, held = filled(narrow[0], method, narrow[0].encode(PROMPT[:200]))
        kvc.save_cache(cache, tmp_path / "x.kvc", held, model=narrow[0].model)
        again = kvc.load_cache(narrow[0].model, tmp_path / "x.kvc")[0]
        assert narrow[0].store(again).method == narrow[0].store(cache).method


def test_what_does_not_fit_is_refused(narrow: list[Any], tmp_path: Path) -> None:
    engine, path = narrow[0], tmp_path / "x.kvc"
    cache, held = filled(engine, parse("none"), engine.encode(PROMPT[:200]))
    for tokens in (held[:-1], [], [held, held]):
        with pytest.raises(CacheFileError, match=r"expected .*tokens"):
            kvc.save_cache(cache, path, tokens, model=engine.model)
    assert not path.exists()
    with pytest.raises(ConfigError, match=r"expected a cache from kvc\.make_cache, got a dict"):
        kvc.save_cache({}, path, held, model=engine.model)
    kvc.save_cache(cache, path, held, model=engine.model)
    with pytest.raises(CacheFileError, match=f"got one of '{engine.shape.fingerprint}'"):
        kvc.load_cache(load_engine("cpu", str(kvc.demo.path())).model, path)
    with pytest.raises(CacheFileError, match="it was made without"):
        kvc.load_cache(engine.model, path, kernels="x")


def test_kernels_are_those_it_was_made_with(narrow: list[Any], tmp_path: Path) -> None:
    engine, path = narrow[0], tmp_path / "x.kvc"
    made = tmp_path / "made"
    made.mkdir()
    method = method_of("less", engine.shape, made)
    cache, held = filled(engine, method, engine.encode(PROMPT[:200]))
    kvc.save_cache(cache, path, held, model=engine.model)
    kernels = made / "maps.safetensors"
    expected = state(engine, kvc.load_cache(engine.model, path)[0])
    moved = kernels.rename(tmp_path / "moved.safetensors")
    with pytest.raises(CacheFileError, match="expected the LESS kernels that it was made with"):
        kvc.load_cache(engine.model, path)
    again, _ = kvc.load_cache(engine.model, path, kernels=moved)
    assert same(state(engine, again), expected)
    found = read_kernels(moved)
    changed = {i: Kernels(*(2 * x for x in k)) for i, k in found.layers.items()}
    write_kernels(kernels, changed, found.model, found.config)
    for given in (None, kernels):
        with pytest.raises(CacheFileError, match="of checksum"):
            kvc.load_cache(engine.model, path, kernels=given)
