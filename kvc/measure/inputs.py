"""What a model reads in an evaluation: rows of texts, contexts with facts, and its own writing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvc.backends.base import Engine
from kvc.calibrate.rows import read_rows
from kvc.errors import ConfigError
from kvc.measure.needles import Grid, grids
from kvc.measure.runs import Lengths, answers, continued
from kvc.methods import parse
from kvc.text import read_text, split_start

OnStep = Callable[[int, int], None]
RUN = 64  # tokens of a greedy run, and at most a quarter of the context
ANSWER = 128  # tokens after which a free answer is cut off, and at most a quarter of the context
OPENING = 64  # tokens of the text in front of a long generation
LEAST = 64  # tokens of a context
CONTEXT, LENGTH = 2048, 4096  # tokens of a row and of a long generation, where there is room


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is read. Lengths are tokens."""

    context: int  # of a row
    rows: int
    length: int  # of a long generation, behind its opening
    seed: int = 0


def sizes_for(
    limit: int | None, context: int | None, rows: int, length: int | None, seed: int
) -> Sizes:
    """The sizes that were asked for, or the usual ones, as far as a model has room for them.

    Args:
        limit: Tokens that the model has room for, if it says so.
        context: Of a row.
        rows: How many.
        length: Of a long generation.
        seed: Of the choice of rows, of facts and of samples.

    Raises:
        ConfigError: If the model has no room for what was asked for.
    """
    room = limit or max(CONTEXT, LENGTH + OPENING)
    context = min(CONTEXT, room) if context is None else context
    length = min(LENGTH, room - OPENING) if length is None else length
    for option, value, least, extra in (
        ("--context", context, LEAST, ""),
        ("--length", length, 2, f" behind an opening of {OPENING}"),
    ):
        most = None if limit is None else limit - OPENING * bool(extra)
        if value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            has = "" if limit is None else f": the model has room for {limit}"
            raise ConfigError(f"{option}: expected {wanted} tokens{extra}, got {value}{has}")
    return Sizes(context, rows, length, seed)


@dataclass
class Inputs:
    """The same for every method; what the full model has to write is written once.

    Args:
        engine: The model.
        paths: The texts.
        sizes: How much.

    Raises:
        ConfigError: If the texts cannot be read, or are too short.
    """

    engine: Engine
    paths: Sequence[Path]
    sizes: Sizes
    ids: NDArray[np.int32] = field(init=False)  # [rows, context]
    _greedy: NDArray[np.int32] | None = None
    _long: NDArray[np.int32] | None = None
    _answers: Lengths | None = None

    def __post_init__(self) -> None:
        """Cuts the rows."""
        sizes = self.sizes
        self.ids = read_rows(self.engine, self.paths, sizes.rows, sizes.context, sizes.seed).ids

    @cached_property
    def text(self) -> dict[str, str]:
        """What rows say of the texts."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.read_bytes())
        return {"name": ", ".join(path.name for path in self.paths), "sha256": digest.hexdigest()}

    @cached_property
    def facts(self) -> list[Grid]:
        """Contexts with facts in them.

        Raises:
            ConfigError: If facts do not fit.
        """
        bodies = [
            np.asarray(split_start(self.engine, self.engine.encode(read_text(path)))[1], np.int32)
            for path in self.paths
        ]
        sizes = self.sizes
        return grids(self.engine, bodies, sizes.rows, sizes.context, sizes.seed)

    @property
    def run(self) -> int:
        """Tokens of a greedy run."""
        return min(RUN, self.sizes.context // 4)

    @property
    def answer(self) -> int:
        """Tokens after which a free answer is cut off."""
        return min(ANSWER, self.sizes.context // 4)

    def greedy(self, on_step: OnStep | None = None) -> NDArray[np.int32]:
        """Rows whose last `run` tokens the full model wrote, the likeliest. [rows, context]."""
        if self._greedy is None:
            prompts = self.ids[:, : self.sizes.context - self.run]
            self._greedy = continued(self.engine, prompts, self.run, on_step=on_step)
        return self._greedy

    def long(self, on_step: OnStep | None = None) -> NDArray[np.int32]:
        """Rows that the full model wrote behind an opening, as samples. [rows, 64 + length]."""
        if self._long is None:
            opening = self.ids[:, :OPENING]
            self._long = continued(
                self.engine,
                opening,
                self.sizes.length,
                temp=1.0,
                seed=self.sizes.seed,
                on_step=on_step,
            )
        return self._long

    @property
    def prompts(self) -> NDArray[np.int32]:
        """What free answers follow. [rows, context - answer]."""
        return self.ids[:, : self.sizes.context - self.answer]

    def full_answers(self, on_step: OnStep | None = None) -> Lengths:
        """How long the full model's answers are."""
        if self._answers is None:
            none = parse("none")
            self._answers = answers(self.engine, self.prompts, none, self.answer, on_step=on_step)
        return self._answers
