"""Times of several runs that take turns, so that what else the machine does hits all alike.

They are of the wall: what a launch costs the CPU is part of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class NotRaced(Exception):  # noqa: N818 - no error: why there are no figures
    """Why there is nothing to measure."""


class Times(NamedTuple):
    """Seconds of equal runs."""

    median: float
    low: float  # the quartiles
    high: float
    n: int

    @classmethod
    def of(cls, each: Sequence[float]) -> Times:
        """The median and the quartiles."""
        low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else [*each] * 3
        return cls(middle, low, high, len(each))

    def fields(self, name: str) -> dict[str, Any]:
        """In milliseconds: the median as `name`, and the spread."""
        low, high = 1e3 * self.low, 1e3 * self.high
        return {name: 1e3 * self.median, f"{name}_spread": [low, high], f"{name}_runs": self.n}


def wall(run: Callable[[], Any], sync: Callable[[Any], None]) -> float:
    """Seconds until what a run returns is there; the device has nothing else to do."""
    start = time.perf_counter()
    sync(run())
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[str, Callable[[], Any]], repeat: int, check: Callable[[], None]
) -> dict[str, list[Any]]:
    """What each run returns each time; every round begins with another one.

    Args:
        runs: By name.
        repeat: How many rounds.
        check: Called before each run; raises after Ctrl-C.
    """
    names = list(runs)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(repeat):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            check()
            found[name].append(runs[name]())
    return found
