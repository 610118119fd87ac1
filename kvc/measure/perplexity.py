"""Perplexity through the cache: what a text costs a model that reads it from a compressed one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Array, Engine, chunk_size, ops_of
from kvc.errors import ConfigError, KVCError
from kvc.methods.base import Method

# How many rows are fed at a time, unless `batch` says: the more, the less time for each.
NUMBERS = 1 << 25  # at most, of logits in one pass
BYTES = 1 << 30  # at most, of the cache if it were dense
ROWS = 32  # at most


@dataclass(frozen=True, slots=True, eq=False)
class Perplexity:
    """What predicting tokens cost, and what the cache held at the end.

    Position t is the prediction of token t + 1 from tokens 0 to t.
    """

    rows: NDArray[np.float64]  # [n, T - 1], -log p of every token but the first, in nats
    nbytes: int  # of the caches of all rows, measured
    dense_bytes: int  # of the same tokens, uncompressed

    @property
    def nll(self) -> NDArray[np.float64]:
        """Of each position, the mean over the rows, in nats. [T - 1]."""
        return np.asarray(self.rows.mean(0))

    @property
    def ppl(self) -> float:
        """The exponential of the mean over all positions."""
        return math.exp(self.mean())

    @property
    def predictions(self) -> int:
        """How many tokens were predicted, in all rows."""
        return self.rows.size

    def mean(self, start: int = 0, stop: int | None = None) -> float:
        """Mean of positions `start` to `stop`, exclusive, in nats.

        Raises:
            ConfigError: If there are none.
        """
        return float(self._range(start, stop).mean())

    def error(self, start: int = 0, stop: int | None = None) -> float:
        """Standard error of that mean over rows, in nats: infinite where there is one row.

        Raises:
            ConfigError: If there are no such positions.
        """
        means = self._range(start, stop).mean(1)
        return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.inf

    def _range(self, start: int, stop: int | None) -> NDArray[np.float64]:
        found = self.rows[:, start:stop]
        if not found.size:
            raise ConfigError(
                f"perplexity: expected positions among {self.rows.shape[1]}, got {start} to {stop}"
            )
        return found


def perplexity(
    engine: Engine,
    ids: NDArray[Any],
    method: Method,
    *,
    step: int = 1,
    prompt: int = 0,
    prefill: str = "exact",
    chunk: int | None = None,
    batch: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Feeds rows of tokens to a model through its cache and looks up the probability of the next.

    With pieces of one token every token is predicted from what the method has left of all those
    before it, as in generation; a single pass (a `step` of at least T) reads tokens as they came.
    The last token of a row is predicted and not fed.

    Args:
        engine: The model.
        ids: Tokens of rows of one length. [n, T].
        method: How the cache is compressed.
        step: Tokens in a piece behind the prompt.
        prompt: Tokens that come before, and are compressed as a prompt is.
        prefill: How that is, `exact` or `stream`; see `feed`.
        chunk: Tokens in a piece of the prompt, about; by default it comes in one.
        batch: How many rows at a time; by default as many as memory bears.
        on_step: Called with the tokens fed so far, and how many there are in all rows.

    Raises:
        ConfigError: If rows are too short or too long for the model, or an argument is out of
            range.
        KVCError: If a probability is no number.
    """
    ids = np.asarray(ids)
    check_rows(engine, ids, "perplexity")
    n, fed = ids.shape[0], ids.shape[1] - 1
    ranges = {"step": (step, 1, None), "prompt": (prompt, 0, fed), "chunk": (chunk, 1, None)}
    check_ranges("perplexity", ranges | {"batch": (batch, 1, None)})
    batch = batch or batch_size(engine, fed, max(min(chunk or prompt, prompt), step))
    rows, nbytes, dense_bytes = np.empty((n, fed)), 0, 0
    for first in range(0, n, batch):
        some = ids[first : first + batch]
        cache = engine.make_cache(method, prefill)
        for start, stop, logits in feed(engine, cache, some[:, :-1], prompt, step, chunk):
            found = surprise(logits, some[:, start + 1 : stop + 1])
            if not np.isfinite(found).all():
                raise not_finite("perplexity", start, stop)
            rows[first : first + batch, start:stop] = found
            if on_step is not None:
                on_step(first * fed + len(some) * stop, n * fed)
        report = engine.store(cache).report()
        nbytes, dense_bytes = nbytes + report.nbytes, dense_bytes + report.dense_bytes
    return Perplexity(rows, nbytes, dense_bytes)


def feed(
    engine: Engine,
    cache: Any,
    ids: NDArray[Any],
    prompt: int = 0,
    step: int = 1,
    chunk: int | None = None,
) -> Iterator[tuple[int, int, Array]]:
    """Feeds rows [B, T] to an empty cache: a prompt, then pieces of `step` tokens.

    Each piece is compressed when the next one comes. A cache with exact prefill keeps all pieces of
    the prompt until then, and takes those behind it for steps of decoding; to one that streams,
    pieces of several tokens are all a prompt's.

    Yields:
        The first token of a piece, its last, exclusive, and logits [B, stop - start, V].
    """
    store, T = engine.store(cache), ids.shape[1]
    size = prompt if chunk is None else chunk_size(prompt, chunk)
    cuts = [*(range(0, prompt, size) if prompt else ()), *range(prompt, T, step), T]
    for start, stop in pairwise(cuts):
        yield start, stop, engine.logits(ids[:, start:stop], cache)
        begins = stop == prompt or (start == prompt == 0)
        if begins and (step == 1 or store.prefill == "exact"):
            # It ends the prompt: else longer pieces would belong to it, and on MLX one more token.
            store.trim(0)


def batch_size(engine: Engine, fed: int, widest: int) -> int:
    """How many rows of `fed` tokens to feed at a time, whose widest piece has so many."""
    shape = engine.shape
    numbers = min(fed, widest) * shape.vocab_size
    row = 2 * fed * shape.n_layers * shape.n_kv_heads * shape.head_dim * shape.dtype_bytes
    return max(1, min(ROWS, NUMBERS // numbers, BYTES // row))


def surprise(logits: Array, targets: NDArray[Any]) -> NDArray[np.float64]:
    """-log p of the targets in nats: log sum exp of the logits, less their own.

    It is summed up on the device, so that [B, L] numbers leave it and not the logits.

    Shapes: logits [B, L, V]; targets [B, L]; returns [B, L].
    """
    xp = ops_of(logits)
    x = xp.promote(logits)
    index = xp.from_numpy(targets[..., None].astype(np.int32), x)
    found = log_sum_exp(x) - xp.take_along_axis(x, index, -1)
    return xp.to_numpy(found)[..., 0].astype(np.float64)


def log_sum_exp(x: Array) -> Array:
    """Log sum exp over the last axis, kept as one of length 1: logits less it are log p."""
    xp = ops_of(x)
    top = xp.max(x, -1, keepdims=True)
    return top + xp.log(xp.sum(xp.exp(x - top), -1, keepdims=True))


def not_finite(who: str, start: int, stop: int) -> KVCError:
    """The error of logits that are no numbers, at tokens `start` to `stop`, exclusive."""
    return KVCError(
        f"{who}: expected finite logits at tokens {start} to {stop - 1}, got NaN or infinity; "
        "load the model in float32, or compress less"
    )


def check_ranges(who: str, ranges: Mapping[str, tuple[int | None, int, int | None]]) -> None:
    """That arguments lie in their ranges: name, value or None, least, most or None.

    Raises:
        ConfigError: With the first that does not.
    """
    for name, (value, least, most) in ranges.items():
        if value is not None and not least <= value <= (value if most is None else most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            raise ConfigError(f"{who}: {name}: expected {wanted}, got {value}")


def check_rows(engine: Engine, ids: NDArray[Any], who: str) -> None:
    """That rows are tokens of this model, and no more than it was made for.

    Raises:
        ConfigError: If they are not.
    """
    if ids.ndim != 2 or not len(ids) or ids.shape[1] < 2 or ids.dtype.kind not in "iu":
        raise ConfigError(
            f"{who}: expected rows of at least 2 tokens, as integers [n, T], got {ids.dtype} "
            f"{list(ids.shape)}"
        )
    T, context, vocab = ids.shape[1], engine.context_length, engine.shape.vocab_size
    if context is not None and context < T:
        raise ConfigError(
            f"{who}: expected rows of at most {context} tokens, as many as the model was made "
            f"for, got {T}; cut them shorter"
        )
    if ids.min() < 0 or ids.max() >= vocab:
        raise ConfigError(
            f"{who}: expected tokens from 0 to {vocab - 1}, got {ids.min()} to {ids.max()}; "
            "encode the text with this model's tokenizer"
        )
