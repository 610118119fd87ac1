"""Rows of measurements in a file of JSON lines: appended as they are made, never made twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvc.errors import ConfigError

MADE = ("seconds", "result", "kvc", "date")  # what is found; all other keys say what was asked for
Row = dict[str, Any]


def identity(row: Mapping[str, Any]) -> str:
    """What two rows have in common if one of them is enough."""
    return json.dumps({k: v for k, v in row.items() if k not in MADE}, sort_keys=True)


class Results:
    """Rows, by what was asked for; with a file they are there at once and after a crash."""

    def __init__(self, file: Any = None, rows: Mapping[str, Row] | None = None) -> None:
        self._file = file
        self.rows: dict[str, Row] = dict(rows or {})

    def get(self, row: Mapping[str, Any]) -> Row | None:
        """The row that was asked for in the same words, if it is there."""
        return self.rows.get(identity(row))

    def add(self, row: Row) -> None:
        """Takes a row that was made; it is on the disk when this returns."""
        self.rows[identity(row)] = row
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def results_file(path: Path | None) -> Iterator[Results]:
    """The rows of a file, which nobody else adds to; without a path they are kept in memory.

    A last line that a crash cut short is dropped.

    Raises:
        ConfigError: If it cannot be written, another process adds to it, or it is no such file.
    """
    if path is None:
        yield Results()
        return
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot write there: {error.strerror}") from None
    with file:  # the system lets go of the lock when the process ends, however that comes
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"--out {path}: another run adds to it; wait for it, or take another --out"
            ) from None
        yield Results(file, _read(file, path))


def _read(file: Any, path: Path) -> dict[str, Row]:
    file.seek(0)
    rows: dict[str, Row] = {}
    try:
        lines = file.read().split("\n")
        for line in filter(None, lines[:-1]):
            row = json.loads(line)
            rows[identity(row)] = {**row, "result": row["result"]}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"--out {path}: expected rows of kvc eval or a new file; take another --out"
        ) from None
    if lines[-1]:
        file.truncate(len("\n".join([*lines[:-1], ""]).encode()))
    return rows
