"""Random histories of stores against a plain model of the same: tokens in lists.

What is lossless is compared with attention over those tokens; what is lossy with stores of one row
each that see the same steps, and no file, batch, copy or other row beside them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvc.errors import ConfigError
from kvc.files import write_kernels
from kvc.methods import Method, parse
from kvc.ops.evict import Kernels
from kvc.store.batch import append_rows, attend_rows
from kvc.store.store import KVStore
from tests.conftest import BACKENDS, need
from tests.settings import lossless, lossy
from tests.store_lab import (
    HEADS,
    KV_HEADS,
    LAYERS,
    SCALE,
    Array,
    D,
    attention,
    back,
    step,
    through_a_file,
    to,
)
from tests.tolerances import TOLERANCES

STEPS, EXAMPLES = 40, 75  # of a history, at most; histories of each library and kind
LEAST = 1700  # steps of those together: 10,000 of all six
MOST = 3  # stores at a time
LOSSLESS, LOSSY = lossless(8), lossy(8)


@dataclass(repr=False)
class Row:
    """What one row has seen, by layers; `twin` saw the same, alone."""

    k: Array  # [LAYERS, KV_HEADS, T, D]
    v: Array
    twin: KVStore | None = None

    @property
    def n(self) -> int:
        """Tokens."""
        return int(self.k.shape[2])


@dataclass(repr=False)
class Live:
    """A store, and what its rows must be."""

    store: KVStore
    library: str
    rows: list[Row]
    padded: bool = False
    newest: int = 0  # tokens of the last step, which can be taken back


class Histories(RuleBasedStateMachine):
    """Steps of several stores of one method."""

    exact: ClassVar[bool]
    library: ClassVar[str]
    folder: ClassVar[Path]
    taken = 0  # steps of all histories

    @initialize(data=st.data(), stream=st.booleans())
    def begin(self, data: Any, stream: bool) -> None:
        table = LOSSLESS if self.exact else LOSSY
        name = data.draw(st.sampled_from(sorted(table)))
        kernels = str(self.folder / "kernels.safetensors")
        given = {k: kernels if v == "KERNELS" else v for k, v in table[name].items()}
        self.method: Method = parse(name, given)
        self.prefill = "stream" if stream else "exact"
        self.live: list[Live] = []
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))

    def draw(self, rows: int, n: int) -> tuple[Array, Array]:
        size = (3, LAYERS, rows, HEADS, n, D)
        x = self.rng.standard_normal(size).astype(np.float32)
        return x[:2, :, :, :KV_HEADS], x[2]

    def store(self) -> KVStore:
        return KVStore(self.method, LAYERS, prefill=self.prefill)

    def saw(self, row: Row, kv: Array, q: Array, out: Array, library: str) -> None:
        """Gives a row its tokens [2, LAYERS, KV_HEADS, L, D], and compares what attention said."""
        row.k = np.concatenate([row.k, kv[0]], 2)
        row.v = np.concatenate([row.v, kv[1]], 2)
        if row.twin is not None:
            want: Any = step(row.twin, library, kv[:, :, None], q[:, None])[:, 0]
        else:
            want = np.stack([attention(*x) for x in zip(q, row.k, row.v, strict=True)])
        rtol, atol = TOLERANCES["float32"]
        np.testing.assert_allclose(out, want, rtol, atol * max(1, np.abs(want).max()))

    def chosen(self, data: Any) -> Live:
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    @precondition(lambda self: len(self.live) < MOST)
    @rule(data=st.data(), rows=st.integers(1, 3), n=st.integers(2, 21))
    def start(self, data: Any, rows: int, n: int) -> None:
        pads = [data.draw(st.integers(0, n - 2)) for _ in range(rows)] if rows > 1 else [0]
        kv, q = self.draw(rows, n)
        nothing = np.zeros((LAYERS, KV_HEADS, 0, D), np.float32)
        seen = [Row(nothing, nothing, None if self.exact else self.store()) for _ in pads]
        live = Live(self.store(), self.library, seen, any(pads), n)
        out = step(live.store, self.library, kv, q, pads if any(pads) else None)
        for i, (row, pad) in enumerate(zip(seen, pads, strict=True)):
            self.saw(row, kv[:, :, i, :, pad:], q[:, i, :, pad:], out[:, i, :, pad:], self.library)
        self.live.append(live)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), n=st.sampled_from([1, 1, 1, 2, 5]))
    def go_on(self, data: Any, n: int) -> None:
        live = self.chosen(data)
        kv, q = self.draw(len(live.rows), n)
        out = step(live.store, live.library, kv, q)
        for i, row in enumerate(live.rows):
            self.saw(row, kv[:, :, i], q[:, i], out[:, i], live.library)
        live.newest = n

    @precondition(lambda self: any(len(x.rows) == 1 for x in self.live))
    @rule(data=st.data(), n=st.integers(1, 4))
    def together(self, data: Any, n: int) -> None:
        alone = [x for x in self.live if len(x.rows) == 1]
        library = data.draw(st.sampled_from(sorted({x.library for x in alone})))
        batch = [x for x in alone if x.library == library]
        counts = [data.draw(st.integers(0, n)) for _ in batch]
        kv, q = self.draw(len(batch), n)
        stores, outs = [x.store for x in batch], []
        for layer in range(LAYERS):
            k, v = (to(library, x[layer]) for x in kv)
            append_rows(stores, layer, k, v, counts)

            def answer(store: KVStore, queries: Any, layer: int = layer) -> Any:
                return store.attend(layer, queries, SCALE)

            outs.append(back(attend_rows(stores, to(library, q[layer]), counts, answer)))
        out = np.stack(outs)
        for i, (live, m) in enumerate(zip(batch, counts, strict=True)):
            assert not out[:, i, :, m:].any()
            if m:
                self.saw(
                    live.rows[0], kv[:, :, i, :, :m], q[:, i, :, :m], out[:, i, :, :m], library
                )
                live.newest = m

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def take_back(self, data: Any) -> None:
        live = self.chosen(data)
        least = min(row.n for row in live.rows)
        n = data.draw(st.integers(0, least - 1)) if least > 1 else 0
        before = live.store.length()
        try:
            live.store.trim(n)
        except ConfigError:
            assert n > live.newest or self.method.evicts
            assert live.store.length() == before
            return
        assert live.store.length() == before - n
        for row in live.rows:
            row.k, row.v = row.k[:, :, : row.n - n], row.v[:, :, : row.n - n]
            if row.twin is not None:
                row.twin.trim(n)
        live.newest = max(0, live.newest - n)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def reorder(self, data: Any) -> None:
        live = self.chosen(data)
        places = st.lists(st.integers(0, len(live.rows) - 1), min_size=1, max_size=3)
        order = data.draw(places)
        live.store.reorder(order)
        live.rows = [copy.deepcopy(live.rows[i]) for i in order]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), packed=st.booleans())
    def through_a_file(self, data: Any, packed: bool) -> None:
        live = self.chosen(data)
        if self.exact:  # libraries round alike, but not in the last place, which moves codes
            live.library = data.draw(st.sampled_from(BACKENDS))
            need(live.library)
        path = self.folder / "store.kvc"
        live.store = through_a_file(live.store, self.method, live.library, path, packed)

    @precondition(lambda self: self.live and len(self.live) < MOST)
    @rule(data=st.data(), one=st.booleans())
    def fork(self, data: Any, one: bool) -> None:
        live = self.chosen(data)
        new = copy.deepcopy(live)
        if one:
            row = data.draw(st.integers(0, len(live.rows) - 1))
            new.store.reorder([row])
            new.rows = [new.rows[row]]
        self.live.append(new)

    @precondition(lambda self: len(self.live) == MOST)
    @rule(data=st.data())
    def drop(self, data: Any) -> None:
        self.live.remove(self.chosen(data))

    @precondition(lambda self: self.live and not self.method.evicts)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def read(self, data: Any, layer: int) -> None:
        live = self.chosen(data)
        owner = live.store.owner(layer)
        for i, got in enumerate(map(back, live.store.read(layer))):
            for j, row in enumerate(live.rows):
                if row.twin is None:
                    want = (row.k, row.v)[i][owner]
                else:
                    want = back(row.twin.read(layer)[i])[0]
                x = got[j]
                assert not x[:, : x.shape[1] - row.n].any()
                rtol, atol = TOLERANCES["float32"]
                scale = max(1, np.abs(want).max(initial=0))
                np.testing.assert_allclose(x[:, x.shape[1] - row.n :], want, rtol, atol * scale)

    @invariant()
    def bytes_are_counted(self) -> None:
        type(self).taken += 1
        for live in getattr(self, "live", ()):
            report = live.store.report()
            assert report.nbytes == live.store.nbytes == sum(x.nbytes for x in live.store.arrays())


def kernels_at(folder: Path) -> None:
    rng = np.random.default_rng(0)
    wide, narrow = HEADS, KV_HEADS
    shapes = [(wide, D, 8), (wide, 8, 4), (narrow, D, 8), (narrow, 8, 4), (narrow, 4, 4),
              (narrow, 4), (narrow, 4)]  # fmt: skip
    maps = {
        layer: Kernels(*(0.3 * rng.standard_normal(s).astype("f4") for s in shapes))
        for layer in range(LAYERS)
    }
    write_kernels(folder / "kernels.safetensors", maps, "model", {})


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False], ids=["lossless", "lossy"])
@pytest.mark.parametrize("library", BACKENDS)
def test_no_history_differs(library: str, exact: bool, tmp_path: Path) -> None:
    need(library)
    kernels_at(tmp_path)
    fields = {"exact": exact, "library": library, "folder": tmp_path, "taken": 0}
    machine: Any = type("Machine", (Histories,), fields)
    asked = settings(
        max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=asked)
    assert machine.taken >= LEAST
