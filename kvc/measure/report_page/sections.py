"""Sections of a page that show what quality is lost: by bytes, by position, by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from kvc.measure.report_page import curves, pareto
from kvc.measure.report_page.figures import (
    both,
    figure,
    grid,
    section,
    shape_glyph,
    table,
)
from kvc.measure.report_page.markup import (
    number,
    percent,
    tag,
    three,
    tick,
    tick_percent,
    words,
)
from kvc.measure.report_page.quality import Plane, on_front
from kvc.measure.report_page.rows import FULL, Look, Results, Run, full_of


def memory(run: Run, planes: Sequence[Plane], at: str) -> str:
    """Memory against each quality."""
    figures = []
    for plane in planes:
        q = plane.quality
        title = q.name + run.where(q.task, plane.setting)
        note = f"{q.unit[:1].upper()}{q.unit[1:]}. " if q.unit else ""
        without = f" Without measured bytes: {', '.join(plane.without)}." if plane.without else ""
        rows = [
            [p.label, p.share, p.per_token, p.value, "yes" if p.front else ""] for p in plane.points
        ]
        head = ["method", "share of the bytes", "bytes per token", q.name.lower(), "on the front"]
        figures.append(
            figure(
                title,
                f"{note}{on_front(run, plane)}{without}",
                both(partial(pareto.draw, run, plane)),
                table(title, head, rows),
            )
        )
    note = (
        "Filled marks are on the front: no other cache was as good in fewer bytes. "
        "Dots: the full cache. A click on a name above picks it in all charts."
    )
    inside = [_shapes(run), grid(*figures)] if figures else []
    return section(f"{at}memory", "Quality against memory", note, *inside)


def _shapes(run: Run) -> str:
    """What the shapes of marks mean, of those that occur."""
    shapes = {look.shape: look for look in run.looks.values() if look.method != FULL}
    keys = [
        tag("span", shape_glyph(look), words(look.does), class_="key") for look in shapes.values()
    ]
    return tag("p", *keys, class_="keys") if keys else ""


def _lines(run: Run, planes: Sequence[Plane], chart: curves.Curves, note: str) -> str:
    if not chart.curves:
        return ""
    first = {p.label for plane in planes for p in plane.front}
    head, rows = chart.rows()
    drawn = both(partial(curves.draw, chart, first), 330)
    return figure(chart.title, note, drawn, table(chart.title, head, rows))


def positions(run: Run, planes: Sequence[Plane], at: str) -> str:
    """Perplexity and divergence by position."""
    figures = []
    for setting, results in run.of("ppl"):
        looks, found = run.shown(results, "by_position")
        where = run.where("ppl", setting)
        raised = [[[a, b, math.exp(min(nll, 700))] for a, b, nll, *_ in one] for one in found]
        chart = curves.Curves(
            f"Perplexity by position{where}", "position", curves.by_position(looks, raised, 2)
        )
        figures.append(_lines(run, planes, chart, "Of the next token, by how many came before."))
        chart = curves.Curves(
            f"What compression adds{where}", "position", _added(run, results, looks, found),
            three, log=False,
        )  # fmt: skip
        figures.append(_lines(run, planes, chart, "Nats per token above the full cache."))
    for setting, results in run.of("kl"):
        looks, found = run.shown(results, "by_position")
        chart = curves.Curves(
            f"Divergence by position{run.where('kl', setting)}",
            "position", curves.by_position(looks, found, 2), three,
        )  # fmt: skip
        figures.append(_lines(run, planes, chart, "KL from the full cache, nats per token."))
    return section(f"{at}positions", "By position", "", grid(*figures))


def _added(
    run: Run, results: Results, looks: Sequence[Look], found: Sequence[Sequence[Sequence[Any]]]
) -> tuple[curves.Curve, ...]:
    """Nats above the full cache's in the same buckets."""
    full = (full_of(run, results) or {}).get("by_position") or []
    base = {(a, b): nll for a, b, nll, *_ in full}
    others = [i for i, look in enumerate(looks) if look.method != FULL]
    added = [
        [[a, b, nll - base[a, b]] for a, b, nll, *_ in found[i] if (a, b) in base] for i in others
    ]
    return curves.by_position([looks[i] for i in others], added, 2)


def drift(run: Run, planes: Sequence[Plane], at: str) -> str:
    """Whether errors grow in long generation."""
    figures, length = [], 0
    for setting, results in run.of("drift"):
        looks, found = run.shown(results, "by_position")
        length = max([length, *(int(results[look.label].get("length") or 0) for look in looks)])
        for column, name, note, form, ticks in (
            (2, "Divergence", "KL from the full cache, nats per token.", three, tick),
            (3, "Agreement", "Share of tokens chosen as with it.", percent, tick_percent),
        ):
            title = f"{name} in long generation{run.where('drift', setting)}"
            points = curves.by_position(looks, found, column)
            more = column == 3
            chart = curves.Curves(
                title, "generated tokens", points, form, ticks, more=more, log=not more
            )
            figures.append(_lines(run, planes, chart, note))
    note = f"The full cache's own text, up to {number(length)} tokens, read through each cache."
    return section(f"{at}drift", "Drift", note, grid(*figures))


def layers(run: Run, planes: Sequence[Plane], at: str) -> str:
    """Errors by layer."""
    figures = []
    for setting, results in run.of("layers"):
        for key, name in (("attention", "Attention's output"), ("k", "Keys"), ("v", "Values")):
            looks, found = run.shown(results, key)
            title = f"{name}{run.where('layers', setting)}"
            points = curves.by_layer(looks, found)
            chart = curves.Curves(title, "layer", points, three, by_layer=True)
            figures.append(_lines(run, planes, chart, "Relative error, by layer."))
    return section(f"{at}layers", "Error by layer", "", grid(*figures))
