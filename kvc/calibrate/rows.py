"""Calibration data: pieces of a text, all of one length, each as a model would begin to read it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvc.backends.base import Engine
from kvc.errors import ConfigError
from kvc.text import read_text, split_start


class Rows(NamedTuple):
    """Sequences of tokens, and what a file that was made from them says of them."""

    ids: np.ndarray[Any, Any]  # int32 [n, T]; each begins as the tokenizer begins a text
    digest: str  # SHA-256 of the ids


def read_rows(
    engine: Engine, paths: Sequence[str | Path], n: int, length: int, seed: int = 0
) -> Rows:
    """`n` pieces of `length` tokens, drawn without overlap from all texts, in a random order.

    Every piece is full, so that nothing is padded. The same texts, tokenizer and seed give the same
    pieces on every backend.

    Raises:
        ConfigError: If a text cannot be read, they have fewer tokens together, or a piece would be
            longer than the model's context.
    """
    if (limit := engine.context_length) is not None and length > limit:
        raise ConfigError(
            f"--length {length}: expected at most the model's context, {limit} tokens"
        )
    pieces, n_tokens = [], 0
    for path in paths:
        bos, body = split_start(engine, engine.encode(read_text(path)))
        step = length - len(bos)
        n_tokens += len(bos) + len(body)
        cut = np.asarray(body[: len(body) // step * step], np.int32).reshape(-1, step)
        start = np.broadcast_to(np.asarray(bos, np.int32), (len(cut), len(bos)))
        pieces.append(np.concatenate([start, cut], 1))
    every = np.concatenate(pieces)
    if len(every) < n:
        raise ConfigError(
            f"--text: expected {n} pieces of {length} tokens, got {len(every)} from {n_tokens} "
            "tokens; give more text, or ask for fewer or shorter pieces"
        )
    ids = every[np.random.default_rng(seed).permutation(len(every))[:n]]
    return Rows(ids, hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest())
