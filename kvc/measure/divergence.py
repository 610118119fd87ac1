"""How far a compressed cache moves what a model says next, beside the full cache, token by token.

Both caches read the same tokens. Predictions are counted from the first on that a compressed token
could change: the prompt is read exactly, and compressed when the first token after it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, Engine, ops_of
from kvc.measure.perplexity import (
    Perplexity,
    batch_size,
    check_ranges,
    check_rows,
    feed,
    log_sum_exp,
    not_finite,
    surprise,
)
from kvc.methods import Method, parse

CHUNK = 512  # tokens of a prompt in one piece
PIECE = 32  # tokens that the full cache reads at a time: it loses nothing by that


@dataclass(frozen=True, slots=True, eq=False)
class Divergence:
    """Predictions behind a prompt: column j is that of token `prompt + 1 + j`."""

    prompt: int
    nll: NDArray[np.float64]  # [n, S], -log p of the tokens that come, in nats
    kl: NDArray[np.float64]  # [n, S], KL(full || compressed) of the next token, in nats
    same: NDArray[np.bool_]  # [n, S], whether both find the same token the most probable
    nbytes: int  # of the caches of all rows, measured
    dense_bytes: int  # of the same tokens, uncompressed

    @property
    def perplexity(self) -> Perplexity:
        """What the predictions cost."""
        return Perplexity(self.nll, self.nbytes, self.dense_bytes)

    def buckets(self, n: int) -> Iterator[tuple[int, int, slice]]:
        """Up to `n` equal parts of the predictions: positions in the row, and columns.

        A prediction has the position of the token that it is made from.
        """
        S = self.nll.shape[1]
        cuts = sorted({round(i * S / n) for i in range(n + 1)})
        for start, stop in pairwise(cuts):
            yield self.prompt + start, self.prompt + stop, slice(start, stop)


def divergence(
    engine: Engine,
    ids: NDArray[Any],
    method: Method,
    prompt: int,
    *,
    prefill: str = "exact",
    batch: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Feeds rows [n, T] to a compressed cache token by token, and to a full one beside it.

    The last token of a row is predicted and not fed.

    Args:
        engine: The model.
        ids: Tokens of rows of one length. [n, T].
        method: How the cache is compressed.
        prompt: Tokens that come before, and are compressed as a prompt is.
        prefill: How that is, `exact` or `stream`; see `feed`.
        batch: How many rows at a time; by default as many as memory bears.
        on_step: Called with the tokens fed so far, and how many there are in all rows.

    Raises:
        ConfigError: If rows are too short or too long for the model, or an argument is out of
            range.
        KVCError: If a probability is no number.
    """
    ids = np.asarray(ids)
    check_rows(engine, ids, "divergence")
    n, fed = ids.shape[0], ids.shape[1] - 1
    check_ranges("divergence", {"prompt": (prompt, 1, fed - 1), "batch": (batch, 1, None)})
    batch = batch or batch_size(engine, fed, min(CHUNK, prompt))
    nll, kl = np.empty((n, fed - prompt)), np.empty((n, fed - prompt))
    same = np.empty((n, fed - prompt), bool)
    nbytes, dense_bytes = 0, 0
    for first in range(0, n, batch):
        some = ids[first : first + batch]
        cache = engine.make_cache(method, prefill)
        mine = behind(feed(engine, cache, some[:, :-1], prompt, 1, CHUNK), prompt)
        whole = engine.make_cache(parse("none"))
        full = behind(feed(engine, whole, some[:, :-1], prompt, PIECE, CHUNK), prompt)
        for start, stop, expected in full:
            for place in range(start, stop):
                _, _, logits = next(mine)
                rows, column = slice(first, first + len(some)), place - prompt
                right = expected[:, place - start : place - start + 1]
                target = some[:, place + 1 : place + 2]
                nll[rows, column] = surprise(logits, target)[:, 0]
                kl[rows, column], same[rows, column] = apart(right, logits)
                if not np.isfinite(kl[rows, column] + nll[rows, column]).all():
                    raise not_finite("divergence", place, place + 1)
                if on_step is not None:
                    on_step(first * fed + len(some) * (place + 1), n * fed)
        report = engine.store(cache).report()
        nbytes, dense_bytes = nbytes + report.nbytes, dense_bytes + report.dense_bytes
    return Divergence(prompt, nll, kl, same, nbytes, dense_bytes)


def behind(
    pieces: Iterator[tuple[int, int, Array]], prompt: int
) -> Iterator[tuple[int, int, Array]]:
    """The pieces that come after the prompt; those of the prompt are fed and passed over."""
    return (piece for piece in pieces if piece[0] >= prompt)


def apart(full: Array, other: Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """KL(full || other) in nats of one prediction, and whether both have one most probable token.

    Shapes: full, other [B, 1, V] logits; returns [B] each.
    """
    xp = ops_of(full)
    p, q = (x - log_sum_exp(x) for x in (xp.promote(full), xp.promote(other)))
    kl = xp.sum(xp.exp(p) * (p - q), -1)
    at_best = xp.where(p >= xp.max(p, -1, keepdims=True), q, -np.inf)
    same = xp.max(at_best, -1) >= xp.max(q, -1)  # without an order of all the vocabulary
    return xp.to_numpy(kl)[:, 0].astype(np.float64), xp.to_numpy(same)[:, 0]
