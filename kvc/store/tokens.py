"""The cache of one layer's rows of one length: sinks, a compressed past, a window of the newest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvc.backends.base import Array, ops_of
from kvc.methods.gear import Gear
from kvc.ops.attention import Partial, Past, attend_coded, attend_dense, join
from kvc.ops.quant import Role
from kvc.store.coded import Coded
from kvc.store.room import Room
from kvc.store.unit import Part, Query, check_finite


@dataclass(slots=True)
class Series:
    """K or V: the first tokens as they came, the past, the newest tokens as they came."""

    window: Room
    sink: Room | None = None
    past: Past | None = None

    @property
    def n(self) -> int:
        """How many tokens there are."""
        sink, past = self.sink, self.past
        return (sink.n if sink else 0) + (past.n if past else 0) + self.window.n

    def older(self, exact: int) -> Past | None:
        """All tokens between the sinks and the newest `exact`."""
        if self.window.n == exact:
            return self.past
        return _Behind(self.past, self.window, self.window.n - exact)

    def take_sink(self, n: int) -> None:
        """Moves the first `n` tokens out of the window, for good."""
        self.sink = self.window.part(0, n)
        self.drop(n, 0)

    def drop(self, n: int, capacity: int) -> None:
        """Forgets the window's oldest `n` tokens, which others hold now."""
        self.window = self.window.part(n, self.window.n, capacity)

    def read(self) -> Array:
        """All tokens [B, H, T, D] as attention sees them, in the dtype that came."""
        xp, pieces = ops_of(self.window.x), [self.window.tokens()]
        if self.past and self.past.n:
            past = self.past.turn(self.past.read(0, self.past.n))
            pieces.insert(0, xp.astype(past, self.window.x.dtype))
        if self.sink:
            pieces.insert(0, self.sink.tokens())
        return xp.concat(pieces, 2)

    def parts(self) -> Iterator[Part]:
        """Every array that is held as it came."""
        for room in filter(None, (self.window, self.sink)):
            yield "window", room.x, room.slack


@dataclass(slots=True)
class _Behind:
    """A past, and the first `more` tokens of the window behind it."""

    past: Past | None
    window: Room
    more: int

    @property
    def n(self) -> int:
        return (self.past.n if self.past else 0) + self.more

    def read(self, start: int, stop: int) -> Array:
        before = self.past.n if self.past else 0
        xp = ops_of(self.window.x)
        pieces = []
        if self.past and start < before:
            pieces.append(self.past.read(start, min(stop, before)))
        if stop > before:
            exact = self.window.tokens(max(start - before, 0), stop - before)
            pieces.append(xp.promote(exact))
        return pieces[0] if len(pieces) == 1 else xp.concat(pieces, 2)

    def turn(self, x: Array) -> Array:
        return x  # the codec of a sliding window does not rotate


@dataclass(slots=True)
class Tokens:
    """One layer's keys and values; with a codec, whole buffers older than its window are coded."""

    k: Series
    v: Series
    codec: Gear | None = None
    layer: int = 0

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
        return min(self.k.window.n, self.v.window.n)

    def append(self, k: Array, v: Array) -> None:
        """Adds tokens [B, H, L, D]."""
        self.k.window.append(k)
        self.v.window.append(v)

    def settle(self, prompt: bool) -> None:
        """Codes the tokens that are due.

        A prompt's are coded as one block with the prompt's rank, later ones a buffer at a time.

        Raises:
            KVCError: if K or V hold NaN or infinity, naming the layer.
        """
        codec = self.codec
        if codec is None:
            return
        n_k = n_v = due(codec, self.k, codec.buffer)
        slides = codec.value_window == "sliding"  # the newest `buffer` values stay, whatever K does
        if slides:
            n_v = max(0, self.v.window.n - (0 if self.v.sink else codec.sink) - codec.buffer)
        if n_k + n_v == 0:
            return
        oldest = (0 if self.k.sink else codec.sink) + max(n_k, n_v)
        check_finite(self.layer, self.k.window.tokens(0, oldest), self.v.window.tokens(0, oldest))
        if codec.sink and not self.k.sink:
            self.k.take_sink(codec.sink)
            self.v.take_sink(codec.sink)
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
            series.past = past = Coded(codec, role, self.layer)
        for start in range(0, n, size):
            block = series.window.tokens(start, start + size)
            past.append(block, codec.prefill_rank if prompt else codec.rank)
        spare = codec.value_window == "sliding" and role == "v"  # the token that slides out next
        series.drop(n, codec.window + codec.buffer + spare)

    def attend(self, query: Query) -> Partial:
        """The answer of all tokens; the newest L are the queries' own."""
        q, scale, softcap = query.q, query.scale, query.softcap
        k, v, exact = self.k, self.v, self.held
        newest_k, newest_v = (room.tokens(room.n - exact) for room in (k.window, v.window))
        parts = [attend_dense(q, newest_k, newest_v, scale, causal=True, softcap=softcap)]
        if k.sink and v.sink:
            first_k, first_v = k.sink.tokens(), v.sink.tokens()
            parts.append(attend_dense(q, first_k, first_v, scale, softcap=softcap))
        older_k, older_v = k.older(exact), v.older(exact)
        if older_k and older_v and older_k.n:
            parts.append(attend_coded(q, older_k, older_v, scale, softcap=softcap))
        return join(parts)

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
                series.sink.rows(rows) if series.sink else None,
                past.rows(rows) if isinstance(past, Coded) else past,
            )

        return Tokens(picked(self.k), picked(self.v), self.codec, self.layer)

    def parts(self) -> Iterator[Part]:
        """Every array that is held."""
        for series in (self.k, self.v):
            yield from series.parts()
            if isinstance(series.past, Coded):
                yield from series.past.parts()


def due(codec: Gear, series: Series, size: int) -> int:
    """How many tokens behind the sinks are older than the codec's window, in whole `size`s."""
    free = series.window.n - (0 if series.sink else codec.sink) - codec.window
    return max(0, free // size * size)
