"""Several sequences at a time with mlx-lm: its own step for all that run, prompts one by one.

Prompts are not padded to each other: a sequence's work is then its own, up to its first token, and
so are the errors in it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, StopSequences, generation_stream
from mlx_lm.sample_utils import apply_top_p, greedy_sampler, make_sampler

from kvc.backends.mlx.entry import KVCEntry
from kvc.backends.mlx.rows import KVCRows
from kvc.backends.turns import Row

CLEAR = 256  # steps after which MLX gives back buffers that nobody uses, as mlx-lm's loop does


class Runner:
    """mlx-lm's generation batch over rows that join and leave.

    Args:
        model: The language model.
        joins: Whether its sequences can be joined; else there is one at a time.
    """

    lone = True

    def __init__(self, model: Any, joins: bool) -> None:
        self._model, self._joins = model, joins
        self._batch: Any = None
        self._rows: dict[int, Row] = {}
        self._steps = 0

    def feed(self, row: Row, piece: list[int]) -> None:
        """Processes a piece of a prompt that is not its last."""
        with mx.stream(generation_stream), _prompting(row.cache):
            self._model(mx.array([piece]), cache=row.cache)
            mx.eval([entry.state for entry in row.cache])
        mx.clear_cache()

    def copy(self, row: Row) -> Any:
        """A copy of the cache of a sequence in its prompt."""
        return copy.deepcopy(row.cache)

    def start(self, row: Row, piece: list[int]) -> int:
        """Processes the last token of a prompt and the first new one, which compresses it."""
        entries, row.cache = row.cache, None
        if self._joins:
            entries = [entry.merge([entry]) for entry in entries]
        kind = GenerationBatch if self._joins else _Alone
        with mx.stream(generation_stream):
            with _prompting(entries):
                batch = kind(
                    model=self._model,
                    uids=[row.key],
                    inputs=mx.array(piece),
                    prompt_cache=entries,
                    tokens=[row.ids],  # it adds what it feeds
                    samplers=[_sampler(row)],
                    fallback_sampler=greedy_sampler,
                    logits_processors=[()],
                    stop_sequences=[StopSequences()],
                    max_tokens=[sys.maxsize],
                )
            (first,) = batch.next()
            if self._rows:
                self._batch.extend(batch)
            else:
                self._batch = batch
        self._rows[row.key] = row
        return int(first.token)

    def step(self) -> list[tuple[Row, int | Exception]]:
        """One more token of every sequence that runs."""
        with mx.stream(generation_stream):
            found = self._batch.next()
        self._steps += 1
        if self._steps % CLEAR == 0:
            mx.clear_cache()
        return [(self._rows[response.uid], int(response.token)) for response in found]

    def leave(self, row: Row) -> Any:
        """Takes a sequence out of those that run; returns its cache."""
        place = self._batch.uids.index(row.key)
        cache = self._batch.extract_cache(place)
        self._batch.filter([i for i in range(len(self._batch)) if i != place])
        del self._rows[row.key]
        return cache

    def clear(self) -> None:
        """Takes out all, whose caches are lost."""
        self._batch, self._rows = None, {}


class _Alone(GenerationBatch):
    """The only sequence of a model whose sequences cannot be joined."""

    def extract_cache(self, idx: int) -> list[Any]:
        return list(self.prompt_cache)


def _prompting(entries: list[Any]) -> ExitStack:
    """What comes meanwhile is a piece of the prompt, for every store behind these entries."""
    stack = ExitStack()
    for entry in entries:
        if isinstance(entry, KVCEntry | KVCRows) and entry.layer == 0:
            for store in [entry.store] if isinstance(entry, KVCEntry) else entry.stores:
                stack.enter_context(store.prompting())
    return stack


def _sampler(row: Row) -> Callable[[Any], Any]:
    """mlx-lm's sampler; with a seed it draws what `mx.random.seed` makes a sequence alone draw."""
    if row.temp == 0:
        return greedy_sampler
    if row.seed is None:
        return make_sampler(row.temp, row.top_p)
    key = mx.random.key(row.seed)

    def sample(logprobs: Any) -> Any:
        nonlocal key
        key, now = mx.random.split(key)
        if row.top_p < 1:
            logprobs = apply_top_p(logprobs, row.top_p)
        return mx.random.categorical(logprobs * (1 / row.temp), key=now)

    return sample
