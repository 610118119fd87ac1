"""Memory against one quality: the points, their labels and the front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from kvc.measure.report_page.labels import Box, Placed, around
from kvc.measure.report_page.markup import short, size, tag, tick_percent, width
from kvc.measure.report_page.quality import Plane, Point, value_hint
from kvc.measure.report_page.rows import FULL, Run
from kvc.measure.report_page.svg import (
    SMALL,
    Frame,
    Scale,
    axes,
    drawing,
    hint,
    line,
    marker,
    outliers,
    path,
    scale_of,
    text,
)

LABEL = 26  # letters of a label at most
HALVES = [2.0**-n for n in range(12, -1, -1)]  # shares of dense bytes that ticks are at
OFF = 32.0  # px beyond the scale, for what is far worse than the rest


def draw(run: Run, plane: Plane, kind: str, wide: float, high: float) -> str:
    """The picture, as SVG of the size given."""
    frame, q = Frame(wide, high, left=50), plane.quality
    x, ticks = _shares([p.share for p in plane.points], frame)
    y, off = _values(plane, frame)
    edge = frame.y[0] - 9 if q.more else frame.y[1] + 9  # where those off the scale are
    at = [(x(p.share), edge if i in off else y(p.value)) for i, p in enumerate(plane.points)]
    stairs = _stairs([spot for spot, p in zip(at, plane.points, strict=True) if p.front], frame)
    good = "better \u2196" if q.more else "better \u2199"
    corner = (frame.x[0] + 6, frame.y[1] + 8 if q.more else frame.y[0] - 8)
    label_x = "bytes, of the dense cache's"
    marks = [
        axes(frame, x, y, label_x, x_ticks=ticks, x_form=tick_percent, y_form=q.tick),
        _full(frame, y, plane),
        path(stairs, "front"),
        text(*corner, good, "better"),
        _off_scale(frame, edge, off, up=not q.more),
    ]
    names = [
        f"{short(p.label, LABEL)} {q.form(p.value)}" if i in off else short(p.label, LABEL)
        for i, p in enumerate(plane.points)
    ]
    labels = [(*spot, name) for spot, name in zip(at, names, strict=True)]
    walls = _walls(
        stairs, Box(corner[0], corner[1] - 10, corner[0] + width(good, SMALL), corner[1])
    )
    placed = around(labels, _order(run, plane.points), frame, walls)
    named = {spot.index: _label(spot, at[spot.index], names[spot.index]) for spot in placed}
    # the front is drawn last, above the points that it beats
    for i in sorted(range(len(at)), key=lambda i: plane.points[i].front):
        point = plane.points[i]
        look, fill = run.looks[point.label], "on" if point.front else "off"
        mark = marker(look.shape, *at[i], 5, fill, hint(value_hint(plane, point, size)))
        marks.append(tag("g", named.get(i, ""), mark, class_=f"{look.kind} {fill}"))
    if left := len(at) - len(placed):
        said = f"{left} unnamed"
        marks.append(text(frame.x[1], frame.height - 9, said, "tick", "end"))
    said = f"{q.name} against the bytes of the cache, {len(at)} methods. The figures are below."
    return drawing(frame, said, kind, *marks)


def _shares(shares: Sequence[float], frame: Frame) -> tuple[Scale, list[float] | None]:
    """The scale of memory, and its ticks: halves of halves where the shares are far apart."""
    if min(shares) > 0 and max(shares) / min(shares) > 3:
        low, high = min(shares) / 1.15, max(shares) * 1.15
        return Scale(low, high, *frame.x, log=True), [h for h in HALVES if low <= h <= high]
    return scale_of(shares, *frame.x), None


def _values(plane: Plane, frame: Frame) -> tuple[Scale, set[int]]:
    """The scale of the quality, and the points that are too bad for it: none of the front."""
    values, more = [p.value for p in plane.points], plane.quality.more
    y = scale_of(values, *frame.y, log=None if more else 6)
    off = set() if y.log else set(outliers([-v if more else v for v in values]))
    if not off or any(plane.points[i].front for i in off):
        return y, set()
    bottom, top = frame.y
    bottom, top = (bottom - OFF, top) if more else (bottom, top + OFF)
    return scale_of([v for i, v in enumerate(values) if i not in off], bottom, top), off


def _off_scale(frame: Frame, edge: float, off: set[int], *, up: bool) -> str:
    """The border of the scale, and what is beyond it."""
    if not off:
        return ""
    at = edge + OFF / 2 if up else edge - OFF / 2
    said = text(frame.x[0] - 6, edge + 4, "off" + (" \u2191" if up else " \u2193"), "tick", "end")
    return line(frame.x[0], at, frame.x[1], at, "break") + said


def _stairs(front: Sequence[tuple[float, float]], frame: Frame) -> list[tuple[float, float]]:
    """The border of what is dominated: level to the right of a point, up to the next one's."""
    found = []
    for (x1, y1), (x2, y2) in pairwise(front):
        found += [(x1, y1), (x2, y1), (x2, y2)]
    return [*found, front[-1], (frame.x[1], front[-1][1])]


def _walls(stairs: Sequence[tuple[float, float]], corner: Box) -> list[Box]:
    """What labels had better not cover: the pieces of the front, and the corner's words."""
    pieces = [
        Box(min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1)
        for (x1, y1), (x2, y2) in pairwise(stairs)
    ]
    return [corner, *pieces]


def _order(run: Run, points: Sequence[Point]) -> list[int]:
    """Whose label comes first: the full cache's, the front's, then by bytes."""
    full = [run.looks[p.label].method == FULL for p in points]
    return sorted(range(len(points)), key=lambda i: (not full[i], not points[i].front, i))


def _label(label: Placed, point: tuple[float, float], said: str) -> str:
    """A method's name, and a leader to its point where it stands far."""
    box = label.box
    at = {"start": box.left, "end": box.right, "middle": (box.left + box.right) / 2}
    name = text(at[label.anchor], box.bottom - 3, said, "label", label.anchor)
    if label.leader is None:
        return name
    (x, y), (x2, y2) = point, label.leader
    far = math.hypot(x2 - x, y2 - y)
    x1, y1 = x + (x2 - x) * 7 / far, y + (y2 - y) * 7 / far
    return line(x1, y1, x2, y2, "leader") + name


def _full(frame: Frame, y: Scale, plane: Plane) -> str:
    """The full cache's value, across the chart."""
    if plane.full is None:
        return ""
    at = y(plane.full)
    return line(frame.x[0], at, frame.x[1], at, "full")
