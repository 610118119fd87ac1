"""MiniCache's cache of two layers: exact tokens that wait in both, and the merged ones before them.

Liu et al. 2024, arXiv:2405.14366.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvc.backends.base import ALONE, Array, Shard
from kvc.methods.gear import Gear
from kvc.methods.minicache import MiniCache
from kvc.ops.past import Layout, Past
from kvc.ops.quant import Role
from kvc.store.coded import Coded
from kvc.store.merged import Merged
from kvc.store.room import Room
from kvc.store.tokens import Series, Tokens, due
from kvc.store.unit import Part, check_finite


@dataclass(slots=True)
class Half(Past):
    """What one layer of a pair reads of the merged tokens."""

    merged: Merged
    which: int  # 0 for layer a, 1 for layer b
    run: int | None = None  # of coded directions: of this run alone

    @property
    def n(self) -> int:
        """Merged tokens."""
        start, stop = self.merged.span(self.run)
        return stop - start

    @property
    def n_kv_heads(self) -> int:
        """How many heads they have."""
        directions = self.merged.directions
        return int(directions.x.shape[1]) if isinstance(directions, Room) else directions.n_kv_heads

    def read(self, start: int, stop: int) -> Array:
        """Tokens start to stop, restored."""
        first = self.merged.span(self.run)[0]
        return self.merged.read(self.which, first + start, first + stop)

    def turn(self, x: Array) -> Array:
        """`x` [..., D] into the coordinates that directions are stored in, or back."""
        return self.merged.turn(x)

    def layout(self) -> Layout:
        """Directions and what makes them this layer's vectors."""
        return self.merged.layout(self.which, self.run)

    def pieces(self) -> Sequence[Half]:
        """Each run of coded directions by itself."""
        return [replace(self, run=run) for run in self.merged.runs()]


@dataclass(slots=True)
class Pair:
    """Two adjacent layers: tokens that wait in both, exact, and the merged ones before them."""

    method: MiniCache
    codec: Gear | None
    layer: int  # the shallower one
    tails: tuple[Tokens, Tokens]
    k: Merged | None = None
    v: Merged | None = None
    shard: Shard = ALONE  # the heads that they have

    @property
    def faces(self) -> tuple[Tokens, Tokens]:
        """Both layers' sides."""
        return self.tails

    def settle(self, prompt: bool) -> None:
        """Merges the tokens that are due: all that wait, or with a codec whole buffers.

        A prompt's are merged as one block; later ones as they are due.

        Raises:
            KVCError: if a prompt's K or V hold NaN or infinity, naming the layer.
        """
        policy = self.method.policy(coded=self.codec is not None)
        n, size = self._due(policy, prompt)
        if n == 0:
            return
        a, b = self.tails
        if prompt:  # later tokens are not looked at: it would stall the device
            for layer, tail in enumerate(self.tails, self.layer):
                check_finite(layer, tail.k.window.tokens(0, n), tail.v.window.tokens(0, n))
        for series in (s for tail in self.tails for s in (tail.k, tail.v)):
            series.sink = self.codec.sink if self.codec else 0
        self.k = self._merged("k", self.k, (a.k, b.k), n, size, prompt)
        self.v = self._merged("v", self.v, (a.v, b.v), n, size, prompt)
        codec = self.codec
        capacity = codec.window + codec.buffer if codec else size if policy == "buffer" else 1
        for which, tail in enumerate(self.tails):
            for series, merged in ((tail.k, self.k), (tail.v, self.v)):
                series.past = Half(merged, which)
                series.drop(n, capacity)

    def _due(self, policy: str, prompt: bool) -> tuple[int, int]:
        """How many tokens to merge now, and how many of them at a time."""
        waiting = self.tails[0].k
        if policy == "keep" and not prompt:
            return 0, 0
        if self.codec:
            n = due(self.codec, waiting, self.codec.buffer)
            return n, n if prompt else self.codec.buffer
        if policy == "buffer" and not prompt:
            size = self.method.buffer
            return waiting.window.n // size * size, size
        return waiting.window.n, waiting.window.n

    def _merged(
        self,
        role: Role,
        merged: Merged | None,
        waiting: tuple[Series, Series],
        n: int,
        size: int,
        prompt: bool,
    ) -> Merged:
        codec, first = self.codec, waiting[0].sink
        a, b = (series.window for series in waiting)
        if merged is None:
            empty = Room.of(a.tokens(0, 0))
            coded = codec and Coded(codec, role, self.layer, shard=self.shard)
            merged = Merged(self.method, coded or empty, shard=self.shard)
        rank = 0 if codec is None else codec.prefill_rank if prompt else codec.rank
        for start in range(first, first + n, size):
            merged.append(a.tokens(start, start + size), b.tokens(start, start + size), rank)
        return merged

    def rows(self, rows: Sequence[int]) -> Pair:
        """Some of the rows, which may repeat."""
        k, v = self.k and self.k.rows(rows), self.v and self.v.rows(rows)
        a, b = (tail.rows(rows) for tail in self.tails)
        for which, tail in enumerate((a, b)):
            if k and v:
                tail.k.past, tail.v.past = Half(k, which), Half(v, which)
        return replace(self, tails=(a, b), k=k, v=v)

    def shared(self) -> Iterator[Part]:
        """What both layers read."""
        for merged in filter(None, (self.k, self.v)):
            yield from merged.parts()
