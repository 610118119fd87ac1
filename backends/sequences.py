"""What comes of generating: pieces of one sequence, and events of several that go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token, and the text that it completed."""

    text: str
    token: int


@dataclass(frozen=True, slots=True)
class Event:
    """What a step of a batch has done for one sequence.

    Attributes:
        key: The sequence, as `Batch.add` named it.
        kind: `prefill`: a piece of the prompt is done. `segment`: one of its segments is, but the
            last. `token`: one is there, the one that stops it too. `end`, `error`: all is said.
        done: Of `prefill`: tokens of the prompt up to now, of `total`. `index`: the segment's.
        finish: "stop" where a stop token came, "length" where `max_tokens` were made; None where
            `Batch.remove` made the end.
        cache: Of `segment` a copy up to there, of `end` the cache itself.
        ids: What it holds behind what it came with; the last token generated may be missing.
        error: What this sequence's work raised; all others go on.
    """

    key: int
    kind: Literal["prefill", "segment", "token", "end", "error"]
    done: int = 0
    total: int = 0
    index: int = 0
    piece: Piece | None = None
    finish: Literal["stop", "length"] | None = None
    cache: Any = None
    ids: tuple[int, ...] = ()
    error: Exception | None = None


class Batch(Protocol):
    """Sequences that are generated together, one token of each per step. One thread calls it."""

    batch_limit: int  # sequences that run at a time; more of them wait. 1 where none can be joined

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
        """Queues the rest of a prompt and returns the sequence's key.

        `segments` are cut where copies of the cache are wanted. The cache, of one row, is from
        `make_cache` or an `Event`, and the batch's own from now on. `stop_tokens` end the text, by
        default the model's; all else is as in `Engine.stream`, for this sequence alone.

        Raises:
            ConfigError: If there is no token in the prompt, or none may be generated.
        """

    def step(self) -> list[Event]:
        """A piece of one prompt, or a token of every sequence, in turns; [] when all is done."""

    def remove(self, key: int) -> Event | None:
        """Takes a sequence out at any stage; one that is gone already is no error.

        Returns its end, of no finish, if it was beyond its prompt: the cache is whole then.
        """
