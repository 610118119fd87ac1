"""Scores of given answers, and free answers, by a model that reads from a compressed cache.

A context is a prompt, all but its last token. That token and those of the answer follow as steps of
decoding, so that even an answer of one token is predicted from what the method has left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, Engine, chunk_size, ops_of
from kvc.measure.perplexity import batch_size, check_ranges, not_finite, surprise
from kvc.methods import Method


class Pair(NamedTuple):
    """What is scored: the tokens of an answer behind those of a context, which has one at least."""

    context: list[int]
    answer: list[int]


class Score(NamedTuple):
    """Of an answer."""

    log_prob: float  # in nats
    greedy: bool  # whether greedy decoding would write it


class Scorer:
    """Asks a model through caches of its own, and sums up their bytes.

    Args:
        engine: The model.
        method: How its cache is compressed.
        prefill: How prompts are, `exact` or `stream`.
        prefill_step: Tokens of a prompt in one piece, about.
        step: Tokens of an answer that are scored at a time; they see each other as they came.
        batch: How many answers of one shape are scored at a time; by default as memory bears.

    Raises:
        ConfigError: If a number is out of range, or the method does not fit the model.
    """

    def __init__(
        self,
        engine: Engine,
        method: Method,
        *,
        prefill: str = "exact",
        prefill_step: int = 512,
        step: int = 1,
        batch: int | None = None,
    ) -> None:
        counts = {"step": (step, 1, None), "batch_size": (batch, 1, None)}
        check_ranges("scores", {"prefill_step": (prefill_step, 16, None), **counts})
        self.engine, self.method, self.prefill = engine, method, prefill
        self.prefill_step, self.step, self.batch = prefill_step, step, batch
        self.caches = self.nbytes = self.dense_bytes = 0
        self._cache()  # what does not fit the model says so now

    @property
    def ratio(self) -> float:
        """Bytes of the dense caches over those of ours, at the ends of all answers."""
        return self.dense_bytes / self.nbytes if self.nbytes else 1.0

    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """The score of each pair with its place, in the order of their lengths.

        Raises:
            KVCError: If a probability is no number.
        """
        for places in self._alike(pairs):
            yield from zip(places, self._score([pairs[i] for i in places]), strict=True)

    def answer(
        self, ids: Sequence[int], until: Sequence[str], max_tokens: int, temp: float, top_p: float
    ) -> str:
        """What the model writes behind a prompt, up to the first string of `until`."""
        cache, text = self._cache(), ""
        pieces: Any = self.engine.stream(
            ids,
            cache,
            max_tokens=max_tokens,
            temp=temp,
            top_p=top_p,
            seed=None,
            prefill_step=self.prefill_step,
            on_prefill=None,
        )
        with closing(pieces):
            for piece in pieces:
                text += piece.text
                if any(term in text for term in until):
                    break
        self._count(cache, 1)
        return text[: min((text.find(term) for term in until if term in text), default=len(text))]

    def _alike(self, pairs: Sequence[Pair]) -> Iterator[list[int]]:
        """Places of pairs of one shape, no more than memory bears; the longest come first."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, (context, answer) in enumerate(pairs):
            shapes.setdefault((len(context), len(answer)), []).append(i)
        for (n, m), places in sorted(shapes.items(), reverse=True):
            size = self.batch or batch_size(self.engine, n + max(m - 1, 1), self.step)
            yield from (places[start : start + size] for start in range(0, len(places), size))

    def _score(self, pairs: Sequence[Pair]) -> list[Score]:
        """Scores of pairs of one shape."""
        if not pairs[0].answer:
            return [Score(0.0, True)] * len(pairs)  # nothing is certain
        ids = np.array([context + answer for context, answer in pairs], np.int32)
        total, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        cache = self._cache()
        for start, logits in self._steps(cache, ids, len(pairs[0].context) - 1):
            targets = ids[:, start + 1 : start + 1 + logits.shape[1]]
            nll = surprise(logits, targets)
            if not np.isfinite(nll).all():
                raise not_finite("scores", start, start + nll.shape[1])
            total -= nll.sum(1)
            greedy &= _is_best(logits, targets).all(1)
        self._count(cache, len(pairs))
        return [Score(float(t), bool(g)) for t, g in zip(total, greedy, strict=True)]

    def _steps(self, cache: Any, ids: NDArray[Any], prompt: int) -> Iterator[tuple[int, Array]]:
        """Logits [B, up to `step`, V] behind a prompt, each with the place of its first token."""
        engine, store, stop = self.engine, self.engine.store(cache), ids.shape[1] - 1
        size = chunk_size(prompt, self.prefill_step)
        for start in range(0, prompt, size):
            engine.hidden(ids[:, start : min(start + size, prompt)], cache)  # nobody asks its head
        if prompt:
            store.trim(0)  # it ends here, whatever the library sends next
        for start in range(prompt, stop, self.step):
            yield start, engine.logits(ids[:, start : min(start + self.step, stop)], cache)
            if start == 0:
                store.trim(0)

    def _cache(self) -> Any:
        return self.engine.make_cache(self.method, self.prefill)

    def _count(self, cache: Any, n: int) -> None:
        report = self.engine.store(cache).report()
        self.caches += n
        self.nbytes += report.nbytes
        self.dense_bytes += report.dense_bytes


def _is_best(logits: Array, targets: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether no token is likelier than the target. Shapes: logits [B, L, V]; targets [B, L]."""
    xp = ops_of(logits)
    index = xp.from_numpy(targets[..., None].astype(np.int32), logits)
    own = xp.take_along_axis(logits, index, -1)
    return np.asarray(xp.to_numpy(own >= xp.max(logits, -1, keepdims=True)))[..., 0].astype(bool)
