"""Rows of the races: JSON lines, each written when it is measured, so that a cut run keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "optimum-quanto", "hqq")


class Task(NamedTuple):
    """One row to be: what it is called in its race, and what measures it."""

    key: str
    run: Callable[[], Row]


class Rows:
    """The file of a run; `common` stands in every row."""

    def __init__(self, path: Path, common: Row) -> None:
        self.path, self.common = path, common

    def write(self, race: str, key: str, found: Row) -> None:
        """Adds one row at once."""
        row = {"race": race, "key": key, **found, **self.common}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def done(self, race: str) -> set[str]:
        """Keys of a race that have rows."""
        return {row["key"] for row in read(self.path) if row["race"] == race}


def read(path: Path) -> Iterator[Row]:
    """All whole rows of a file; a killed process may leave half of one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
