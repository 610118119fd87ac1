"""Where labels go: beside their points, on nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvc.measure.report_page.markup import width
from kvc.measure.report_page.svg import TEXT, Frame

HIGH = 13.0  # px that a line of text takes
NEAR, FAR = 8.0, (17.0, 28.0, 41.0, 56.0, 74.0)  # px from a point: beside it, and with a leader
TURNS = [0, 180, 270, 90, 315, 45, 225, 135, 292.5, 67.5, 247.5, 112.5]  # degrees, down the page


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether they share more than an edge."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """A label that found room: its point's number, its box, its side, and where a leader ends."""

    index: int
    box: Box
    anchor: str  # of the text: the side that is near the point
    leader: tuple[float, float] | None


def around(
    points: Sequence[tuple[float, float, str]],
    order: Sequence[int],
    frame: Frame,
    walls: Sequence[Box] = (),
) -> list[Placed]:
    """Places labels around points, in the order given; those without room are left out.

    Each takes the nearest place that meets no label, no point and no wall's box; crossing a wall
    is tried last, because a line behind a text can be borne and a text behind a text cannot.

    Args:
        points: x, y and the text of each, in pixels.
        order: The numbers of those that want a label, the most important first.
        frame: The chart, which labels do not leave.
        walls: What labels had better not cover, such as pieces of a line.
    """
    dots = [Box(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    inside = Box(frame.left - 2, 2, frame.width - 2, frame.height - frame.bottom - 1)
    taken: list[Box] = []
    found = []
    for index in order:
        x, y, said = points[index]
        wide = width(said, TEXT)
        for far, box, anchor, leader in _places(x, y, wide):
            if box.left < inside.left or box.right > inside.right:
                continue
            if box.top < inside.top or box.bottom > inside.bottom:
                continue
            others = [dot for i, dot in enumerate(dots) if i != index or far]
            tie = _pieces((x, y), leader) if leader else []
            if any(b.meets(other) for b in (box, *tie) for other in taken):
                continue
            if any(box.meets(other) for other in others):
                continue
            if far != math.inf and any(box.meets(wall) for wall in walls):
                continue
            taken += [box, *tie]
            found.append(Placed(index, box, anchor, leader))
            break
    return found


Place = tuple[float, Box, str, tuple[float, float] | None]


def _places(x: float, y: float, wide: float) -> list[Place]:
    """Boxes around a point, the best first; in the end all of them again, over walls (inf)."""
    found = []
    for far in (NEAR, *FAR):
        for turn in TURNS:
            dx, dy = math.cos(math.radians(turn)), math.sin(math.radians(turn))
            ax, ay = x + far * dx, y + far * dy  # where the label's nearest edge is
            anchor = "start" if dx > 0.3 else "end" if dx < -0.3 else "middle"
            left = ax - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
            middle = ay + (HIGH / 2 * dy if abs(dx) <= 0.3 else 3 * dy)
            box = Box(left, middle - HIGH / 2, left + wide, middle + HIGH / 2)
            near = far == NEAR
            found.append((0.0 if near else far, box, anchor, None if near else (ax, ay)))
    return found + [(math.inf, box, side, leader) for _, box, side, leader in found]


def _pieces(start: tuple[float, float], end: tuple[float, float], n: int = 8) -> list[Box]:
    """A leader as small boxes, which labels do not meet: all but its last piece."""
    (x1, y1), (x2, y2) = start, end
    spots = [(x1 + (x2 - x1) * i / n, y1 + (y2 - y1) * i / n) for i in range(n)]
    return [Box(x - 1, y - 1, x + 1, y + 1) for x, y in spots]


def along(wanted: Sequence[float], low: float, high: float, step: float = HIGH) -> list[float]:
    """Places on a line from `low` to `high`, each as near as can be to the one wanted.

    They keep their order and are `step` apart, or as far as the line allows.
    """
    if not wanted:
        return []
    step = min(step, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, int]] = []  # the middle and the number of those pushed together
    for index in order:
        middle, n = min(max(wanted[index], low), high), 1
        while groups:
            before, m = groups[-1]
            if before + step * (m - 1) / 2 + step <= middle - step * (n - 1) / 2 + 1e-9:
                break
            groups.pop()
            half = step * (m + n - 1) / 2
            middle = (before * m + middle * n) / (m + n)
            middle, n = min(max(middle, low + half), high - half), m + n
        groups.append((middle, n))
    places = [middle + step * (i - (n - 1) / 2) for middle, n in groups for i in range(n)]
    found = [0.0] * len(wanted)
    for index, place in zip(order, places, strict=True):
        found[index] = place
    return found
