"""Rows of `kvc eval` in the order that a page tells them: by model, by task, by method."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvc.errors import ConfigError
from kvc.measure.report_page.markup import number
from kvc.methods import PRESETS

COLORS = 8  # of the page's palette; then they begin again, with dashes
FULL = "none"  # the method that all others are compared with
NEEDED = ("model", "backend", "method", "label", "task", "context", "result")
IDENTITY = ("model", "fingerprint", "backend", "dtype", "device")  # of a run
KINDS = {  # what fills a seam, by its section: the shape of its marks and what it does
    "gear": ("circle", "codes tokens"),
    "less": ("square", "evicts tokens"),
    "minicache": ("triangle", "merges layers"),
    "kvsharer": ("diamond", "shares layers"),
}
SEVERAL, OTHER = ("hexagon", "several of these"), ("star", "a profile")


@dataclass(frozen=True, slots=True)
class Look:
    """A method as a page shows it: the same everywhere."""

    label: str
    method: str
    settings: Mapping[str, Any]
    index: int  # among the methods of the page
    color: int | None  # of the palette; None for the full cache, which is ink
    shape: str
    does: str

    @property
    def dash(self) -> int:
        """How often the palette had been used up."""
        return max(self.index - 1, 0) // COLORS

    @property
    def kind(self) -> str:
        """The classes of its marks: its colour and its dashes."""
        color = "ink" if self.color is None else f"c{self.color}"
        return f"m m{self.index} {color} d{min(self.dash, 3)}"


@dataclass(frozen=True, slots=True)
class Setting:
    """What a task ran on: figures of two are not compared."""

    context: int
    text: str
    sha256: str
    seed: int
    rows: int = 0  # of the text; 0 where it is not told
    length: int = 0  # of a long generation

    @property
    def said(self) -> str:
        """In words."""
        named = f", {self.text}" if self.text else ""
        rows = f", {self.rows} rows" if self.rows else ""
        length = f", {number(self.length)} written" if self.length else ""
        return f"{number(self.context)} tokens{named}{rows}{length}, seed {self.seed}"


Results = dict[str, Mapping[str, Any]]  # by the label of the method


@dataclass(slots=True)
class Run:
    """What was measured of one model on one backend."""

    model: str
    fingerprint: str
    backend: str
    dtype: str
    device: str
    looks: dict[str, Look] = field(default_factory=dict)
    results: dict[str, dict[Setting, Results]] = field(default_factory=dict)  # by task
    versions: set[str] = field(default_factory=set)
    dates: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def of(self, task: str) -> Iterator[tuple[Setting, Results]]:
        """What a task gave, for each of its settings."""
        yield from self.results.get(task, {}).items()

    def where(self, task: str, setting: Setting) -> str:
        """The setting in words, where a task has several."""
        return f" ({setting.said})" if len(self.results[task]) > 1 else ""

    def shown(self, results: Results, key: str) -> tuple[list[Look], list[Any]]:
        """The methods that have a result, in the order of the page, and those results."""
        looks = [look for look in self.looks.values() if results.get(look.label, {}).get(key)]
        return looks, [results[look.label][key] for look in looks]

    def bytes_at(self, setting: Setting) -> Results:
        """Measured bytes that go with a setting: of its context, whatever the text."""
        found: Results = {}
        for other, results in self.of("bytes"):
            if other.context == setting.context:
                found |= {k: v for k, v in results.items() if k not in found or other == setting}
        return found

    @property
    def settings(self) -> list[Setting]:
        """All of them, by context."""
        found = {setting for results in self.results.values() for setting in results}
        return sorted(found, key=lambda s: (s.context, s.text, s.sha256, s.seed))


def runs_of(rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The runs of some rows, the largest first. Of two rows of one measurement the later counts.

    Raises:
        ConfigError: If there are none, or one lacks what names it.
    """
    if not rows:
        raise ConfigError(
            "report: expected rows to show, got none; let `kvc eval` write some first"
        )
    runs: dict[tuple[str, ...], Run] = {}
    looks: dict[tuple[str, str], Look] = {}  # the same in all runs
    for place, row in enumerate(rows, 1):
        if missing := [key for key in NEEDED if key not in row]:
            raise ConfigError(
                f"report: row {place}: expected rows of `kvc eval`, got one without "
                f"{', '.join(missing)}; write them anew"
            )
        names = [str(row.get(name) or "") for name in IDENTITY]
        model, fingerprint, backend, dtype, device = names
        new = Run(model, fingerprint, backend, dtype, device)
        run = runs.setdefault(tuple(names), new)
        label, method = str(row["label"]), str(row["method"])
        if (label, method) not in looks:
            looks[label, method] = _look(label, method, row.get("settings"), len(looks))
        run.looks.setdefault(label, looks[label, method])
        text = row.get("text") or {}
        setting = Setting(
            int(row["context"] or 0),
            str(text.get("name") or ""),
            str(text.get("sha256") or ""),
            int(row.get("seed") or 0),
            int(row.get("rows") or 0),
            int(row.get("length") or 0),
        )
        task = run.results.setdefault(str(row["task"]), {})
        task.setdefault(setting, {})[label] = row["result"]
        run.versions.add(str(row.get("kvc") or ""))
        run.dates.add(str(row.get("date") or "")[:10])
        run.seconds += float(row.get("seconds") or 0)
    return sorted(runs.values(), key=lambda run: -len(run.looks))


def _look(label: str, method: str, settings: Any, index: int) -> Look:
    shape, does = OTHER if method.startswith("@") else SEVERAL
    if method in PRESETS:
        kind, _ = PRESETS[method]
        shape, does = ("circle", "keeps all") if kind is None else KINDS[kind.section]
    color = None if method == FULL else (index - 1) % COLORS
    return Look(label, method, dict(settings or {}), index, color, shape, does)


def full_of(run: Run, results: Results) -> Mapping[str, Any] | None:
    """What the full cache gave, if it was measured."""
    found = (v for k, v in results.items() if run.looks[k].method == FULL)
    return next(found, None)


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as JSON lines that may stand in a script element, which nothing within can end."""
    lines = (json.dumps(row, default=str) for row in rows)
    return "\n".join(lines).replace("<", "\\u003c").replace(">", "\\u003e")
