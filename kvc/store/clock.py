"""What a recorded step of decoding cannot know when it is recorded: how many tokens there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvc.backends.base import Array, ops_of


@dataclass(slots=True, eq=False)  # a clock is itself: comparing its arrays would ask the device
class Clock:
    """Counts of rows of one length, on the device, for steps of one token in every layer."""

    at: Array  # int64 [1], where in the windows the token goes
    end: Array  # int32 [1], tokens in the windows once it is there
    coded: Array  # int32 [1], coded tokens in the run that grows
    counts: tuple[int, int]  # what `at` and `coded` are
    on: bool = False  # whether the device tells the counts now

    @classmethod
    def of(cls, counts: tuple[int, int], like: Array) -> Clock:
        """For so many tokens in the windows and in the run that grows."""

        def number(x: int, dtype: str) -> Array:
            return ops_of(like).from_numpy(np.array([x], dtype), like)

        n, coded = counts
        return cls(number(n, "int64"), number(n + 1, "int32"), number(coded, "int32"), counts)

    def set(self, counts: tuple[int, int]) -> None:
        """Follows what the store has done without this clock."""
        more, more_coded = (new - old for new, old in zip(counts, self.counts, strict=True))
        self.at += more
        self.end += more
        self.coded += more_coded
        self.counts = counts

    def tick(self) -> None:
        """Ends a step on the device; a step that is replayed does so by itself."""
        self.at += 1
        self.end += 1

    def advance(self) -> None:
        """Ends it here."""
        n, coded = self.counts
        self.counts = n + 1, coded
