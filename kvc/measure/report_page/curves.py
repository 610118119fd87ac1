"""Lines: a figure by position or by layer, one line for each method, named at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from kvc.measure.report_page.labels import HIGH, along
from kvc.measure.report_page.markup import known, number, short, tag, tick, width
from kvc.measure.report_page.rows import Look
from kvc.measure.report_page.svg import (
    Frame,
    Scale,
    axes,
    drawing,
    hint,
    line,
    outliers,
    path,
    px,
    scale_of,
    text,
)

LABEL = 18  # letters of a label at most
MOST = 18  # lines with names and colours; more cannot be told apart
SPREAD = 12.0  # times the smallest value that the largest is before an axis is logarithmic
MARGIN = 18.0  # px from a line's end to its name


@dataclass(frozen=True, slots=True)
class Curve:
    """The figures of one method: x, y and what x is called."""

    look: Look
    points: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """A chart of lines."""

    title: str
    x_label: str
    curves: tuple[Curve, ...]
    form: Callable[[Any], str] = number
    tick: Callable[[float], str] = tick
    by_layer: bool = False  # whole numbers from 0; else positions
    more: bool = False  # whether more is better
    log: bool = True  # where the values are far apart

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """The figures as a table: what x is called, then the methods'."""
        places = list(dict.fromkeys((x, said) for c in self.curves for x, _, said in c.points))
        found = [{said: y for _, y, said in curve.points} for curve in self.curves]
        rows = [[said, *(ys.get(said) for ys in found)] for _, said in sorted(places)]
        return [self.x_label, *(curve.look.label for curve in self.curves)], rows


def by_position(
    looks: Sequence[Look], found: Sequence[Sequence[Sequence[Any]]], column: int
) -> tuple[Curve, ...]:
    """Curves of buckets [start, stop, ...], at their middles."""
    curves = []
    for look, buckets in zip(looks, found, strict=True):
        points = [
            ((b[0] + b[1]) / 2, float(b[column]), f"{number(b[0])}\u2013{number(b[1])}")
            for b in buckets
            if len(b) > column and known(b[column])
        ]
        if points:
            curves.append(Curve(look, tuple(points)))
    return tuple(curves)


def by_layer(looks: Sequence[Look], found: Sequence[Sequence[Any]]) -> tuple[Curve, ...]:
    """Curves of one value for each layer."""
    curves = []
    for look, values in zip(looks, found, strict=True):
        points = [(float(i), float(v), str(i)) for i, v in enumerate(values) if known(v)]
        if points:
            curves.append(Curve(look, tuple(points)))
    return tuple(curves)


def draw(chart: Curves, first: Collection[str], kind: str, width_: float, height: float) -> str:
    """The chart, as SVG of the size given; the labels in `first` get room before others."""
    curves = chart.curves
    names = [short(curve.look.label, LABEL) for curve in curves]
    right = MARGIN + max(width(name) for name in names) + 6
    frame = Frame(width_, height, left=50, right=min(right, width_ * 0.42))
    y, off = _y_scale(chart, frame)
    x = _x_scale([x for curve in curves for x, _, _ in curve.points], frame, chart.by_layer)
    ticks = [t for t in x.ticks() if t == int(t)] if chart.by_layer else None
    room = int((frame.y[0] - frame.y[1]) / HIGH) + 1
    shown = _named(curves, first, min(room, MOST))
    low, high = sorted(frame.y)
    ends = [min(max(y(curve.points[-1][1]), low), high) for curve in curves]
    wanted = [ends[i] for i in shown]
    places = dict(zip(shown, along(wanted, frame.y[1], frame.y[0]), strict=True))
    marks = [axes(frame, x, y, chart.x_label, x_ticks=ticks, y_form=chart.tick)]
    arrow = " \u2193" if chart.more else " \u2191"
    for i in sorted(range(len(curves)), key=lambda i: i in places):
        label, name = "", names[i] + arrow * (i in off)
        if i in places:
            label = _end(frame, x(curves[i].points[-1][0]), ends[i], name, places[i])
        marks.append(_curve(frame, x, y, curves[i], chart, label, quiet=i not in places))
    said = f"{chart.title}: {len(curves)} lines. The figures are below."
    return drawing(frame, said, kind, *marks)


def _y_scale(chart: Curves, frame: Frame) -> tuple[Scale, set[int]]:
    """The scale, and the curves that leave it because they are far worse than the rest."""
    ys = [[y for _, y, _ in curve.points] for curve in chart.curves]
    if chart.log:
        y = scale_of([v for one in ys for v in one], *frame.y, log=SPREAD)
        if y.log:
            return y, set()
    off = set(outliers([-min(one) if chart.more else max(one) for one in ys]))
    every, kept = ([v for i, one in enumerate(ys) if i not in o for v in one] for o in ((), off))
    if 3 * (max(kept) - min(kept)) > max(every) - min(every):
        return scale_of(every, *frame.y), set()
    return scale_of(kept, *frame.y), off


def _x_scale(places: Sequence[float], frame: Frame, whole: bool) -> Scale:
    low, high = min(places), max(places)
    if whole:
        return Scale(low - 0.3, max(high, low + 1) + 0.3, *frame.x)
    if low > 0 and high / low > 40:
        return Scale(low / 1.1, high, *frame.x, log=True)
    low = low - (high - low) / 30 if low > 0.2 * high else 0.0
    return Scale(low, high, *frame.x) if high > low else Scale(low, low + 1, *frame.x)


def _named(curves: Sequence[Curve], first: Collection[str], most: int) -> list[int]:
    """The curves that get a name, `most` of them: those that matter, then in order."""
    order = sorted(range(len(curves)), key=lambda i: (curves[i].look.label not in first, i))
    return sorted(order[:most])


def _curve(
    frame: Frame, x: Scale, y: Scale, curve: Curve, chart: Curves, label: str, *, quiet: bool
) -> str:
    at = [(x(a), y(b)) for a, b, _ in curve.points]
    where = "layer " if chart.by_layer else "tokens "
    dots = [
        tag(
            "circle",
            hint(f"{curve.look.label}\n{where}{said}\n{chart.form(value)}"),
            cx=px(a), cy=px(b), r="2" if len(at) < 40 else "1.2", class_="dot",
        )
        for (a, b), (_, value, said) in zip(at, curve.points, strict=True)
    ]  # fmt: skip
    kind = f"{curve.look.kind} {'quiet' if quiet else 'loud'}"
    line_ = [path(at, "line"), *dots]
    if any(not frame.y[1] - 1 <= b <= frame.y[0] + 1 for _, b in at):  # what leaves is cut off
        wide, high = px(frame.width), px(frame.y[0] - frame.y[1])
        box = f"0 {px(frame.y[1])} {wide} {high}"
        size = {"y": px(frame.y[1]), "width": wide, "height": high, "viewBox": box}
        line_ = [tag("svg", *line_, class_="cut", **size)]
    return tag("g", *line_, label, class_=kind)


def _end(frame: Frame, x: float, y: float, name: str, place: float) -> str:
    """A curve's name at its end x, y, and a leader where others pushed it away."""
    edge = frame.x[1]
    near = math.isclose(y, place, abs_tol=1)
    tie = line(x + 4, y, edge + MARGIN - 4, place, "leader")
    return ("" if near and x > edge - 8 else tie) + text(edge + MARGIN, place + 4, name, "label")
