"""What the server's two threads hand each other: jobs one way, updates the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvc.serve.errors import APIError
from kvc.serve.stops import Stops

if TYPE_CHECKING:
    from kvc.store.report import Report


@dataclass(frozen=True, slots=True)
class Counts:
    """What a job took.

    Attributes:
        prompt: Tokens of the prompt, `cached` of which were read from a stored cache.
        cache_bytes: Of the cache at the end, and `dense_bytes` of a dense one.
    """

    prompt: int
    cached: int
    generated: int
    cache_bytes: int
    dense_bytes: int


@dataclass(frozen=True, slots=True)
class Update:
    """News of a job: more text, or that it is over, with what it took or with why it failed."""

    text: str = ""
    finish: Literal["stop", "length"] | None = None
    counts: Counts | None = None
    error: APIError | None = None


@dataclass(slots=True, eq=False)
class Job:
    """A prompt and how to go on from it.

    Attributes:
        ids: Tokens of the prompt.
        cuts: How many of them other prompts may well begin with; copies are kept there.
        deliver: Takes the updates, in the engine's thread.
        cancelled: Set by whoever waits no longer.
    """

    ids: list[int]
    cuts: tuple[int, ...]
    max_tokens: int
    temp: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    deliver: Callable[[Update], None]
    cancelled: bool = False
    created: float = field(default_factory=time.perf_counter)


@dataclass(slots=True)
class Run:
    """A job in the batch.

    Attributes:
        cuts: How many tokens of the prompt are in each copy that is taken.
        start: Tokens of the prompt that were stored.
    """

    job: Job
    cuts: list[int]
    start: int
    stops: Stops
    generated: int = 0

    def counts(self, report: Report) -> Counts:
        """What it took, with the bytes of its cache."""
        sizes = report.nbytes, report.dense_bytes
        return Counts(len(self.job.ids), self.start, self.generated, *sizes)
