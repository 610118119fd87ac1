"""What a smaller cache costs: the qualities, the front of each, and both in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvc.measure.report_page.markup import (
    THIN,
    known,
    listed,
    number,
    percent,
    signed,
    three,
    tick,
    tick_percent,
)
from kvc.measure.report_page.rows import FULL, Results, Run, Setting, full_of

TOLD = 7  # of the methods on a front; one more is told rather than counted


@dataclass(frozen=True, slots=True)
class Quality:
    """A figure that shows what a method costs."""

    task: str
    key: str  # of the task's result
    name: str  # begins a heading
    unit: str
    more: bool  # whether more is better
    form: Callable[[Any], str]
    promise: str  # what `keeps` holds, in words
    slack: float
    tick: Callable[[float], str] = tick

    def keeps(self, value: float, full: float | None) -> bool:
        """Whether that is as good as the full cache, but for a slack that few would notice."""
        if self.task == "ppl":
            return full is not None and value <= full * (1 + self.slack)
        if self.task == "recall":
            return full is not None and value >= full - self.slack
        return value >= 1 - self.slack if self.more else value <= self.slack

    def change(self, value: float, full: float) -> str:
        """How far that is from the full cache's, in words."""
        if self.task == "ppl":
            return signed(value - full, percent(value / full - 1, 2))
        return signed(value - full, f"{number(100 * (value - full), 3)} points")


QUALITIES = (
    Quality(
        "ppl", "ppl", "Perplexity", "", False,
        number, f"perplexity within 1{THIN}% of the full cache", 0.01,
    ),
    Quality(
        "kl", "mean", "Divergence", "KL from the full cache, nats per token", False,
        three, "the divergence below 0.01 nats", 0.01,
    ),
    Quality(
        "agree", "top1", "Agreement", "share of tokens chosen as with the full cache", True,
        percent, f"the same token in 95{THIN}% of places", 0.05, tick_percent,
    ),
    Quality(
        "recall", "exact", "Recall", "share of planted facts given back whole", True,
        percent, "recall within 2 points of the full cache", 0.02, tick_percent,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """A method in the plane of memory and one quality."""

    label: str
    share: float  # of the dense cache's bytes
    per_token: float | None  # bytes
    value: float
    front: bool = False  # nothing else is as good in fewer bytes, or better in as many


@dataclass(frozen=True, slots=True)
class Plane:
    """Memory against one quality, in one setting."""

    quality: Quality
    setting: Setting
    points: tuple[Point, ...]  # by bytes
    full: float | None  # the full cache's value
    without: tuple[str, ...]  # methods with the quality, and without bytes

    @property
    def front(self) -> list[Point]:
        """By bytes, the fewest first."""
        return [point for point in self.points if point.front]

    @property
    def best(self) -> Point | None:
        """The smallest cache that keeps the quality."""
        return next((p for p in self.points if self.quality.keeps(p.value, self.full)), None)


def planes(run: Run) -> Iterator[Plane]:
    """All pictures of memory against quality that the rows allow."""
    for quality in QUALITIES:
        for setting, results in run.of(quality.task):
            found, without = _points(quality, results, run.bytes_at(setting))
            if found:
                full = (full_of(run, results) or {}).get(quality.key)
                known_full = float(full) if full is not None and known(full) else None
                yield Plane(quality, setting, mark_front(found, quality.more), known_full, without)


def _points(
    quality: Quality, results: Results, held: Results
) -> tuple[list[Point], tuple[str, ...]]:
    found, without = [], []
    for label, result in results.items():
        value, size = result.get(quality.key), held.get(label, {})
        if not known(value):
            continue
        if not (known(size.get("nbytes")) and size.get("dense_bytes")):
            without.append(label)
            continue
        share = size["nbytes"] / size["dense_bytes"]
        found.append(Point(label, share, size.get("bytes_per_token"), float(result[quality.key])))
    return found, tuple(without)


def mark_front(points: Sequence[Point], more: bool) -> tuple[Point, ...]:
    """The points by bytes, with those marked that no other dominates."""
    best, found = math.inf, []
    losses = [(p.share, -p.value if more else p.value, i) for i, p in enumerate(points)]
    before = -1.0  # the bytes of the last point on the front
    for share, loss, index in sorted(losses):
        front = loss < best or (loss == best and share == before)
        if front:
            best, before = loss, share
        p = points[index]
        found.append(Point(p.label, p.share, p.per_token, p.value, front))
    return tuple(found)


def headline(run: Run, found: Sequence[Plane]) -> str:
    """What the rows say in one sentence."""
    others = [look.label for look in run.looks.values() if look.method != FULL]
    if not others:
        return f"{run.model}: the full cache alone was measured"
    for plane in found:
        compressed = [p for p in plane.points if run.looks[p.label].method != FULL]
        if not compressed:
            continue
        q, best = plane.quality, plane.best
        if best is not None and run.looks[best.label].method != FULL:
            return f"{best.label} keeps {q.promise} in {percent(best.share)} of the dense bytes"
        near = (max if q.more else min)(compressed, key=lambda p: p.value)
        return (
            f"No method kept {q.promise}: {near.label} came nearest, "
            f"{q.form(near.value)} in {percent(near.share)} of the dense bytes"
        )
    n = len(others)
    return f"{run.model}: what {n} {'method' if n == 1 else 'methods'} cost"


def on_front(run: Run, plane: Plane) -> str:
    """The front of a plane in one sentence."""
    form = plane.quality.form
    front = [p for p in plane.front if run.looks[p.label].method != FULL]
    if not front:
        return "No compressed cache is on the front: the full one is no larger, and better."
    said = [f"{p.label} ({percent(p.share)}, {form(p.value)})" for p in front]
    if len(said) > TOLD + 1:
        said = [*said[:TOLD], f"{len(said) - TOLD} more"]
    full = "" if plane.full is None else f"; the full cache: {form(plane.full)}"
    return f"On the front, by bytes: {listed(said)}{full}."


def value_hint(plane: Plane, point: Point, size: Callable[[Any], str]) -> str:
    """All that is known of a point, a line for each fact."""
    q = plane.quality
    lines = [point.label, f"{q.name.lower()} {q.form(point.value)}"]
    if plane.full is not None and q.task in ("ppl", "recall"):
        lines[-1] += f" ({q.change(point.value, plane.full)})"
    lines.append(f"{percent(point.share)} of the bytes")
    if point.per_token is not None:
        lines[-1] += f", {size(point.per_token)} per token"
    return "\n".join([*lines, "on the front"] if point.front else lines)
