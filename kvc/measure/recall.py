"""Recall of planted facts through the cache: what a method forgets, by how long ago it was told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, Engine, ops_of
from kvc.errors import ConfigError
from kvc.measure.facts import NEAREST, Planted, plant
from kvc.measure.perplexity import batch_size, check_ranges, check_rows, feed, not_finite
from kvc.methods.base import Method


@dataclass(frozen=True, slots=True)
class Bucket:
    """Recall of the facts that were told between `low` and `high` tokens before the question."""

    low: int
    high: int  # exclusive
    facts: int
    digits: float  # share of right digits: of right tokens, where one has several digits
    numbers: float  # share of facts of which every digit is right


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall by distance and of all facts, and what the cache held at the end."""

    buckets: tuple[Bucket, ...]  # those with facts, the nearest first
    facts: int
    digits: float
    numbers: float
    nbytes: int  # of the caches of all rows, measured
    dense_bytes: int  # of the same tokens, uncompressed


class Answers(NamedTuple):
    """Which tokens of the numbers are right, and what the cache held at the end."""

    right: NDArray[np.bool_]  # [n, F, tokens of a number]
    nbytes: int  # of the caches of all rows, measured
    dense_bytes: int  # of the same tokens, uncompressed


def recall(
    engine: Engine,
    texts: Sequence[Sequence[int] | NDArray[Any]],
    method: Method,
    *,
    n: int = 96,
    length: int = 2048,
    n_facts: int = 8,
    seed: int = 0,
    step: int = 1,
    prefill: str = "exact",
    chunk: int | None = None,
    batch: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Recall:
    """Tells a model facts in the midst of texts, and asks for them at the end.

    All up to the questions is the prompt. The questions follow token by token, with their right
    answers, on the same cache. A digit is right if it is the most probable token after the right
    ones before it, so that a number is right if greedy decoding would write it.

    Args:
        engine: The model.
        texts: Tokens of texts, without special ones; they take turns.
        method: How the cache is compressed.
        n: Contexts.
        length: Tokens of a context, questions included.
        n_facts: Facts in a context.
        seed: Of passages, facts and distances.
        step: Tokens of the questions in a piece.
        prefill: How the prompt is compressed, `exact` or `stream`; see `feed`.
        chunk: Tokens in a piece of the prompt, about; by default it comes in one.
        batch: How many contexts at a time; by default as many as memory bears.
        on_step: Called with the tokens fed so far, and how many there are in all contexts.

    Raises:
        ConfigError: If an argument is out of range, or a context is too long for the model or
            too short for the facts.
        KVCError: If a probability is no number.
    """
    counts = {"n": n, "n_facts": n_facts}
    check_ranges("recall", {name: (value, 1, None) for name, value in counts.items()})
    if not texts:
        raise ConfigError("recall: expected a text, got none")
    planted = plant(engine, texts, n, length, n_facts, seed)
    found = ask(
        engine, planted, method,
        step=step, prefill=prefill, chunk=chunk, batch=batch, on_step=on_step,
    )  # fmt: skip
    return Recall(
        tuple(_buckets(planted.distances, found.right, length)),
        n * n_facts,
        float(found.right.mean()),
        float(found.right.all(-1).mean()),
        found.nbytes,
        found.dense_bytes,
    )


def ask(
    engine: Engine,
    planted: Planted,
    method: Method,
    *,
    step: int = 1,
    prefill: str = "exact",
    chunk: int | None = None,
    batch: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Answers:
    """Feeds rows with planted facts, and notes which tokens of their numbers are right.

    Args:
        engine: The model.
        planted: The rows.
        method: How the cache is compressed.
        step: Tokens of the questions in a piece.
        prefill: How what comes before them is compressed, `exact` or `stream`; see `feed`.
        chunk: Tokens in a piece of that, about; by default it comes in one.
        batch: How many rows at a time; by default as many as memory bears.
        on_step: Called with the tokens fed so far, and how many there are in all rows.

    Raises:
        ConfigError: If an argument is out of range, or the rows are too long for the model.
        KVCError: If a probability is no number.
    """
    counts = {"step": step, "chunk": chunk, "batch": batch}
    check_ranges("recall", {name: (value, 1, None) for name, value in counts.items()})
    check_rows(engine, planted.ids, "recall")
    n, length = planted.ids.shape
    widest = max(min(chunk or length, planted.context), step)
    batch = batch or batch_size(engine, length, widest)
    best = np.empty((n, len(planted.asked), planted.n_tokens), np.int64)
    nbytes, dense_bytes, fed = 0, 0, length - 1
    for first in range(0, n, batch):
        some = planted.ids[first : first + batch]
        cache = engine.make_cache(method, prefill)
        pieces = feed(engine, cache, some[:, :-1], planted.context, step, chunk)
        for start, stop, logits in pieces:
            for fact, digit, place in _asked(planted, start, stop):
                found = _most_probable(logits[:, place - start], place)
                best[first : first + batch, fact, digit] = found
            if on_step is not None:
                on_step(first * fed + len(some) * stop, n * fed)
        report = engine.store(cache).report()
        nbytes, dense_bytes = nbytes + report.nbytes, dense_bytes + report.dense_bytes
    return Answers(planted.right(best), nbytes, dense_bytes)


def _asked(planted: Planted, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The digits that tokens `start` to `stop`, exclusive, predict: fact, digit, and the token."""
    for fact, asked in enumerate(planted.asked):
        for digit in range(planted.n_tokens):
            place = int(asked) + digit - 1
            if start <= place < stop:
                yield fact, digit, place


def _most_probable(logits: Array, place: int) -> NDArray[Any]:
    """The token that greedy decoding would take, of logits [B, V]. [B].

    Raises:
        KVCError: If they are no numbers.
    """
    xp = ops_of(logits)
    if not bool(xp.all(xp.isfinite(logits))):
        raise not_finite("recall", place, place + 1)
    return xp.to_numpy(xp.top_k(logits, 1))[:, 0]


def _buckets(distances: NDArray[Any], right: NDArray[Any], length: int) -> Iterator[Bucket]:
    """Recall by distance [n, F], in buckets that double; `right` is [n, F, digits]."""
    edges = [NEAREST]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    for low, high in pairwise(edges):
        found = right[(distances >= low) & (distances < high)]
        if len(found):
            yield Bucket(low, high, len(found), float(found.mean()), float(found.all(-1).mean()))
