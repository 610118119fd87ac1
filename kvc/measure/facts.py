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
    one_name: bool = False  # whether all facts are about one name, so that any may be answered

    @property
    def distances(self) -> NDArray[np.int64]:
        """Tokens from telling to question. [n, F]."""
        return np.asarray(self.asked - self.told)

    @property
    def depths(self) -> NDArray[np.float64]:
        """Share of the context that lies before each fact's number. [n, F]."""
        return np.asarray(self.told / self.context)

    def right(self, best: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of the most probable tokens [n, F, n_tokens] are right; the same shape.

        A token is right if it goes on with the number that is asked for. With one name it is also
        right if it goes on, behind the same digits, with a number that later questions ask for.
        """
        places = self.asked[:, None] + np.arange(self.n_tokens)
        numbers = self.ids[:, places]
        right = np.asarray(best == numbers)
        if not self.one_name:
            return right
        for f in range(numbers.shape[1]):
            for other in range(f + 1, numbers.shape[1]):
                same = numbers[:, other] == numbers[:, f]
                before = np.cumprod(np.insert(same[:, :-1], 0, True, axis=1), axis=1).astype(bool)
                right[:, f] |= before & (best[:, f] == numbers[:, other])
        return right


def plant(
    engine: Engine,
    texts: Sequence[Sequence[int] | NDArray[Any]],
    n: int,
    length: int,
    n_facts: int = 8,
    seed: int = 0,
    *,
    depths: NDArray[np.float64] | None = None,
    one_name: bool = False,
) -> Planted:
    """`n` rows of `length` tokens, each a passage of a text with facts.

    The texts, as tokens without special ones, take turns. All facts have as many tokens as each
    other, so that rows can be fed side by side; the same arguments give the same rows.

    Args:
        engine: Whose tokenizer it is.
        texts: Where passages come from.
        n: Rows.
        length: Tokens of a row.
        n_facts: Facts in a row, F.
        seed: Of passages, names, numbers and distances.
        depths: Share of the passage before each fact, from 0 to below 1. [n, F]. Without them
            distances are log-uniform.
        one_name: Whether all facts of a row are about one name.

    Raises:
        ConfigError: If the facts do not fit into a row, the texts are too short, or the tokenizer
            cuts too few of the names alike.
    """
    rng = np.random.default_rng(seed)
    told_by = {name: _sentence(engine, name, _number(rng)) for name in NAMES}
    (shape, _), = Counter(s.shape for s in told_by.values()).most_common(1)  # fmt: skip
    names = [name for name, s in told_by.items() if s.shape == shape]
    if len(names) < (1 if one_name else n_facts):
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
        chosen = rng.choice(len(names), 1 if one_name else n_facts, replace=False)
        facts = _facts(engine, [names[i] for i in np.resize(chosen, n_facts)], shape, rng)
        first = int(rng.integers(len(text) - T + 1))
        passage = [int(token) for token in text[first : first + T]]
        if depths is None:
            distances = np.sort(np.exp(rng.uniform(np.log(NEAREST), np.log(T), n_facts)))
            cuts = [T - int(d) for d in distances]
        else:
            cuts = [int(depth * T) for depth in np.sort(depths[row])[::-1]]
        tokens, last = list(begin), 0
        for i in reversed(range(n_facts)):
            tokens += passage[last : cuts[i]]
            told[row, i], last = len(tokens) + start, cuts[i]
            tokens += facts[i]
        # the nearest first, for the questions lengthen the later distances
        ids[row] = [*tokens, *passage[last:], *(token for fact in facts for token in fact)]
    context, asked = length - n_facts * size, start + size * np.arange(n_facts)
    return Planted(ids, context, told, context + asked, stop - start, one_name)


def _facts(
    engine: Engine, names: Sequence[str], shape: tuple[int, int, int], rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """The tokens of a fact about each name; no two are the same."""
    found: list[tuple[int, ...]] = []
    for name in names:
        while (fact := _like(engine, name, shape, rng)) in found:
            pass
        found.append(fact)
    return found


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
