"""Whose turn it is among sequences that are generated together, on any library."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, Protocol

from kvc.backends.base import chunk_size
from kvc.backends.sequences import Event, Piece
from kvc.backends.text import Text
from kvc.errors import ConfigError


@dataclass(slots=True, eq=False)
class Row:
    """One sequence of a batch.

    Attributes:
        pieces: Of the prompt, those that are still to come, and the segment that each ends.
        ids: What the cache holds behind what it came with.
        made: How many tokens were generated.
    """

    key: int
    cache: Any
    pieces: deque[tuple[list[int], int | None]]
    max_tokens: int
    temp: float
    top_p: float
    seed: int | None
    stop: frozenset[int]
    text: Text
    total: int
    done: int = 0
    ids: list[int] = field(default_factory=list)
    made: int = 0


class Runner(Protocol):
    """What a library does for the sequences whose turn it is."""

    lone: bool  # whether a prompt's last token goes alone

    def feed(self, row: Row, piece: list[int]) -> None:
        """Processes a piece of a prompt that is not its last."""

    def copy(self, row: Row) -> Any:
        """A copy of the cache of a sequence in its prompt."""

    def start(self, row: Row, piece: list[int]) -> int:
        """Processes the last piece; the sequence runs from now on. Returns its first token."""

    def step(self) -> list[tuple[Row, int | Exception]]:
        """One more token of every sequence that runs, or what its own work raised."""

    def leave(self, row: Row) -> Any:
        """Takes a sequence out of those that run; returns its cache."""

    def clear(self) -> None:
        """Takes out all, whose caches are lost."""


class Turns:
    """A `Batch` over a runner.

    A piece of one prompt and a step of all that run take turns, so that neither waits for long; the
    prompts themselves are processed one after the other, in the order they came.

    Args:
        runner: The library's.
        tokenizer: The model's.
        stop_tokens: The model's own.
        limit: Sequences that run at a time, the one in its prompt included.
        prefill_step: Tokens of a prompt in one piece, about.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        stop_tokens: Sequence[int],
        limit: int,
        prefill_step: int,
    ) -> None:
        if limit < 1:
            raise ConfigError(f"batch: expected a limit of one sequence at least, got {limit}")
        self.batch_limit = limit
        self._runner, self._tokenizer, self._stop = runner, tokenizer, stop_tokens
        self._prefill_step = prefill_step
        self._keys = count()
        self._waiting: deque[Row] = deque()  # the first of them may be in its prompt already
        self._running: dict[int, Row] = {}
        self._stepped = True  # whether the last turn was that of those that run

    def add(
        self,
        segments: Sequence[Sequence[int]],
        cache: Any,
        *,
        max_tokens: int,
        temp: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_tokens: Sequence[int] | None = None,
    ) -> int:
        """Queues the rest of a prompt; see `kvc.backends.sequences.Batch`."""
        prompt = [token for segment in segments for token in segment]
        if not prompt:
            raise ConfigError("batch: expected a token of the prompt behind the cache, got none")
        if max_tokens < 1:
            raise ConfigError(f"batch: expected max_tokens of one at least, got {max_tokens}")
        row = Row(
            next(self._keys),
            cache,
            deque(_pieces(segments, self._prefill_step, self._runner.lone)),
            max_tokens,
            temp,
            top_p,
            seed,
            frozenset(self._stop if stop_tokens is None else stop_tokens),
            Text(self._tokenizer, prompt),
            len(prompt),
        )
        self._waiting.append(row)
        return row.key

    def step(self) -> list[Event]:
        """A piece of one prompt, or a token of every sequence, in turns; [] when all is done."""
        room = self._waiting and len(self._running) < self.batch_limit
        if room and (self._stepped or not self._running):
            self._stepped = False
            return self._prompt(self._waiting[0])
        self._stepped = True
        return self._token() if self._running else []

    def remove(self, key: int) -> Event | None:
        """Takes a sequence out at any stage; see `kvc.backends.sequences.Batch`."""
        self._waiting = deque(row for row in self._waiting if row.key != key)
        row = self._running.pop(key, None)
        return self._end(row) if row else None

    def _prompt(self, row: Row) -> list[Event]:
        """The next piece of a prompt."""
        piece, segment = row.pieces.popleft()
        try:
            if row.pieces:
                self._runner.feed(row, piece)
                row.ids += piece
            else:
                first = self._runner.start(row, piece)
        except Exception as error:  # whatever it is, it is this sequence's alone
            self._waiting.popleft()
            return [Event(row.key, "error", error=error)]
        row.done += len(piece)
        events = [Event(row.key, "prefill", row.done, row.total)]
        if not row.pieces:
            self._waiting.popleft()
            self._running[row.key] = row
            return [*events, *self._said(row, first)]
        if segment is not None:
            cache, ids = self._runner.copy(row), tuple(row.ids)
            events.append(Event(row.key, "segment", index=segment, cache=cache, ids=ids))
        return events

    def _token(self) -> list[Event]:
        """One more token of all that run."""
        try:
            found = self._runner.step()
        except Exception as error:  # of all together: nobody's cache is whole
            self._runner.clear()
            keys, self._running = [*self._running], {}
            return [Event(key, "error", error=error) for key in keys]
        events: list[Event] = []
        for row, token in found:
            if isinstance(token, Exception):
                self.remove(row.key)
                events.append(Event(row.key, "error", error=token))
            else:
                events += self._said(row, token)
        return events

    def _said(self, row: Row, token: int) -> Iterator[Event]:
        """What a new token tells, and whether it was the last."""
        row.made += 1
        yield Event(row.key, "token", piece=Piece(row.text.add(token), token))
        finish: Literal["stop", "length"]
        if token in row.stop:
            finish = "stop"
        elif row.made >= row.max_tokens:
            finish = "length"
        else:
            return
        del self._running[row.key]
        yield self._end(row, finish)

    def _end(self, row: Row, finish: Literal["stop", "length"] | None = None) -> Event:
        cache = self._runner.leave(row)
        return Event(row.key, "end", finish=finish, cache=cache, ids=tuple(row.ids))


def _pieces(
    segments: Sequence[Sequence[int]], step: int, lone: bool
) -> Iterator[tuple[list[int], int | None]]:
    """Segments in pieces, as `Engine.stream` cuts a prompt, and the segment that each ends.

    The end of the last one is the prompt's, which the first token tells.
    """
    last = max(i for i, segment in enumerate(segments) if segment)
    tail = segments[last][-1:] if lone else []
    for i, segment in enumerate(segments):
        n = len(segment) - (len(tail) if i == last else 0)
        size = chunk_size(n, step)
        for start in range(0, n, size):
            stop = min(start + size, n)
            yield list(segment[start:stop]), i if stop == n and i != last else None
    if tail:
        yield list(tail), None
