"""One tensor of two layers, merged: MiniCache's directions, norms and retained originals.

Liu et al. 2024, arXiv:2405.14366.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from kvc.backends.base import ALONE, Array, Shard, ops_of
from kvc.methods.minicache import MiniCache
from kvc.ops.merge import Thresholds, merge_pair, restore, retained, thresholds, vectors
from kvc.ops.past import Layout
from kvc.store.coded import Coded
from kvc.store.room import Room
from kvc.store.unit import Part

ROOM = 16  # tokens all of whose vectors may be retained before the true count is looked up


@dataclass(slots=True)
class Originals:
    """The vectors of both layers that were too different to merge, behind each other in each row.

    How many there are depends on values. Only a prompt's are counted on the host, to fit the
    buffers; later tokens are written behind the live entries without asking, and `bound` says how
    many there can be at most.
    """

    index: Array  # int32 [B, capacity], token * G + vector; -1 where there is none
    a: Array  # [B, capacity, W]
    b: Array  # [B, capacity, W]
    bound: int

    def append(self, index: Array, a: Array, b: Array) -> None:
        """Adds entries [B, m] and their vectors [B, m, W], the live ones of a row in front."""
        xp, m = ops_of(index), index.shape[1]
        if self.bound + m > self.index.shape[1]:
            self.bound = int(xp.max(self._count(), 0))
            missing = self.bound + m - self.index.shape[1]
            if missing > 0:
                more = missing + (ROOM - 1) * m
                rows, width = self.index.shape[0], a.shape[2]
                none = xp.zeros((rows, more), index.dtype, index) - 1
                self.index = xp.concat([self.index, none], 1)
                room = xp.zeros((rows, more, width), a.dtype, a)
                self.a, self.b = xp.concat([self.a, room], 1), xp.concat([self.b, room], 1)
        at = self._count()[:, None] + xp.arange(m, index)
        at = xp.astype(at, index.dtype)
        self.index = xp.put_along_axis(self.index, at, index, 1)
        at = xp.broadcast_to(at[..., None], a.shape)
        self.a, self.b = (xp.put_along_axis(x, at, y, 1) for x, y in ((self.a, a), (self.b, b)))
        self.bound += m

    def _count(self) -> Array:
        xp = ops_of(self.index)
        return xp.sum(xp.astype(self.index >= 0, self.index.dtype), -1)

    def fitted(self) -> Originals:
        """The same in buffers that the fullest row fills."""
        bound = int(ops_of(self.index).max(self._count(), 0))
        return Originals(self.index[:, :bound], self.a[:, :bound], self.b[:, :bound], bound)

    def live(self) -> int:
        """Entries in use, over all rows; asks the device."""
        return int(ops_of(self.index).sum(self._count(), 0))

    def slack(self, x: Array) -> int:
        """Bytes of one of the buffers that no entry uses yet."""
        entries = self.index.shape[0] * self.index.shape[1]
        return int(x.nbytes // max(1, entries) * (entries - self.live()))


@dataclass(slots=True)
class Merged:
    """K or V of a pair: directions, as they are or coded, each layer's norms, the originals."""

    method: MiniCache
    directions: Room | Coded
    norms: tuple[Room, Room] | None = None  # [B, G, T] of layers a and b; `mean` has none
    originals: Originals | None = None
    limits: Thresholds | None = None
    shard: Shard = ALONE  # the heads that they have

    @property
    def n(self) -> int:
        """Merged tokens."""
        return self.directions.n

    def append(self, a: Array, b: Array, rank: int) -> None:
        """Merges tokens [B, H, n, D] of both layers.

        The first block's extremes decide for good what is retained; directions that are coded
        are made sqrt(D) times as long, so that half-precision steps do not get too small.
        """
        method, xp, dtype = self.method, ops_of(a), a.dtype
        e, norm_a, norm_b, angle = merge_pair(a, b, method.t, method.how, method.granularity)
        first = max(0, method.always_keep - self.n)
        if self.limits is None and method.retention != "none":  # they are of all heads
            angle = self.shard.whole(angle)
            keep = retained(angle, method.retention, method.gamma, None, first)
            keep = self.shard.own(keep)
            self.limits = thresholds(angle, method.retention, method.gamma)
        else:
            keep = retained(angle, method.retention, method.gamma, self.limits, first)
        self._retain(keep, a, b)
        if isinstance(self.directions, Coded):
            self.directions.append(xp.astype(e * math.sqrt(e.shape[-1]), dtype), rank)
        else:
            self.directions.append(xp.astype(e, dtype))
        if method.how == "mean":
            return
        new = (xp.astype(norm_a, dtype), xp.astype(norm_b, dtype))
        if self.norms is None:
            self.norms = (Room.of(new[0]), Room.of(new[1]))
            return
        for room, norm in zip(self.norms, new, strict=True):
            room.append(norm)

    def _retain(self, keep: Array, a: Array, b: Array) -> None:
        """Adds the originals that `keep` [B, G, T] names."""
        xp = ops_of(keep)
        B, G, T = keep.shape
        flat = xp.astype(keep.swapaxes(1, 2).reshape(B, T * G), xp.dtype("int32"))
        m = G if T == 1 else int(xp.max(xp.sum(flat, -1), 0))
        order = xp.argsort(1 - flat, -1)[:, :m]  # the retained first, in their order
        live = xp.take_along_axis(flat, order, -1) > 0
        index = xp.where(live, order + self.n * G, -1)
        width = a.shape[1] * a.shape[3] // G
        at = xp.broadcast_to(order[..., None], (B, m, width))
        a, b = (
            xp.take_along_axis(
                vectors(x, self.method.granularity).swapaxes(1, 2).reshape(B, T * G, width), at, 1
            )
            for x in (a, b)
        )
        index = xp.astype(index, xp.dtype("int32"))
        if self.originals is None:
            self.originals = Originals(index, a, b, m)
        else:
            self.originals.append(index, a, b)

    def read(self, which: int, start: int, stop: int) -> Array:
        """Tokens of layer a (0) or b (1): norm e, the originals in their places.

        Shapes: returns [B, H, stop - start, D], in the coordinates that directions are stored in.
        """
        if isinstance(self.directions, Coded):
            e = self.directions.read(start, stop)
            e = e / math.sqrt(e.shape[-1])
        else:
            e = self.directions.tokens(start, stop)
        xp = ops_of(e)
        x = xp.promote(e)
        if self.norms is not None:
            x = restore(e, self.norms[which].tokens(start, stop))
        kept = self.originals
        if kept is None or kept.index.shape[1] == 0:
            return x
        B, H, T, D = x.shape
        G = H if self.method.granularity == "head" else 1
        at = kept.index - start * G
        at = xp.where((at >= 0) & (at < T * G) & (kept.index >= 0), at, T * G)  # T G: nowhere
        exact = kept.b if which else kept.a
        m, width = exact.shape[1:]
        exact = self.turn(xp.promote(exact).reshape(B, m, width // D, D)).reshape(B, m, width)
        flat = vectors(x, self.method.granularity).swapaxes(1, 2).reshape(B, T * G, width)
        flat = xp.concat([flat, flat[:, :1]], 1)
        where = xp.broadcast_to(xp.astype(at, xp.dtype("int32"))[..., None], exact.shape)
        flat = xp.put_along_axis(flat, where, exact, 1)[:, : T * G]
        return flat.reshape(B, T, H, D).swapaxes(1, 2)

    def runs(self) -> Sequence[int | None]:
        """Numbers of the runs of coded directions; None alone for directions as they are."""
        return range(len(self.directions.runs)) if isinstance(self.directions, Coded) else [None]

    def span(self, run: int | None) -> tuple[int, int]:
        """The tokens of one run, or all."""
        if run is None or not isinstance(self.directions, Coded):
            return 0, self.n
        start = sum(r.tokens for r in self.directions.runs[:run])
        return start, start + self.directions.runs[run].tokens

    def layout(self, which: int, run: int | None) -> Layout:
        """Where the tokens of layer a (0) or b (1) lie, all of them or those of one run."""
        start, stop = self.span(run)
        kept, directions = self.originals, self.directions
        found = Layout(
            start=start,
            norm=self.norms[which].tokens(0, stop) if self.norms else None,
            index=kept.index if kept and kept.index.shape[1] else None,
            exact=(kept.b if which else kept.a) if kept and kept.index.shape[1] else None,
        )
        if not isinstance(directions, Coded):
            return replace(found, dense=directions.tokens(start, stop))
        runs = directions.runs if run is None else [directions.runs[run]]
        gain = runs[0].spec.head_dim ** -0.5  # as `append` lengthened them
        return replace(found, runs=runs, gain=gain)

    def turn(self, x: Array) -> Array:
        """`x` [..., D] into the coordinates that directions are stored in, or back."""
        return self.directions.turn(x) if isinstance(self.directions, Coded) else x

    def rows(self, rows: Sequence[int]) -> Merged:
        """Some of the rows, which may repeat."""

        def take(x: Array) -> Array:
            return ops_of(x).take(x, rows, 0)

        norms, kept, limits = self.norms, self.originals, self.limits
        return replace(
            self,
            directions=self.directions.rows(rows),
            norms=norms and (norms[0].rows(rows), norms[1].rows(rows)),
            originals=kept and Originals(take(kept.index), take(kept.a), take(kept.b), kept.bound),
            limits=limits and Thresholds(take(limits.low), take(limits.high)),
        )

    def parts(self) -> Iterator[Part]:
        """Every array that is held."""
        if isinstance(self.directions, Coded):
            yield from self.directions.parts()
        else:
            yield "directions", self.directions.x, self.directions.slack
        for room in self.norms or ():
            yield "norms", room.x, room.slack
        for limit in self.limits or ():
            yield "thresholds", limit, 0
        if kept := self.originals:
            for x in (kept.index, kept.a, kept.b):
                yield "retained", x, partial(kept.slack, x)
