"""What a method costs in quality, read in pieces: KL against the full cache, and perplexity.

Half a row is a prompt, which is read exactly and compressed when it ends; half is read in pieces of
`PIECE` tokens, each with all before it compressed as far as it is due. That is a few passes where
reading token by token takes a thousand. A codec's pieces begin where its buffer is empty, so that
as many of the newest tokens are exact, on average, as they are token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, Engine, ops_of
from kvc.measure.choice import Choice
from kvc.measure.divergence import CHUNK, apart
from kvc.measure.perplexity import batch_size, feed, not_finite, surprise
from kvc.measure.results import Results
from kvc.methods import Method, parse

PIECE = 64  # tokens, as many as most buffers gather before they are coded
NUMBERS = 1 << 27  # at most, of the full model's logits that are kept

OnStep = Callable[[int, int], None]


class Level(NamedTuple):
    """How much is read: the more, the surer."""

    rows: int
    length: int  # tokens of a row

    @property
    def tokens(self) -> int:
        """In all rows."""
        return self.rows * self.length


class Score(NamedTuple):
    """What was measured, in nats for a token, and how sure it is."""

    kl: float  # KL(full || compressed) of the next token, mean
    kl_error: float  # standard error over parts of rows
    nll: float  # -log p of the tokens that come, mean
    full_nll: float  # of the full cache on the same tokens

    @property
    def ppl(self) -> float:
        """Perplexity through the compressed cache."""
        return math.exp(self.nll)

    @property
    def ppl_increase(self) -> float:
        """By which share the perplexity is above the full cache's."""
        return math.exp(self.nll - self.full_nll) - 1

    @property
    def sure_increase(self) -> float:
        """The same, or what the divergence foretells if that is more.

        On little text a cache that loses much may be lucky with the tokens that come; a model that
        knows its own odds loses what the divergence is.
        """
        return max(self.ppl_increase, math.expm1(self.kl))


class Quality:
    """Scores of methods on rows of a text; what was measured before is not measured again.

    Args:
        engine: With the model.
        ids: Rows of calibration tokens [n, T].
        results: Where scores are kept.
        on_step: Told of the tokens that were read since it was last told; may raise.
    """

    def __init__(
        self,
        engine: Engine,
        ids: NDArray[np.int32],
        results: Results,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.engine, self.ids, self.results, self.on_step = engine, ids, results, on_step
        self._full: dict[Level, tuple[list[Array], NDArray[np.float64]]] = {}

    def __call__(self, choice: Choice, level: Level) -> Score:
        """The score of a method.

        Raises:
            KVCError: If a probability is no number, or the model and the method do not go together.
        """
        asked = {
            "method": choice.name,
            "settings": dict(sorted(choice.settings.items())),
            "rows": level.rows,
            "length": level.length,
        }
        if (row := self.results.get(asked)) is None:
            row = {**asked, "result": self._measured(choice.method, level)._asdict()}
            self.results.add(row)
        else:
            self.on_step(level.tokens)
        return Score(**row["result"])

    def _measured(self, method: Method, level: Level) -> Score:
        if level not in self._full:
            self._full[level] = self._read_full(level)
        full, full_nll = self._full[level]
        kl, nll = np.empty(full_nll.shape), np.empty(full_nll.shape)
        done = 0
        for rows, expected in zip(self._batches(level), full, strict=True):
            for at, logits in self._pieces(method, level, rows):
                B, L, V = logits.shape
                place = (rows, slice(at, at + L))
                right = expected[:, at : at + L].reshape(-1, 1, V)
                kl[place] = apart(right, logits.reshape(-1, 1, V))[0].reshape(B, L)
                nll[place] = surprise(logits, self._targets(level)[place])
                if not np.isfinite(kl[place] + nll[place]).all():
                    raise not_finite("tune", at, at + L)
                self.on_step(B * L)
                done += B * L
        self.on_step(level.tokens - done)  # prompts
        parts = kl.reshape(level.rows, -1, PIECE).mean(2).ravel()
        error = parts.std(ddof=1) / math.sqrt(len(parts)) if len(parts) > 1 else 0.0
        return Score(float(kl.mean()), float(error), float(nll.mean()), float(full_nll.mean()))

    def _read_full(self, level: Level) -> tuple[list[Array], NDArray[np.float64]]:
        """The full model's logits by batch, and what the text costs it [n, S]."""
        found, nlls = [], []
        for rows in self._batches(level):
            pieces = [logits for _, logits in self._pieces(parse("none"), level, rows)]
            found.append(ops_of(pieces[0]).concat(pieces, 1))
            nlls.append(surprise(found[-1], self._targets(level)[rows]))
        return found, np.concatenate(nlls)

    def _pieces(self, method: Method, level: Level, rows: slice) -> Iterator[tuple[int, Array]]:
        """Of each piece the first column that it predicts, and logits [B, L, V].

        Columns are the predictions that count.
        """
        first = level.length - 1 - self._scored(level)
        cache = self.engine.make_cache(method)
        ids = self.ids[rows, : level.length - 1]
        for at, stop, logits in feed(self.engine, cache, ids, begin(method, first), PIECE, CHUNK):
            self.on_step(0)
            if stop > first:
                early = max(first - at, 0)
                yield at + early - first, logits[:, early:]

    def _batches(self, level: Level) -> list[slice]:
        """Rows that are fed together."""
        size = batch_size(self.engine, level.length - 1, CHUNK)
        return [slice(at, min(at + size, level.rows)) for at in range(0, level.rows, size)]

    def _targets(self, level: Level) -> NDArray[np.int32]:
        """The tokens that columns predict. [n, S]."""
        first = level.length - self._scored(level)
        return self.ids[: level.rows, first : level.length]

    def _scored(self, level: Level) -> int:
        return scored_tokens(level, self.engine.shape.vocab_size)


def begin(method: Method, first: int) -> int:
    """Where pieces begin, of which token `first` is to be in the first or begin it."""
    codec = method.codec
    if codec is None or method.memory:
        return first
    start = first - (first - codec.sink - codec.window) % codec.buffer
    return start if start > codec.sink + codec.window else first


def scored_tokens(level: Level, vocab_size: int) -> int:
    """How many predictions of a row count: half, in whole pieces, as far as memory bears."""
    most = NUMBERS // (level.rows * vocab_size)
    return max(PIECE, min(level.length // 2, most) // PIECE * PIECE)
