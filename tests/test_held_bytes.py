"""What a store says it holds is what the library really holds for it, to the byte."""

import gc
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvc.backends.base import FULL, ModelShape, ops_of
from kvc.files import write_kernels
from kvc.methods import PRESETS, parse
from kvc.ops.evict import Kernels
from kvc.ops.rotate import hadamard
from kvc.store.store import KVStore
from tests.conftest import need

LAYERS, B, HQ, H, D = 2, 2, 4, 2, 64
PROMPT, STEPS = 200, 140
SHAPE = ModelShape("llama", LAYERS, HQ, H, D, 100, 400, 4, (FULL,) * LAYERS)
PAIR: dict[str, Any] = {"minicache.start": 0}
SHARED = {"kvsharer.map": "1:0"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PRESETS},
    "less": ("less", {"less.kernels": "KERNELS"}),
    "minicache": ("minicache", PAIR),
    "minicache keep": ("minicache", {**PAIR, "minicache.decode_policy": "keep"}),
    "minicache buffer": ("minicache", {**PAIR, "minicache.decode_policy": "buffer"}),
    "kvsharer": ("kvsharer", SHARED),
    "kivi sliding": ("kivi", {"gear.value_window": "sliding"}),
    "minicache+gear": ("minicache+gear", PAIR),
    "minicache+gear2": ("minicache+gear2", PAIR),
    "kvsharer+gear": ("kvsharer+gear", SHARED),
    "kvsharer+h2o": ("kvsharer+h2o", SHARED),
    "h2o+token": ("h2o+token", {}),
}


class Library:
    """Arrays of one library, and the bytes that it holds in all."""

    def __init__(self, name: str) -> None:
        need(name)
        self.name = name
        self.lib = import_module("mlx.core" if name == "mlx" else name)

    def array(self, x: Any) -> Any:
        x = np.ascontiguousarray(x)  # MLX keeps the gaps of other arrays
        return self.lib.array(x) if self.name == "mlx" else self.lib.from_numpy(x)

    def evaluate(self, arrays: Any) -> None:
        if self.name == "mlx":
            self.lib.eval(arrays)

    def held(self) -> int:
        gc.collect()
        if self.name == "mlx":
            self.lib.synchronize()
            return int(self.lib.get_active_memory())
        tensor = self.lib.Tensor
        live = [x for x in gc.get_objects() if issubclass(type(x), tensor)]
        return sum(self.storages(live).values())

    def storages(self, tensors: Any) -> dict[int, int]:
        found = [x.untyped_storage() for x in tensors]
        return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.fixture(params=["torch", "mlx"])
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    library = Library(request.param)
    if library.name == "torch":
        before = library.lib.get_num_threads()
        library.lib.set_num_threads(1)
        yield library
        library.lib.set_num_threads(before)
        return
    # MLX gives out freed buffers again, up to twice as large as asked for, and counts them whole.
    before = library.lib.set_cache_limit(0)
    yield library
    library.lib.set_cache_limit(before)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("maps") / "kernels.safetensors"
    rng = np.random.default_rng(0)
    shapes = [(HQ, D, 8), (HQ, 8, 4), (H, D, 8), (H, 8, 4), (H, 4, 4), (H, 4), (H, 4)]
    maps = {
        layer: Kernels(*(0.2 * rng.standard_normal(s).astype("f4") for s in shapes))
        for layer in range(LAYERS)
    }
    write_kernels(Path(path), maps, SHAPE.fingerprint, {})
    return str(path)


def fill(
    store: KVStore, library: Library, dtype: str, look: Callable[[KVStore], None], pads: Any = None
) -> None:
    """A prompt, whose attention is the library's, and single tokens; `look` after each part."""
    rng = np.random.default_rng(1)
    data = rng.standard_normal((LAYERS, 3, B, HQ, PROMPT + STEPS, D)).astype(dtype)

    def step(start: int, stop: int) -> None:
        for layer in range(LAYERS):
            q, k, v = (data[layer, i, :, :, start:stop] for i in range(3))
            k, v = library.array(k[:, :H]), library.array(v[:, :H])
            store.append(layer, k, v, pads if start == 0 else None)
            if start == 0:
                store.observe(layer, library.array(q), D**-0.5)
            else:
                library.evaluate(store.attend(layer, library.array(q), D**-0.5))
        library.evaluate(store.arrays())

    step(0, PROMPT)
    look(store)
    for t in range(PROMPT, PROMPT + STEPS):
        step(t, t + 1)
    look(store)


def keep_constants(library: Library) -> None:
    """What is sent to the device once and serves all stores is there before anything counts."""
    x = library.array(np.zeros((B, D), "f4"))
    some = [ops_of(x).take(x, rows, 0) for rows in ([0], [1], [0, 1], [1, 0])]
    library.evaluate([hadamard(x), *some])


def check(
    library: Library, name: str, settings: dict[str, Any], dtype: str, pads: Any = None
) -> None:
    method = parse(name, settings).check(SHAPE)
    keep_constants(library)
    before = library.held()
    store = KVStore(method, LAYERS)
    seen = []

    def look(store: KVStore) -> None:
        maps = sum(x.nbytes for kernels in store._maps.values() for x in kernels)  # weights
        seen.append(library.held() - before - maps)
        report = store.report()
        assert seen[-1] == store.nbytes
        assert store.nbytes == report.nbytes == sum(report.parts.values()) == sum(report.layers)
        if library.name == "torch":
            assert sum(library.storages(store.arrays()).values()) == store.nbytes

    fill(store, library, dtype, look, pads)
    assert len(seen) == 2
    compressed = [store.dense(layer) is None for layer in range(LAYERS)]
    assert any(compressed) == (name not in ("none", "kvsharer"))
    del store
    assert library.held() == before


@pytest.mark.parametrize("case", CASES)
def test_store_holds_what_it_says(library: Library, kernels: str, case: str) -> None:
    name, settings = CASES[case]
    named = {key: kernels if value == "KERNELS" else value for key, value in settings.items()}
    check(library, name, named, "float32")


@pytest.mark.parametrize("case", ["none", "gear2", "h2o", "minicache+gear"])
def test_store_holds_what_it_says_in_half_precision(library: Library, case: str) -> None:
    check(library, *CASES[case], "float16")


@pytest.mark.parametrize("case", ["gear", "h2o", "minicache"])
def test_store_holds_what_it_says_behind_padding(library: Library, case: str) -> None:
    check(library, *CASES[case], "float32", [3, 0])


def test_slack_is_the_room_that_no_token_uses(library: Library) -> None:
    store = KVStore(parse("none"), LAYERS)
    fill(store, library, "float32", lambda _: None)
    report = store.report()
    token = 2 * LAYERS * B * H * D * 4
    assert report.parts["window"] == report.dense_bytes == token * (PROMPT + STEPS)
    assert report.parts["slack"] > 0
    assert report.parts["slack"] % token == 0
    assert report.nbytes == report.parts["window"] + report.parts["slack"]


def test_buffers_that_mlx_uses_again_are_at_most_twice_as_large() -> None:
    """Without its cache of buffers MLX holds what we say; with it, each may be a larger one."""
    library = Library("mlx")
    mx = library.lib
    mx.clear_cache()
    before = library.held()
    store = KVStore(parse("gear").check(SHAPE), LAYERS)
    fill(store, library, "float32", lambda _: None)
    mx.clear_cache()
    held, page = library.held() - before, 16384
    bound = sum(min(2 * x.nbytes, x.nbytes + 2 * page) for x in store.arrays())
    assert store.nbytes <= held <= bound
