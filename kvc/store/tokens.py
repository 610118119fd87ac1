"""The cache of one layer's rows of one length: sinks, a compressed past, the newest tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvc.backends.base import ALONE, Array, Shard, ops_of
from kvc.methods.gear import Gear
from kvc.ops.attention import Partial, attend_coded, attend_dense
from kvc.ops.past import Layout, Past
from kvc.ops.quant import Role
from kvc.store.clock import Clock
from kvc.store.coded import Coded
from kvc.store.room import Room
from kvc.store.unit import Part, Query, check_finite


@dataclass(slots=True)
class Series:
    """K or V: a compressed past, and a window of tokens as they came: sinks, then the newest."""

    window: Room
    sink: int = 0  # tokens at the window's front that are older than the past, and stay
    past: Past | None = None

    @property
    def n(self) -> int:
        """How many tokens there are."""
        return self.window.n + (self.past.n if self.past else 0)

    @property
    def newest(self) -> int:
        """How many of the newest are in the window."""
        return self.window.n - self.sink

    def older(self, exact: int) -> Past | None:
        """All tokens between the sinks and the newest `exact`."""
        if self.newest == exact:
            return self.past
        return _Behind(self.past, self.window, self.sink, self.newest - exact)

    def drop(self, n: int, capacity: int) -> None:
        """Forgets the window's oldest `n` tokens behind the sinks, which others hold now."""
        self.window.drop(self.sink, n, self.sink + capacity)

    def read(self) -> Array:
        """All tokens [B, H, T, D] as attention sees them, in the dtype that came."""
        if self.past is None or self.past.n == 0:
            return self.window.tokens()
        xp, dtype = ops_of(self.window.x), self.window.x.dtype
        past = xp.astype(self.past.turn(self.past.read(0, self.past.n)), dtype)
        return xp.concat([self.window.tokens(0, self.sink), past, self.window.tokens(self.sink)], 2)

    def parts(self) -> Iterator[Part]:
        """Every array that is held as it came."""
        yield "window", self.window.x, self.window.slack


@dataclass(slots=True)
class _Behind(Past):
    """A past, and behind it `more` tokens of the window, from `first` on."""

    past: Past | None
    window: Room
    first: int
    more: int

    @property
    def n(self) -> int:
        return (self.past.n if self.past else 0) + self.more

    @property
    def n_kv_heads(self) -> int:
        return int(self.window.x.shape[1])

    def read(self, start: int, stop: int) -> Array:
        before = self.past.n if self.past else 0
        xp = ops_of(self.window.x)
        pieces = []
        if self.past and start < before:
            pieces.append(self.past.read(start, min(stop, before)))
        if stop > before:
            begin, end = max(start - before, 0), stop - before
            exact = self.window.tokens(self.first + begin, self.first + end)
            pieces.append(xp.promote(exact))
        return pieces[0] if len(pieces) == 1 else xp.concat(pieces, 2)

    def turn(self, x: Array) -> Array:
        return x  # the codec of a sliding window does not rotate

    def layout(self) -> Layout | None:
        return None

    def pieces(self) -> Sequence[Past]:
        return [self]


@dataclass(slots=True)
class Tokens:
    """One layer's keys and values; with a codec, whole buffers older than its window are coded."""

    k: Series
    v: Series
    codec: Gear | None = None
    layer: int = 0
    clock: Clock | None = None  # of recorded steps
    shard: Shard = ALONE  # the heads that they have

    @property
    def faces(self) -> tuple[Tokens]:
        """The only layer's side."""
        return (self,)

    def shared(self) -> Iterator[Part]:
        """Nothing: there is one layer."""
        return iter(())

    @property
    def held(self) -> int:
        """How many of the newest tokens can be forgotten."""
        return min(self.k.newest, self.v.newest)

    def append(self, k: Array, v: Array) -> None:
        """Adds tokens [B, H, L, D]."""
        at = self.clock.at if self.clock and self.clock.on else None
        self.k.window.append(k, at=at)
        self.v.window.append(v, at=at)

    @property
    def steady(self) -> bool:
        """Whether one more token only enters the windows, whose buffers have room for it."""
        codec, k, v = self.codec, self.k, self.v
        return (
            codec is not None
            and isinstance(k.past, Coded)
            and isinstance(v.past, Coded)
            and k.newest == v.newest
            and due(codec, k, codec.buffer) == 0
            and k.window.n < min(k.window.x.shape[2], v.window.x.shape[2])
        )

    @property
    def counts(self) -> tuple[int, int]:
        """Of steady tokens: those in each window, and those in the run that grows."""
        assert isinstance(self.k.past, Coded)
        return self.k.window.n, self.k.past.runs[-1].tokens

    def advance(self) -> None:
        """Counts a token that a recorded step has written."""
        self.k.window.n += 1
        self.v.window.n += 1

    def settle(self, prompt: bool) -> None:
        """Codes the tokens that are due.

        A prompt's are coded as one block with the prompt's rank, later ones a buffer at a time.

        Raises:
            KVCError: if a prompt's K or V hold NaN or infinity, naming the layer.
        """
        codec = self.codec
        if codec is None:
            return
        n_k = n_v = due(codec, self.k, codec.buffer)
        slides = codec.value_window == "sliding"  # the newest `buffer` values stay, whatever K does
        if slides:
            n_v = max(0, self.v.window.n - codec.sink - codec.buffer)
        if n_k + n_v == 0:
            return
        if prompt:  # later blocks are not looked at: it would stall the device
            oldest = codec.sink + max(n_k, n_v)
            k, v = (series.window.tokens(0, oldest) for series in (self.k, self.v))
            check_finite(self.layer, k, v)
        self.k.sink = self.v.sink = codec.sink
        size_v = 1 if slides else codec.buffer
        self._code(self.k, "k", codec, n_k, n_k if prompt else codec.buffer, prompt)
        self._code(self.v, "v", codec, n_v, n_v if prompt else size_v, prompt)

    def _code(
        self, series: Series, role: Role, codec: Gear, n: int, size: int, prompt: bool
    ) -> None:
        if n == 0:
            return
        past = series.past
        if not isinstance(past, Coded):
            series.past = past = Coded(codec, role, self.layer, shard=self.shard)
        for start in range(0, n, size):
            block = series.window.tokens(series.sink + start, series.sink + start + size)
            past.append(block, codec.prefill_rank if prompt else codec.rank)
        spare = codec.value_window == "sliding" and role == "v"  # the token that slides out next
        series.drop(n, codec.window + codec.buffer + spare)

    def attend(self, query: Query) -> Partial:
        """The answer of all tokens; the newest L are the queries' own."""
        q, scale, softcap = query.q, query.scale, query.softcap
        if self.clock and self.clock.on:
            return self._attend_by(self.clock, query)
        k, v, exact, parts = self.k, self.v, self.held, []
        older_k, older_v = k.older(exact), v.older(exact)
        if older_k and older_v and older_k.n:
            for piece_k, piece_v in _pieces(older_k, older_v):
                parts.append(attend_coded(q, piece_k, piece_v, scale, softcap=softcap))
        start_k = start_v = 0
        if k.newest != v.newest:  # a sliding window: its tokens are not behind the sinks
            start_k, start_v = k.window.n - exact, v.window.n - exact
            if k.sink:
                sink_k, sink_v = k.window.tokens(0, k.sink), v.window.tokens(0, k.sink)
                parts.append(attend_dense(q, sink_k, sink_v, scale, softcap=softcap))
        return attend_dense(
            q, k.window.tokens(start_k), v.window.tokens(start_v), scale,
            causal=True, softcap=softcap, joined=parts, sinks=query.sinks, dtype=q.dtype,
        )  # fmt: skip

    def _attend_by(self, clock: Clock, query: Query) -> Partial:
        """The same of steady tokens, where the device says how many there are in the buffers."""
        q, scale, softcap, parts = query.q, query.scale, query.softcap, []
        assert isinstance(self.k.past, Coded)
        assert isinstance(self.v.past, Coded)
        pieces = zip(self.k.past.roomy(), self.v.past.roomy(), strict=True)
        for (piece_k, growing), (piece_v, _) in pieces:
            length = clock.coded if growing else None
            parts.append(attend_coded(q, piece_k, piece_v, scale, softcap=softcap, length=length))
        return attend_dense(
            q, self.k.window.x, self.v.window.x, scale, causal=True, softcap=softcap,
            length=clock.end, joined=parts, sinks=query.sinks, dtype=q.dtype,
        )  # fmt: skip

    def read(self) -> tuple[Array, Array]:
        """K and V [B, H, T, D] as attention sees them, in the dtype that came."""
        return self.k.read(), self.v.read()

    def trim(self, n: int) -> None:
        """Forgets the newest `n` tokens, at most `held`."""
        self.k.window.n -= n
        self.v.window.n -= n

    def rows(self, rows: Sequence[int]) -> Tokens:
        """Some of the rows, which may repeat."""

        def picked(series: Series) -> Series:
            past = series.past
            return Series(
                series.window.rows(rows),
                series.sink,
                past.rows(rows) if isinstance(past, Coded) else past,
            )

        return replace(self, k=picked(self.k), v=picked(self.v), clock=None)

    def parts(self) -> Iterator[Part]:
        """Every array that is held."""
        for series in (self.k, self.v):
            yield from series.parts()
            if isinstance(series.past, Coded):
                yield from series.past.parts()


def due(codec: Gear, series: Series, size: int) -> int:
    """How many tokens behind the sinks are older than the codec's window, in whole `size`s."""
    free = series.window.n - codec.sink - codec.window
    return max(0, free // size * size)


def _pieces(k: Past, v: Past) -> list[tuple[Past, Past]]:
    """Keys and values in pieces of the same tokens, as few as there are layouts in memory."""
    of_k, of_v = k.pieces(), v.pieces()
    if [piece.n for piece in of_k] != [piece.n for piece in of_v]:
        return [(k, v)]
    return list(zip(of_k, of_v, strict=True))
