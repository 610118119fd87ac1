"""Bars and dots by method: bytes by part, and figures that stand for themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvc.measure.report_page.markup import known, percent, short, size, tag, width, words
from kvc.measure.report_page.rows import Look
from kvc.measure.report_page.svg import (
    SMALL,
    Frame,
    drawing,
    hint,
    line,
    marker,
    rect,
    scale_of,
    text,
)

LABEL = 24  # letters of a method's name at most
HIGH = 22.0  # px of a row
FILLS = 10  # of parts; those beyond have only an outline of the same colours


def parts_of(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All parts, those that take the most bytes first."""
    sums: dict[str, float] = {}
    for result in results.values():
        for part, count in result["parts"].items():
            sums[part] = sums.get(part, 0) + count / max(result["nbytes"], 1)
    return sorted(sums, key=lambda part: -sums[part])


def stacked(
    looks: Sequence[Look],
    results: Mapping[str, Mapping[str, Any]],
    parts: Sequence[str],
    kind: str,
    room: float,
) -> str:
    """Bytes by part, a bar for each method, as SVG: within, the part's name where there is room."""
    names = [short(look.label, LABEL if room > 500 else 14) for look in looks]
    left = max(width(name) for name in names) + 10
    ends = [_total(results[look.label], room > 500) for look in looks]
    right = max(width(end, SMALL) for end in ends) + 10
    frame = Frame(room, HIGH * len(looks) + 12, left, right, 4, 8)
    x = scale_of([results[look.label]["nbytes"] for look in looks], *frame.x, low=0)
    marks = []
    for row, (look, name, end) in enumerate(zip(looks, names, ends, strict=True)):
        y, at, bar = frame.top + HIGH * row, 0.0, []
        for part in parts:
            if count := results[look.label]["parts"].get(part, 0):
                start, stop = x(at), x(at + count)
                bar.append(_segment(look, part, parts.index(part), count, results, start, stop, y))
                at += count
        said = text(x(at) + 6, y + 15, end, "tick")
        label = text(left - 8, y + 15, name, "label", "end")
        marks.append(tag("g", label, *bar, said, class_=look.kind))
    said = f"Bytes by part of {len(looks)} caches. The figures are below."
    return drawing(frame, said, kind, *marks)


def _total(result: Mapping[str, Any], wide: bool) -> str:
    share = result["nbytes"] / result["dense_bytes"] if result.get("dense_bytes") else None
    each = f"{size(result.get('bytes_per_token'))} per token, " if wide else ""
    return f"{each}{percent(share)}"


def _segment(
    look: Look, part: str, place: int, count: float, results: Mapping[str, Mapping[str, Any]],
    start: float, stop: float, y: float,
) -> str:  # fmt: skip
    share = count / max(results[look.label]["nbytes"], 1)
    said = hint(f"{look.label}\n{part}: {size(count)}\n{percent(share)} of this cache")
    wide = stop - start
    box = rect(start, y + 2, wide - (1 if wide > 3 else 0), HIGH - 5, fill_of(place), said)
    if width(part, SMALL) + 8 > wide:
        return box
    return box + text(start + 5, y + 15, part, "part")


def fill_of(place: int) -> str:
    """The classes of a part's fill."""
    return f"p{place % FILLS}" + (" hollow" if place >= FILLS else "")


def legend(parts: Sequence[str]) -> str:
    """What the fills are, as HTML: where a segment is too narrow for its name."""
    keys = [
        tag("span", tag("i", class_=fill_of(i)), words(part), class_="key")
        for i, part in enumerate(parts)
    ]
    return tag("p", *keys, class_="keys")


def dots(
    title: str,
    looks: Sequence[Look],
    values: Mapping[str, float],
    form: Callable[[Any], str],
    reference: float | None,
    kind: str,
    room: float,
) -> str:
    """One figure of each method as a dot on its line, by value; the reference across all."""
    shown = [look for look in looks if known(values.get(look.label))]
    shown.sort(key=lambda look: -values[look.label])
    names = [short(look.label, 20) for look in shown]
    left = max(width(name) for name in names) + 10
    right = max(width(form(v), SMALL) for v in values.values()) + 12
    frame = Frame(room, HIGH * len(shown) + 14, left, right, 4, 10)
    found = [values[look.label] for look in shown]
    x = scale_of(found, *frame.x, low=0)
    marks = []
    if reference is not None and known(reference):
        at = x(reference)
        marks.append(line(at, frame.y[1], at, frame.y[0], "full"))
    for row, (look, name) in enumerate(zip(shown, names, strict=True)):
        y, value = frame.top + HIGH * row + HIGH / 2, values[look.label]
        marks.append(
            tag(
                "g",
                text(left - 8, y + 4, name, "label", "end"),
                line(frame.x[0], y, frame.x[1], y, "grid"),
                marker(look.shape, x(value), y, 5, "on", hint(f"{look.label}\n{form(value)}")),
                text(x(value) + 9, y + 4, form(value), "tick halo"),
                class_=f"{look.kind} on",
            )
        )
    said = f"{title}: {len(shown)} methods. The figures are below."
    return drawing(frame, said, kind, *marks)
