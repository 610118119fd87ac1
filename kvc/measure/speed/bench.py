"""Where races are run: a model with its library, inputs of its shape, and which kernels run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, Engine, ModelShape, Ops, ops_of
from kvc.errors import KernelUnavailable, KVCError
from kvc.measure.choice import Choice
from kvc.measure.speed.clock import NotRaced
from kvc.measure.speed.library import Layer, Library, library_of
from kvc.measure.speed.truth import error, exact, of_codes
from kvc.methods import Method, parse
from kvc.ops.dispatch import Mode, mode
from kvc.store.store import KVStore

T = TypeVar("T")
OBSERVED = 64  # newest queries of a prompt that eviction is told of, where only their number counts
COSINE = 0.65  # of layers that share a cache, as in `kvc.measure.memory`


class How(NamedTuple):
    """What computed an arm: our kernels (`fused`), the definitions (`reference`), the `library`."""

    mode: str
    no_kernel: str = ""  # why the definitions

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block ops are computed so."""
        wanted: Mode = "fused" if self.mode == "fused" else "reference"
        with mode(wanted):
            yield

    @property
    def fields(self) -> dict[str, str]:
        """As fields of a row."""
        return {"mode": self.mode, **({"no_kernel": self.no_kernel} if self.no_kernel else {})}


LIBRARY = How("library")


@dataclass
class Bench:
    """A model, its library, and what ours runs with.

    Attributes:
        engine: The model.
        wish: `fused`, `reference`, or empty: fused where every op has a kernel.
        seed: Of tokens and queries.
    """

    engine: Engine
    wish: str = ""
    seed: int = 0
    library: Library = field(init=False)

    def __post_init__(self) -> None:
        """Looks up the library."""
        self.library = library_of(self.engine)

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the model."""
        return self.engine.shape

    @cached_property
    def like(self) -> Array:
        """Keys of the model, for their dtype and device."""
        with mode("reference"):
            cache = self.engine.make_cache(parse("none"))
            self.library.sync(self.engine.logits(self.tokens(1, 8, 0), cache))
        found = self.engine.store(cache).dense(0)
        assert found is not None  # of a method that compresses nothing
        return found[0]

    @cached_property
    def xp(self) -> Ops:
        """The verbs of the library."""
        return ops_of(self.like)

    @property
    def n_layers(self) -> int:
        """Layers that a store has."""
        return len(self.shape.full_layers)

    @property
    def scale(self) -> float:
        """Of attention."""
        return float(self.shape.head_dim**-0.5)

    def tokens(self, batch: int, n: int, seed: int) -> NDArray[np.int32]:
        """Random tokens [batch, n]."""
        rng = np.random.default_rng((self.seed, seed))
        return rng.integers(0, self.shape.vocab_size, (batch, n), np.int32)

    def randn(self, *shape: int, seed: int) -> Array:
        """Random numbers in the dtype of the model's keys."""
        rng = np.random.default_rng((self.seed, seed))
        x = self.xp.from_numpy(rng.standard_normal(shape, np.float32), self.like)
        return self.xp.astype(x, self.like.dtype)

    def queries(self, batch: int, n: int = 1) -> Array:
        """Random queries [batch, heads, n, head_dim]."""
        return self.randn(batch, self.shape.n_heads, n, self.shape.head_dim, seed=1)

    def prompt(self, batch: int, n: int, layer: int = 0) -> tuple[Array, Array]:
        """Random keys and values of a layer; those of different layers are alike to a degree."""
        size = (2, batch, self.shape.n_kv_heads, n, self.shape.head_dim)
        common, own = self.randn(*size, seed=2), self.randn(*size, seed=3 + layer)
        x = self.xp.astype(common * COSINE**0.5 + own * (1 - COSINE) ** 0.5, self.like.dtype)
        return x[0], x[1]

    def method(self, choice: Choice) -> Method:
        """A method with what depends on the model.

        Raises:
            NotRaced: If the two do not go together.
        """
        try:
            return choice.method.check(self.shape)
        except KVCError as error:
            raise NotRaced(str(error)) from None

    def how(self, method: Method, trial: Callable[[], T]) -> tuple[How, T]:
        """How a method is computed, found by a trial, and what the trial returned.

        Raises:
            NotRaced: If kernels were asked for, and an op has none.
        """
        if not method.parts:  # the library attends for itself
            return LIBRARY, trial()
        why = "asked for"
        if self.wish != "reference":
            try:
                with mode("fused"):
                    return How("fused"), trial()
            except KernelUnavailable as error:
                why = str(error).partition("; mode auto")[0]
            if self.wish == "fused":
                raise NotRaced(why)
        with mode("reference"):
            return How("reference", why), trial()

    def fill(self, store: KVStore, layers: tuple[int, ...], kv: list[tuple[Array, Array]]) -> None:
        """A prompt in some layers, not compressed yet."""
        for layer, (k, v) in zip(layers, kv, strict=True):
            store.append(layer, k, v)
            self.observe(store, layer, k.shape[0], min(OBSERVED, k.shape[2]))

    def observe(self, store: KVStore, layer: int, batch: int, n: int) -> None:
        """Tells a store that evicts of the newest queries."""
        if store.method.memory and store.dense(layer) is not None:
            store.observe(layer, self.queries(batch, n), self.scale)

    def attend(self, store: KVStore, layer: int, q: Array) -> Array:
        """Attention of a layer; over tokens as they came the library's own, as in a model."""
        dense = store.dense(layer)
        if dense is None:
            return store.attend(layer, q, self.scale)
        return self.library.attend(q, *dense, self.scale)

    def store_error(self, how: How, store: KVStore, q: Array) -> float:
        """Of the attention of a store's first layer."""
        want = of_codes(store, 0, q, self.scale)
        with how.on():
            return error(self.attend(store, 0, q), want)

    def rival_error(self, layer: Layer, q: Array) -> float:
        """Of the attention of a layer of the library's own cache."""
        want = exact(q, *layer.tokens(), self.scale)
        return error(layer.attend(q, self.scale), want)

    def step(self, store: KVStore, layers: tuple[int, ...], kv: list[tuple[Array, Array]]) -> None:
        """One more token in some layers, before which they compress what is due."""
        for layer, (k, v) in zip(layers, kv, strict=True):
            store.append(layer, k[:, :, :1], v[:, :, :1])
