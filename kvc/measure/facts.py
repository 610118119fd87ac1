"""Facts planted in a text, to be asked for at its end: what a cache must keep to be looked up.

A planted fact is a sentence such as " The code of Anna is 4821.".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Engine
from kvc.errors import ConfigError
from kvc.text import split_start

FACT = " The code of {} is {}."
N_DIGITS = 4
NEAREST = 64  # tokens, of the distances
# fmt: off
NAMES = (
    "Anna", "Boris", "Clara", "David", "Edith", "Felix", "Grace", "Henry", "Irene", "James",
    "Karen", "Louis", "Maria", "Nelly", "Oscar", "Paula", "Robert", "Sofia", "Thomas", "Ursula",
    "Victor", "Walter", "Agnes", "Bertha", "Charles", "Diana", "Edward", "Frank", "George", "Helen",
    "Isabel", "John", "Kitty", "Laura", "Martin", "Nancy", "Oliver", "Peter", "Rachel", "Samuel",
    "Teresa", "Vera", "William", "Alice", "Bruno", "Caroline", "Daniel", "Emma", "Francis",
    "Gabriel", "Harriet", "Ivan", "Julia", "Leonard", "Margaret", "Nicholas", "Olga", "Philip",
    "Rosa", "Simon", "Tom", "Mary", "Jane", "Lucy",
)
# fmt: on


class Sentence(NamedTuple):
    """A fact in tokens; those of its number are `[start:stop]`."""

    tokens: tuple[int, ...]
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """What rows that are fed side by side must have in common."""
        return len(self.tokens), self.start, self.stop


class Planted(NamedTuple):
    """Rows in which facts are told, and asked for at the end: the one told last first."""

    ids: NDArray[np.int32]  # [n, T]
    context: int  # tokens before the questions
    told: NDArray[np.int64]  # [n, F], where the number of each fact begins
    asked: NDArray[np.int64]  # [F], where it begins in the questions
    n_tokens: int  # of a number

    @property
    def distances(self) -> NDArray[np.int64]:
        """Tokens from telling to question. [n, F]."""
        return np.asarray(self.asked - self.told)


def plant(
    engine: Engine,
    texts: Sequence[Sequence[int] | NDArray[Any]],
    n: int,
    length: int,
    n_facts: int = 8,
    seed: int = 0,
) -> Planted:
    """`n` rows of `length` tokens, each a passage of a text with facts at log-uniform distances.

    The texts, as tokens without special ones, take turns. All facts have as many tokens as each
    other, so that rows can be fed side by side; the same arguments give the same rows.

    Raises:
        ConfigError: If the facts do not fit into a row, the texts are too short, or the tokenizer
            cuts too few of the names alike.
    """
    rng = np.random.default_rng(seed)
    told_by = {name: _sentence(engine, name, _number(rng)) for name in NAMES}
    (shape, _), = Counter(s.shape for s in told_by.values()).most_common(1)  # fmt: skip
    names = [name for name, s in told_by.items() if s.shape == shape]
    if len(names) < n_facts:
        raise ConfigError(
            f"recall: expected {n_facts} names that make facts of one length, got {len(names)}; "
            "ask for fewer facts"
        )
    size, start, stop = shape
    if start >= stop:
        raise ConfigError("recall: expected a tokenizer that tells digits apart, got one token")
    begin, _ = split_start(engine, engine.encode(""))
    T = length - len(begin) - 2 * n_facts * size
    if NEAREST >= T:
        least = length - T + NEAREST + 1
        raise ConfigError(
            f"recall: expected rows of at least {least} tokens for {n_facts} facts, got {length}"
        )
    if short := [len(text) for text in texts if len(text) < T]:
        raise ConfigError(f"recall: expected texts of at least {T} tokens, got {short[0]}")
    ids, told = np.empty((n, length), np.int32), np.empty((n, n_facts), np.int64)
    for row in range(n):
        text = texts[row % len(texts)]
        chosen = rng.choice(len(names), n_facts, replace=False)
        facts = [_like(engine, names[i], shape, rng) for i in chosen]
        first = int(rng.integers(len(text) - T + 1))
        passage = [int(token) for token in text[first : first + T]]
        distances = np.sort(np.exp(rng.uniform(np.log(NEAREST), np.log(T), n_facts)))
        cuts = [T - int(d) for d in distances]
        tokens, last = list(begin), 0
        for i in reversed(range(n_facts)):
            tokens += passage[last : cuts[i]]
            told[row, i], last = len(tokens) + start, cuts[i]
            tokens += facts[i]
        # the nearest first, for the questions lengthen the later distances
        ids[row] = [*tokens, *passage[last:], *(token for fact in facts for token in fact)]
    context = length - n_facts * size
    return Planted(ids, context, told, context + start + size * np.arange(n_facts), stop - start)


def _number(rng: np.random.Generator) -> str:
    return "".join(map(str, rng.integers(0, 10, N_DIGITS)))


def _like(
    engine: Engine, name: str, shape: tuple[int, int, int], rng: np.random.Generator
) -> tuple[int, ...]:
    """The tokens of a fact about `name`; a tokenizer that joins digits does not join all alike."""
    while (found := _sentence(engine, name, _number(rng))).shape != shape:
        pass
    return found.tokens


def _sentence(engine: Engine, name: str, number: str) -> Sentence:
    """A fact in tokens: its number is what changes where every digit changes."""
    other = "".join(str((int(digit) + 5) % 10) for digit in number)
    a, b = (split_start(engine, engine.encode(FACT.format(name, x)))[1] for x in (number, other))
    return Sentence(tuple(a), _common(a, b), len(a) - _common(a[::-1], b[::-1]))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sentences begin with alike."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
