"""What a store asks of the caches that it is made of: rows of one length, of one layer or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from kvc.backends.base import Array, ops_of
from kvc.errors import KVCError
from kvc.ops.attention import Partial

# What its bytes count for, the array, and the bytes of it that nothing uses yet: a function where
# the device has to be asked.
Part = tuple[str, Array, int | Callable[[], int]]


class Query(NamedTuple):
    """The queries of one step in one layer."""

    q: Array  # [B, Hq, L, D]
    scale: float
    softcap: float | None = None
    sinks: Array | None = None  # [Hq], logits that take part in the softmax without a value
    reader: int = 0  # the layer that asks, which may share another's cache
    lse: Array | None = None  # [B, Hq, L], of the answer, where it is of tokens alone

    def part(self, start: int, stop: int) -> Query:
        """Some of the queries."""
        lse = None if self.lse is None else self.lse[:, :, start:stop]
        return self._replace(q=self.q[:, :, start:stop], lse=lse)


class Face(Protocol):
    """One layer's side of a cache."""

    @property
    def held(self) -> int:
        """How many of the newest tokens can be forgotten."""

    def append(self, k: Array, v: Array) -> None:
        """Adds tokens [B, H, L, D]."""

    def attend(self, query: Query) -> Partial:
        """The answer of all tokens, in the queries' dtype; the newest L are the queries' own."""

    def read(self) -> tuple[Array, Array]:
        """K and V [B, H, T, D] as attention sees them, in the dtype that came.

        Raises:
            ConfigError: if some of the tokens are gone.
        """

    def trim(self, n: int) -> None:
        """Forgets the newest `n` tokens, at most `held`."""

    def parts(self) -> Iterator[Part]:
        """Every array that is held for this layer alone."""


class Unit(Protocol):
    """The cache of rows of one length."""

    @property
    def faces(self) -> Sequence[Face]:
        """The layers' sides, the shallowest first."""

    def settle(self, prompt: bool) -> None:
        """Compresses what is due; `prompt` says whether that is the prompt or a piece of it.

        Raises:
            KVCError: if a prompt's K or V hold NaN or infinity, naming the layer.
        """

    def rows(self, rows: Sequence[int]) -> Unit:
        """Some of the rows, which may repeat."""

    def shared(self) -> Iterator[Part]:
        """Every array that is held for all layers together."""


def check_finite(layer: int, k: Array, v: Array) -> None:
    """That tokens which are compressed now are numbers; waits for the device once.

    Raises:
        KVCError: if K or V hold NaN or infinity, naming the layer.
    """
    for name, x in (("k", k), ("v", v)):
        xp = ops_of(x)
        if not bool(xp.all(xp.isfinite(x))):
            raise KVCError(f"layer {layer}: expected finite numbers in {name}, got NaN or infinity")
