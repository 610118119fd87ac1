"""Race of attention over one layer's tokens, for one query in each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvc.backends.base import Array
from kvc.measure.choice import Choice
from kvc.measure.speed.bench import LIBRARY, Bench, How
from kvc.measure.speed.clock import Times, wall
from kvc.measure.speed.truth import error, exact, of_codes
from kvc.store.store import KVStore

Result = dict[str, Any]


class Arm:
    """One cache of a layer, or of the layers that share one, full of tokens.

    Attributes:
        how: What computes it.
        found: What is known before times are.
    """

    def __init__(self, bench: Bench, how: How, attend: Callable[[], list[Array]]) -> None:
        self.bench, self.how, self._attend = bench, how, attend
        self.found: Result = {}
        self.n_layers = 1

    def run(self) -> float:
        """Seconds for one layer."""
        with self.how.on():
            return wall(self._attend, self.bench.library.sync) / self.n_layers

    def result(self, times: list[float]) -> Result:
        """What a row says of it."""
        return {**self.how.fields, **Times.of(times).fields("ms"), **self.found}


def rival(bench: Bench, name: str, batch: int, n: int) -> Arm:
    """A cache of the library's own.

    Raises:
        NotRaced: If it cannot be had.
    """
    layer, q = bench.library.make_layer(bench.engine, name), bench.queries(batch)
    kv = bench.prompt(batch, n)
    layer.append(*kv)
    bench.library.sync(layer.arrays())
    arm = Arm(bench, LIBRARY, lambda: [layer.attend(q, bench.scale)])
    got, read = layer.attend(q, bench.scale), layer.tokens()
    arm.found = {
        "bytes": layer.nbytes,
        "dense_bytes": sum(x.nbytes for x in kv),
        "error": error(got, exact(q, *read, bench.scale)),
        "loss": error(got, exact(q, *kv, bench.scale)),
    }
    return arm


def ours(bench: Bench, choice: Choice, batch: int, n: int) -> Arm:
    """A store with a method.

    Raises:
        NotRaced: If the method does not go with the model, or an op lacks the kernel asked for.
    """
    method, q = bench.method(choice), bench.queries(batch)
    pairs = method.pairs(bench.n_layers)
    layers: tuple[int, ...] = pairs[0] if pairs else (0,)
    kv = [bench.prompt(batch, n, layer) for layer in layers]

    def full() -> KVStore:
        store = KVStore(method, bench.n_layers)
        bench.fill(store, layers, kv)
        bench.step(store, layers, kv)
        bench.library.sync(store.arrays())
        attend(store)
        return store

    def attend(store: KVStore) -> list[Array]:
        found = [bench.attend(store, layer, q) for layer in layers]
        bench.library.sync(found)
        return found

    how, store = bench.how(method, full)
    with how.on():
        got = attend(store)
    arm = Arm(bench, how, lambda: attend(store))
    arm.n_layers = len(layers)
    errors, losses = [], []
    for out, layer, (k, v) in zip(got, layers, kv, strict=True):
        ks, vs = (bench.xp.concat([x, x[:, :, :1]], 2) for x in (k[:1], v[:1]))
        errors.append(error(out, of_codes(store, layer, q, bench.scale)))
        losses.append(error(out, exact(q, ks, vs, bench.scale)))
    report = store.report()
    arm.found = {
        "bytes": report.nbytes // len(layers),
        "dense_bytes": report.dense_bytes // len(layers),
        "error": max(errors),
        "loss": max(losses),
    }
    return arm
