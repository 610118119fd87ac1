"""A buffer that tokens are appended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvc.backends.base import Array, ops_of

GROWTH = 16  # tokens by which a buffer grows at least


@dataclass(slots=True)
class Room:
    """One tensor's tokens: the first `n` along axis 2 of `x` [B, H, capacity, ...]."""

    x: Array
    n: int

    @classmethod
    def of(cls, x: Array) -> Room:
        """All of `x`, which must be nobody else's."""
        return cls(x, x.shape[2])

    @property
    def slack(self) -> int:
        """Bytes that no token uses yet."""
        capacity = max(1, self.x.shape[2])
        return int(self.x.nbytes // capacity * (capacity - self.n)) if self.x.nbytes else 0

    def append(self, x: Array, growth: int = GROWTH, at: Array | None = None) -> None:
        """Adds tokens behind the others; a full buffer grows by `growth` or an eighth.

        `at` [1] is where that is, if the device is to say it.
        """
        end = self.n + x.shape[2]
        if self.x.shape[2] == 0:
            self.x, self.n = x, end
            return
        if end > self.x.shape[2]:
            self.reserve(max(end, self.x.shape[2] + max(growth, self.n // 8)))
        self.x = ops_of(x).write(self.x, self.n if at is None else at, x, 2)
        self.n = end

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in all."""
        xp = ops_of(self.x)
        missing = capacity - self.x.shape[2]
        if missing > 0:
            shape = (*self.x.shape[:2], missing, *self.x.shape[3:])
            self.x = xp.concat([self.x, xp.zeros(shape, self.x.dtype, self.x)], 2)

    def tokens(self, start: int = 0, stop: int | None = None) -> Array:
        """Some of the tokens, a view."""
        return self.x[:, :, start : self.n if stop is None else stop]

    def drop(self, start: int, n: int, capacity: int) -> None:
        """Forgets `n` tokens from `start` on, in a buffer of `capacity`: this one, if it is."""
        xp = ops_of(self.x)
        rest = xp.copy(self.tokens(start + n))
        if self.x.shape[2] != capacity:
            self.x = xp.concat([self.tokens(0, start), rest], 2) if start else rest
            self.reserve(capacity)
        elif rest.shape[2]:
            self.x = xp.write(self.x, start, rest, 2)
        self.n -= n

    def rows(self, rows: Sequence[int], start: int = 0) -> Room:
        """Some of the rows, from a token on."""
        return Room(ops_of(self.x).take(self.tokens(start), rows, 0), self.n - start)
