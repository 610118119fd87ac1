"""Race of compressing: a prompt when it ends, and a block behind it, beside the prefill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from kvc.backends.base import Array
from kvc.measure.choice import Choice
from kvc.measure.speed.bench import LIBRARY, Bench
from kvc.measure.speed.clock import Times, wall
from kvc.measure.speed.library import Layer
from kvc.measure.speed.truth import error, exact
from kvc.methods import parse
from kvc.ops.dispatch import mode
from kvc.store.store import KVStore

Result = dict[str, Any]
LEAST = 16  # tokens behind a prompt, one by one


class Prefill:
    """The model's pass over the prompt, without its head."""

    def __init__(self, bench: Bench, batch: int, n: int) -> None:
        self.bench, self.ids = bench, bench.tokens(batch, n, seed=11)

    def run(self) -> float:
        """Seconds, of a prompt that stays dense."""
        bench = self.bench
        with mode("reference"):
            cache = bench.engine.make_cache(parse("none"))
        return wall(lambda: bench.engine.hidden(self.ids, cache), bench.library.sync)


class Arm(ABC):
    """All layers of a cache, filled anew for every run.

    Attributes:
        how: What computes it.
        block: Tokens that follow the prompt, one by one.
    """

    ends = 0  # tokens behind the prompt that are part of compressing it

    def __init__(self, bench: Bench, batch: int, n: int) -> None:
        self.bench, self.batch, self.n, self.how = bench, batch, n, LIBRARY
        self.kv = [bench.prompt(batch, n, layer) for layer in range(bench.n_layers)]
        bench.library.sync([list(each) for each in self.kv])
        self.one = [(k[:, :, :1], v[:, :, :1]) for k, v in self.kv]
        self._per_token = sum(x.nbytes for each in self.kv for x in each) // n
        self.block = LEAST

    def run(self) -> tuple[float, list[float]]:
        """Seconds for the prompt, and for each token behind it."""
        with self.how.on():
            return self._run(self.block)

    @abstractmethod
    def _run(self, block: int) -> tuple[float, list[float]]: ...

    @abstractmethod
    def held(self) -> Result:
        """Bytes of the newest run's cache, and how far its first layer's attention is off."""

    def all_tokens(self) -> tuple[Array, Array]:
        """Keys and values of the first layer's first row after a run, as they came."""
        (k, v), xp = self.kv[0], self.bench.xp
        n = self.block + self.ends
        return tuple(xp.concat([x[:1], *[x[:1, :, :1]] * n], 2) for x in (k, v))

    def result(self, runs: list[tuple[float, list[float]]], prefill: Times) -> Result:
        """What a row says of it."""
        prompt = Times.of([first for first, _ in runs])
        slowest = Times.of([max(steps) for _, steps in runs])
        steps = Times.of([step for _, each in runs for step in each])
        per_token = prefill.median / self.n
        return {
            **self.how.fields,
            **prompt.fields("ms"),
            **prefill.fields("prefill_ms"),
            "share_of_prefill": prompt.median / prefill.median,
            **slowest.fields("block_ms"),
            "block_tokens": self.block,
            "block_share_of_prefill": slowest.median / (per_token * self.block),
            "step_ms": 1e3 * steps.median,
            "dense_bytes": self._per_token * (self.n + self.ends + self.block),
            **self.held(),
        }


class Rival(Arm):
    """A cache of the library's own."""

    def __init__(self, bench: Bench, name: str, batch: int, n: int) -> None:
        super().__init__(bench, batch, n)
        self.name = name
        self.layers: list[Layer] = []
        self.block = max(LEAST, bench.library.make_layer(bench.engine, name).gathers)
        self._run(LEAST)

    def _run(self, block: int) -> tuple[float, list[float]]:
        bench = self.bench
        make = bench.library.make_layer
        self.layers = [make(bench.engine, self.name) for _ in self.kv]

        def add(kv: list[tuple[Array, Array]]) -> list[Any]:
            for layer, (k, v) in zip(self.layers, kv, strict=True):
                layer.append(k, v)
            return [layer.arrays() for layer in self.layers]

        prompt = wall(lambda: add(self.kv), bench.library.sync)
        return prompt, [wall(lambda: add(self.one), bench.library.sync) for _ in range(block)]

    def held(self) -> Result:
        """Of the library's own."""
        bench, layer = self.bench, self.layers[0]
        q = bench.queries(self.batch)
        got = layer.attend(q, bench.scale)
        return {
            "bytes": sum(layer.nbytes for layer in self.layers),
            "error": bench.rival_error(layer, q),
            "loss": error(got, exact(q, *self.all_tokens(), bench.scale)),
        }


class Ours(Arm):
    """A store with a method.

    Raises:
        NotRaced: If the method does not go with the model, or an op lacks the kernel asked for.
    """

    def __init__(self, bench: Bench, choice: Choice, batch: int, n: int) -> None:
        super().__init__(bench, batch, n)
        self.method, self.ends = bench.method(choice), 1
        codec = self.method.codec
        self.block = max(LEAST, codec.buffer) if codec else LEAST
        self.store = KVStore(self.method, bench.n_layers)
        self.how, _ = bench.how(self.method, lambda: self._run(self.block))

    def _run(self, block: int) -> tuple[float, list[float]]:
        bench, evicts = self.bench, self.method.evicts
        layers = tuple(range(bench.n_layers))
        self.store = store = KVStore(self.method, bench.n_layers)
        for layer, (k, v) in zip(layers, self.kv, strict=True):
            store.append(layer, k, v)
        bench.library.sync(store.arrays())
        q = bench.queries(self.batch, self.n) if evicts else None

        def end() -> list[Any]:
            if q is not None:  # what eviction goes by is part of the price
                for layer in layers:
                    store.observe(layer, q, bench.scale)
            return add()

        def add() -> list[Any]:
            bench.step(store, layers, self.one)
            return store.arrays()

        prompt, steps = wall(end, bench.library.sync), []
        one = bench.queries(self.batch) if evicts else None
        for _ in range(block):
            if one is not None:  # eviction goes by what attention reads, which is not timed here
                bench.library.sync([store.attend(i, one, bench.scale) for i in layers])
            steps.append(wall(add, bench.library.sync))
        return prompt, steps

    def held(self) -> Result:
        """Of the store."""
        bench, store = self.bench, self.store
        q = bench.queries(self.batch)
        off = bench.store_error(self.how, store, q)
        with self.how.on():
            got = bench.attend(store, 0, q)
        return {
            "bytes": store.nbytes,
            "error": off,
            "loss": error(got, exact(q, *self.all_tokens(), bench.scale)),
        }
