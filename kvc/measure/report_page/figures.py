"""What surrounds a chart: its title, what it shows, and its figures as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvc.measure.report_page.markup import NONE, known, number, tag, words
from kvc.measure.report_page.rows import Look
from kvc.measure.report_page.svg import marker

WIDE, NARROW = 540.0, 343.0  # px of a chart on a desk and on a phone
HIGH = 380.0
# what is wider than a phone scrolls by itself, by keys too
SCROLL = {"class_": "scroll", "role": "region", "tabindex": "0"}


def both(draw: Callable[[str, float, float], str], high: float = HIGH) -> str:
    """A chart drawn twice, so that its type is as large on a phone; CSS shows one of them."""
    return draw("wide", WIDE, high) + draw("narrow", NARROW, min(high, NARROW))


def figure(title: str, note: str, chart: str, table: str = "", kind: str = "chart") -> str:
    """A chart with what it shows in words and, folded, in figures. `title`, `note` are text."""
    head = tag("h3", words(title)) if title else ""
    caption = tag("figcaption", head, tag("p", words(note)) if note else "")
    return tag("figure", caption, chart, folded("Figures", table) if table else "", class_=kind)


def folded(name: str, inside: str) -> str:
    """Something that opens on a click."""
    return tag(
        "details", tag("summary", words(name)), tag("div", inside, **SCROLL, aria_label=name)
    )


def cell(value: Any, form: Callable[[Any], str] = number, name: str = "td") -> str:
    """A cell of a table: a number keeps all its digits in `data-v`, to sort and to read by."""
    if known(value):
        return tag(name, words(form(value)), class_="n", data_v=repr(value))
    if isinstance(value, str):
        return tag(name, words(value))
    return tag(name, NONE, class_="n")


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    form: Callable[[Any], str] = number,
) -> str:
    """A plain table; the first cell of a row names it."""
    top = tag("thead", tag("tr", *(tag("th", words(name), scope="col") for name in head)))
    body = [
        tag("tr", tag("th", words(first), scope="row"), *(cell(value, form) for value in rest))
        for first, *rest in rows
    ]
    return tag("table", tag("caption", words(caption)), top, tag("tbody", *body))


def glyph(look: Look) -> str:
    """A method's mark, in a line of text."""
    return _inline(look, f"{look.kind} on")


def shape_glyph(look: Look) -> str:
    """The shape of a method's mark, in ink."""
    return _inline(look, "ink on")


def _inline(look: Look, kind: str) -> str:
    mark = tag("g", marker(look.shape, 8, 8, 5, "on"), class_=kind)
    return tag("svg", mark, width="16", height="16", viewBox="0 0 16 16", aria_hidden="true")


def section(name: str, title: str, note: str, *inside: str) -> str:
    """A part of the page; nothing where nothing is inside."""
    if not any(inside):
        return ""
    intro = tag("p", words(note), class_="note") if note else ""
    return tag("section", tag("h2", words(title)), intro, *inside, id=name)


def grid(*figures: str, kind: str = "grid") -> str:
    """Figures side by side where there is room."""
    return tag("div", *figures, class_=kind) if any(figures) else ""
