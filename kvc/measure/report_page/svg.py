"""Charts as SVG: scales, axes and marks. Colours are CSS classes, so that both themes share one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvc.measure.report_page.markup import known, tag, tick, width, words

SMALL = 11.0  # px, the type of ticks
TEXT = 12.0  # px, the type of labels
ROUNDING = 1e-6  # what float32 leaves of an error of nothing, at most
GAP = 10.0  # between rounding and the least that is more, at least
STRIP = 18.0  # px, between the zero below a logarithmic axis and its first value


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` on pixels from `start` to `stop`.

    A logarithmic one keeps its place `start` for 0 where `zero` says so, because errors of nothing
    belong into the picture; for all below `low` too where `nearly` does, because rounding is
    nothing.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    zero: bool = False
    nearly: bool = False

    def __call__(self, x: float) -> float:
        """The pixel of a value."""
        start = self.start + math.copysign(STRIP, self.stop - self.start) * self.zero
        if self.log and (x <= 0 or (self.nearly and x < self.low)):
            return self.start
        low, high, x = (math.log(v) if self.log else v for v in (self.low, self.high, x))
        return start + (x - low) / (high - low) * (self.stop - start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within, the axis' 0 first."""
        zero = [0.0] if self.zero else []
        if self.log and self.high / self.low >= 8:
            return zero + _decades(self.low, self.high, most)
        step = _round((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        places = max(-math.floor(math.log10(step)), 0) + 1
        return zero + [round(i * step, places) for i in range(first, last + 1)]


def scale_of(
    values: Sequence[float], start: float, stop: float, *, log: float | None = None, low: Any = None
) -> Scale:
    """A scale that holds the values, with some air.

    Args:
        values: At least one, all finite.
        start: The pixel of the lowest.
        stop: The pixel of the highest.
        log: Logarithmic where the highest positive value is so many times the lowest.
        low: The lowest value of a linear scale, where there is one.
    """
    positive = sorted(v for v in values if v > 0)
    if log and positive and min(values) > -ROUNDING:
        first = _above_rounding(positive)
        bottom, top, zero = positive[first], positive[-1], first + len(values) - len(positive)
        if top / bottom >= log or zero:
            air = (top / bottom) ** 0.06 if top > bottom else 2.0
            where = bottom / air, top * air, start, stop
            return Scale(*where, log=True, zero=bool(zero), nearly=first > 0)
    bottom, top = min(values) if low is None else low, max(values)
    air = 0.06 * (top - bottom) or 0.06 * abs(top) or 1.0
    return Scale(bottom - air if low is None else low, top + air, start, stop)


def _above_rounding(values: Sequence[float]) -> int:
    """Where, in ascending values, those begin that are more than rounding: behind a wide gap."""
    first = sum(v < ROUNDING for v in values)
    apart = 0 < first < len(values) and values[first] > GAP * values[first - 1]
    return first if apart else 0


def outliers(losses: Sequence[float]) -> list[int]:
    """Which values to leave off a linear scale, so that the others can be told apart.

    A third at most, and only if the scale is three times as fine without them.
    """
    order = sorted(range(len(losses)), key=lambda i: losses[i])
    spread = losses[order[-1]] - losses[order[0]] if order else 0.0
    for n in range(1, len(order) // 3 + 1):
        if 3 * (losses[order[-n - 1]] - losses[order[0]]) < spread:
            return order[-n:]
    return []


def _round(step: float) -> float:
    """The next of 1, 2, 2.5, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(r for r in (1, 2, 2.5, 5, 10) if r * power >= step * (1 - 1e-9))


def _decades(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, of every second one if there are many; with halves if there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts, step in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 4)):
        found = [p * 10.0**n for n in powers[::step] for p in parts if low <= p * 10.0**n <= high]
        if len(found) <= most + 2:
            break
    return [float(f"{v:.6g}") for v in found]


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a chart's marks go, in pixels of a drawing `width` by `height`."""

    width: float
    height: float
    left: float = 46.0
    right: float = 12.0
    top: float = 14.0
    bottom: float = 42.0

    @property
    def x(self) -> tuple[float, float]:
        """From the left to the right."""
        return self.left, self.width - self.right

    @property
    def y(self) -> tuple[float, float]:
        """From the bottom to the top."""
        return self.height - self.bottom, self.top


def px(x: float) -> str:
    """A coordinate."""
    return f"{x:.1f}".removesuffix(".0")


def drawing(frame: Frame, said: str, kind: str, *marks: str) -> str:
    """The whole SVG; `said` is what a screen reader says, `kind` the class: wide, narrow or any."""
    w, h = px(frame.width), px(frame.height)
    box = f"0 0 {w} {h}"
    return tag(
        "svg", *marks, viewBox=box, width=w, height=h, role="img", aria_label=said, class_=kind
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return tag("line", x1=px(x1), y1=px(y1), x2=px(x2), y2=px(y2), class_=kind)


def text(x: float, y: float, said: str, kind: str = "", anchor: str | None = None) -> str:
    """A line of text; `said` is not markup."""
    return tag("text", words(said), x=px(x), y=px(y), class_=kind or None, text_anchor=anchor)


def path(points: Sequence[tuple[float, float]], kind: str, **more: Any) -> str:
    """Points joined by lines."""
    joined = "L".join(f"{px(x)} {px(y)}" for x, y in points)
    return tag("path", d=f"M{joined}", class_=kind, **more)


def rect(x: float, y: float, w: float, h: float, kind: str, *inside: str, **more: Any) -> str:
    """A box."""
    sides = {"x": px(x), "y": px(y), "width": px(max(w, 0.0)), "height": px(max(h, 0.0))}
    return tag("rect", *inside, class_=kind, **sides, **more)


def hint(said: str) -> str:
    """What is shown where the pointer rests."""
    return tag("title", words(said))


def axes(
    frame: Frame,
    x: Scale,
    y: Scale,
    x_label: str,
    *,
    x_ticks: Sequence[float] | None = None,
    x_form: Callable[[float], str] = tick,
    y_form: Callable[[float], str] = tick,
) -> str:
    """Ticks on both sides and faint lines at those of y; the label of y is the chart's title."""
    (left, right), (bottom, top) = frame.x, frame.y
    marks = []
    for value in y.ticks(max(int((bottom - top) / 45), 3)):
        at, about = y(value), "\u2248 " if y.nearly and value == 0 else ""
        marks += [
            line(left, at, right, at, "axis" if value == 0 and not y.log else "grid"),
            text(left - 6, at + 4, f"{about}{y_form(value)}", "tick", "end"),
        ]
    marks.append(line(left, bottom, right, bottom, "axis"))
    ticks = x.ticks(max(int((right - left) / 64), 3)) if x_ticks is None else x_ticks
    ended = -math.inf
    for value in ticks:
        said, at = x_form(value), x(value)
        half = width(said, SMALL) / 2
        marks.append(line(at, bottom, at, bottom + 4, "axis"))
        if at - half > ended + 4:  # numbers that would touch are left out
            marks.append(text(at, bottom + 16, said, "tick", "middle"))
            ended = at + half
    marks.append(text(left, bottom + 33, x_label, "title"))
    return "".join(marks)


SHAPES = {  # corners for a radius of 1, all of about one area
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1.25), (1.15, 0.8), (-1.15, 0.8)],
    "diamond": [(0, -1.3), (1.15, 0), (0, 1.3), (-1.15, 0)],
    "hexagon": [
        (math.cos(i * math.pi / 3) * 1.12, math.sin(i * math.pi / 3) * 1.12) for i in range(6)
    ],
    "star": [
        (
            math.sin(i * math.pi / 5) * (1.4 - 0.72 * (i % 2)),
            -math.cos(i * math.pi / 5) * (1.4 - 0.72 * (i % 2)),
        )
        for i in range(10)
    ],
}


def marker(shape: str, x: float, y: float, r: float, kind: str, *inside: str) -> str:
    """A mark of one point, `circle` or one of SHAPES."""
    if shape == "circle":
        return tag("circle", *inside, cx=px(x), cy=px(y), r=px(r), class_=kind)
    corners = " ".join(f"{x + r * dx:.2f},{y + r * dy:.2f}" for dx, dy in SHAPES[shape])
    return tag("polygon", *inside, points=corners, class_=kind)


def finite(values: Sequence[Any]) -> list[float]:
    """Those of the values that are numbers."""
    return [float(v) for v in values if known(v)]
