"""Free runs: what a model writes by itself, and how soon a compressed cache writes otherwise."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Engine, ops_of
from kvc.measure.divergence import CHUNK, Divergence
from kvc.measure.perplexity import batch_size, check_ranges, check_rows, feed, not_finite
from kvc.methods import Method, parse

OnStep = Callable[[int, int], None]


def continued(
    engine: Engine,
    prompts: NDArray[Any],
    length: int,
    *,
    temp: float = 0.0,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> NDArray[np.int32]:
    """Rows [n, P + length]: prompts [n, P], and what the model writes behind them.

    It reads from the full cache, and goes on behind an end of text.

    Args:
        engine: The model.
        prompts: Tokens of rows of one length.
        length: Tokens to write.
        temp: Of the samples; 0 takes the likeliest token.
        seed: Of the samples, whose noise is the same on every backend.
        on_step: Called with the tokens fed so far, and how many there are in all rows.

    Raises:
        ConfigError: If the rows would be too long for the model.
        KVCError: If a probability is no number.
    """
    n, P = prompts.shape
    check_ranges("runs", {"length": (length, 1, None)})
    ids = np.concatenate([prompts, np.zeros((n, length))], 1).astype(np.int32)
    check_rows(engine, ids, "runs")
    noise = np.random.default_rng(seed)
    total, batch = P + length - 1, batch_size(engine, P + length, min(CHUNK, P))
    for first in range(0, n, batch):
        rows = ids[first : first + batch]
        cache = engine.make_cache(parse("none"))
        *_, (_, _, logits) = feed(engine, cache, rows[:, :P], P, 1, CHUNK)
        for place in range(P, P + length):
            xp = ops_of(logits)
            scores = xp.to_numpy(xp.promote(logits[:, -1])).astype(np.float64)
            if not np.isfinite(scores).all():
                raise not_finite("runs", place - 1, place)
            if temp:  # the largest of these is a sample (Gumbel's trick)
                scores = scores / temp + noise.gumbel(size=scores.shape)
            rows[:, place] = scores.argmax(-1)
            if on_step is not None:
                on_step(first * total + len(rows) * place, n * total)
            if place + 1 < P + length:
                logits = engine.logits(rows[:, place : place + 1], cache)
    return ids


def same_prefix(found: Divergence) -> NDArray[np.int64]:
    """Tokens that greedy runs of both caches have in common, of rows that the full one wrote. [n].

    Up to there both read the same tokens, so that a forced run tells what a free one would write.
    """
    return np.asarray(np.cumprod(found.same, axis=1).sum(1))


class Lengths(NamedTuple):
    """How long free answers are."""

    tokens: NDArray[np.int64]  # [n]
    limit: int  # tokens after which an answer is cut off

    @property
    def ended(self) -> float:
        """Share of the answers that ended before the limit."""
        return float((self.tokens < self.limit).mean())


def answers(
    engine: Engine,
    prompts: NDArray[Any],
    method: Method,
    limit: int,
    *,
    prefill: str = "exact",
    on_step: OnStep | None = None,
) -> Lengths:
    """How many tokens the library's own loop writes behind each prompt [n, P], greedily.

    Args:
        engine: The model.
        prompts: Tokens of rows of one length.
        method: How the cache is compressed.
        limit: Tokens after which an answer is cut off.
        prefill: How prompts are compressed, `exact` or `stream`.
        on_step: Called with the tokens fed or written so far, and how many there are at most.
    """
    n, P = prompts.shape
    lengths = []
    for row, prompt in enumerate(prompts):
        pieces = engine.stream(
            [int(token) for token in prompt],
            engine.make_cache(method, prefill),
            max_tokens=limit, temp=0.0, top_p=1.0, seed=None, prefill_step=CHUNK, on_prefill=None,
        )  # fmt: skip
        tokens = 0
        with closing(cast("Generator[Any, None, None]", pieces)):  # where `on_step` raises
            for _ in pieces:
                tokens += 1
                if on_step is not None:
                    on_step(row * (P + limit) + P + tokens, n * (P + limit))
        lengths.append(tokens)
    return Lengths(np.asarray(lengths), limit)
