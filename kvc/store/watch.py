"""Queries that eviction policies look at, kept for as long as they may be taken back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvc.backends.base import Array, ops_of
from kvc.ops.mass import attention_mass
from kvc.store.unit import Part, Query

RECALL = 64  # newest queries of a step whose mass is added late, so that they can be forgotten


@dataclass(slots=True)
class Watch:
    """The newest queries, whose attention mass is not added to the scores yet."""

    query: Query | None = None

    def see(self, query: Query) -> Query | None:
        """Takes note of a step's queries; returns those that are too many to wait."""
        L = query.q.shape[2]
        if L <= RECALL:
            self.query = query
            return None
        # a slice would keep all of a prompt's queries alive
        self.query = query._replace(q=ops_of(query.q).copy(query.q[:, :, L - RECALL :]))
        return query._replace(q=query.q[:, :, : L - RECALL])

    def trim(self, n: int) -> None:
        """Forgets the newest `n` queries."""
        if self.query is not None:
            left = self.query.q.shape[2] - n
            self.query = self.query.part(0, left) if left > 0 else None

    def newest(self, n: int) -> Watch:
        """The newest `n` queries, where there are more."""
        query = self.query
        if query is None or n == 0:
            return Watch()
        return Watch(query.part(max(0, query.q.shape[2] - n), query.q.shape[2]))

    def parts(self) -> Iterator[Part]:
        """The queries that are held, and what is known of their answers."""
        if self.query is not None:
            yield "queries", self.query.q, 0
            if self.query.lse is not None:
                yield "queries", self.query.lse, 0

    def rows(self, rows: Sequence[int]) -> Watch:
        """The queries of some of the rows."""
        query = self.query
        if query is None:
            return Watch()
        xp = ops_of(query.q)
        lse = None if query.lse is None else xp.take(query.lse, rows, 0)
        return Watch(query._replace(q=xp.take(query.q, rows, 0), lse=lse))


def mass(query: Query, k: Array, valid: Array | None) -> Array:
    """Attention mass [B, H, T] of keys, of which the newest are the queries' own."""
    return attention_mass(
        query.q, k, query.scale,
        valid=valid, softcap=query.softcap, sinks=query.sinks, lse=query.lse,
    )  # fmt: skip
