"""Sequences that take a step together, each with a store of its own.

The weights of a model are read once for all of them; each store appends and attends its own row. So
rows of any length, phase and method go together, a row's tokens are what they are alone, and rows
come, go and are handed out without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvc.backends.base import Array, ops_of
from kvc.store.store import KVStore


def append_rows(
    stores: Sequence[KVStore], layer: int, k: Array, v: Array, counts: Sequence[int]
) -> None:
    """Adds the first `counts[i]` tokens of row i to store i; what is behind them is padding.

    Shapes: k, v [B, n_kv_heads, L, head_dim].

    Raises:
        KVCError: From a store, for its row.
    """
    for row, (store, n) in enumerate(zip(stores, counts, strict=True)):
        if not n:
            continue
        new = _row(k, row, n), _row(v, row, n)
        if len(stores) > 1 and not store.length(layer):  # a store keeps its first tokens' arrays
            new = ops_of(k).copy(new[0]), ops_of(v).copy(new[1])
        store.append(layer, *new)


def attend_rows(
    stores: Sequence[KVStore],
    q: Array,
    counts: Sequence[int],
    answer: Callable[[KVStore, Array], Array],
) -> Array:
    """What `answer` says to each row's queries, one store and row at a time; padding gets zeros.

    Shapes: q [B, n_heads, L, D]; `answer` returns [1, n_heads, counts[i], D]; returns as q.
    """
    rows, L = [], q.shape[2]
    for row, (store, n) in enumerate(zip(stores, counts, strict=True)):
        queries = _row(q, row, n)
        out = answer(store, queries) if n else queries
        rows.append(_padded(out, 0, L - n))
    return rows[0] if len(rows) == 1 else ops_of(q).concat(rows, 0)


def read_rows(
    stores: Sequence[KVStore], layer: int, new: int, counts: Sequence[int]
) -> tuple[Array, Array]:
    """K and V of all rows as attention sees them, for models that need tensors.

    The newest `new` columns begin at the same place in all rows: zeros stand before shorter rows,
    and behind those that have fewer than `new` tokens in them.

    Shapes: returns [B, n_kv_heads, T, head_dim].

    Raises:
        ConfigError: If a method evicts tokens.
    """
    before = max(store.length(layer) - n for store, n in zip(stores, counts, strict=True))
    ks: list[Array] = []
    vs: list[Array] = []
    for store, n in zip(stores, counts, strict=True):
        found = store.dense(layer) or store.read(layer)
        for x, into in zip(found, (ks, vs), strict=True):
            into.append(_padded(x, before - (x.shape[2] - n), new - n))
    xp = ops_of(ks[0])
    return xp.concat(ks, 0), xp.concat(vs, 0)


def _row(x: Array, row: int, n: int) -> Array:
    """The first `n` tokens of a row; `x` itself, where that is all."""
    return x if x.shape[0] == 1 and x.shape[2] == n else x[row : row + 1, :, :n]


def _padded(x: Array, before: int, behind: int) -> Array:
    """`x` with columns of zeros before and behind."""
    xp, (B, H, _, D) = ops_of(x), x.shape
    pieces = [x]
    if before:
        pieces.insert(0, xp.zeros((B, H, before, D), x.dtype, x))
    if behind:
        pieces.append(xp.zeros((B, H, behind, D), x.dtype, x))
    return x if len(pieces) == 1 else xp.concat(pieces, 2)
