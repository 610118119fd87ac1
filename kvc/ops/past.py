"""Tokens that are not held as they came, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvc.backends.base import Array
from kvc.ops.codec import Code, Spec


class Blocks(Protocol):
    """Equal blocks of coded tokens behind one another."""

    code: Code  # of arrays [capacity, B, ...]
    spec: Spec  # of one block
    n: int  # blocks in use


@dataclass(frozen=True, slots=True)
class Layout:
    """Where kernels find the tokens of a past: coded ones, or directions as they are."""

    runs: Sequence[Blocks] = ()  # oldest first
    dense: Array | None = None  # [B, H, T, D], a view
    gain: float = 1.0  # of every stored vector
    start: int = 0  # what the next three number the first token
    norm: Array | None = None  # [B, G, start + T], of each token's; G = H, or 1 for whole tokens
    index: Array | None = None  # int32 [B, m], token * G + vector, ascending; then -1
    exact: Array | None = None  # [B, m, W], what replaces those; W = D, or H D for whole tokens


class Past(Protocol):
    """Tokens of K or of V that are not held as they came."""

    @property
    def n(self) -> int:
        """How many tokens there are."""

    @property
    def n_kv_heads(self) -> int:
        """How many heads they have."""

    def read(self, start: int, stop: int) -> Array:
        """Tokens [B, H, stop - start, D] in the coordinates they are stored in."""

    def scores(self, q: Array, start: int, stop: int) -> Array:
        """Products [B, H, R, stop - start] of q [B, H, R, D] with tokens, as keys."""
        return q @ self.read(start, stop).swapaxes(-1, -2)

    def sums(self, p: Array, start: int, stop: int) -> Array:
        """Sums [B, H, R, D] of tokens, as values, weighted by p [B, H, R, stop - start]."""
        return p @ self.read(start, stop)

    def turn(self, x: Array) -> Array:
        """`x` [..., D] from the model's coordinates to the stored ones; its own inverse."""

    def layout(self) -> Layout | None:
        """Where they lie; None if they do not lie in one way."""

    def pieces(self) -> Sequence[Past]:
        """The same tokens in pieces that each lie in one way, oldest first."""
