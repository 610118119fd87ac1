"""How like a model stays to itself: its last hidden states with another cache, as cosines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kvc.backends.base import Engine, chunk_size, ops_of
from kvc.errors import ConfigError
from kvc.methods import KVSharer, Method, method_of
from kvc.store.store import KVStore

SIMILARITIES = ("per_sentence", "mean_repr")
BATCH = 8  # sentences at a time, so that a large model's pass fits

Tokens = np.ndarray[Any, Any]  # int32 [n, T]
Hidden = np.ndarray[Any, Any]  # float32 [n, T x width]


def passes(
    engine: Engine, ids: Tokens, method: Method, compress: bool = False
) -> Iterator[tuple[KVStore, Hidden]]:
    """A few sentences after others: the store that they filled, and their last hidden states.

    With `compress` a sentence comes in pieces, so that the later ones see what the method has made
    of those before; else at once, which compresses nothing.
    """
    cuts = pieces(ids.shape[1]) if compress else [slice(None)]
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        cache = engine.make_cache(method, "stream")
        parts = [engine.hidden(some[:, cut], cache) for cut in cuts]
        xp = ops_of(parts[0])
        hidden = xp.to_numpy(xp.promote(xp.concat(parts, 1)))
        yield engine.store(cache), hidden.reshape(len(some), -1)


def pieces(length: int) -> list[slice]:
    """One half of a sentence, then the rest bit by bit."""
    half = (length + 1) // 2
    step = chunk_size(length - half, max(length // 8, 2))
    return [slice(0, half)] + [
        slice(start, min(start + step, length)) for start in range(half, length, step)
    ]


def check_compresses(engine: Engine, length: int, method: Method) -> None:
    """That a method can be used with a map here, and compresses some of a sentence's tokens.

    Raises:
        ConfigError: With a length that would do, if there is one.
    """
    both = (method_of(KVSharer("0:0")) + method).check(engine.shape)
    engine.make_cache(both)
    tokens, limit = _needed(both), engine.context_length
    n = length
    while pieces(n)[-1].start < tokens:
        n *= 2
    if n == length:
        return
    mend = f"--length {n} does" if limit is None or n <= limit else "no --length of this model does"
    raise ConfigError(
        f"--with {method.name}: expected some of {length} tokens to be compressed, got none; "
        f"{mend}, or give it smaller blocks or budgets with --set"
    )


def _needed(method: Method) -> int:
    """How many tokens there must be before some of them are compressed."""
    codec, memory = method.codec, method.memory
    if memory and not codec:
        return int(memory.heavy + memory.recent) + 1
    if codec and not memory:
        return codec.sink + codec.window + codec.buffer
    return 1  # what is kept is coded at once


def similarity(full: Hidden, other: Hidden, how: str = "per_sentence") -> float:
    """Cosine of last hidden states of two models, rounded to six digits.

    per_sentence: the mean of each sentence's, all its positions in one vector. mean_repr: the one
    of states averaged over sentences. States that are no numbers are like nothing: -1.

    Shapes: full, other [n, T x width].
    """
    if how == "mean_repr":
        full, other = (x.mean(0, dtype=np.float64)[None] for x in (full, other))
    found = np.zeros(len(full))
    with np.errstate(all="ignore"):
        for n in range(len(full)):
            a, b = full[n].astype(np.float64), other[n].astype(np.float64)
            found[n] = a @ b / np.sqrt((a @ a) * (b @ b))
    mean = float(found.mean())
    return round(mean, 6) if np.isfinite(mean) else -1.0
