"""The sections of a page: what each shows of a run, and nothing where there are no rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from kvc.measure.report_page import bars, cells, curves, pareto
from kvc.measure.report_page.figures import (
    NARROW,
    WIDE,
    both,
    figure,
    folded,
    glyph,
    grid,
    section,
    shape_glyph,
    table,
)
from kvc.measure.report_page.markup import (
    known,
    number,
    percent,
    size,
    tag,
    tick,
    tick_percent,
    words,
)
from kvc.measure.report_page.quality import Plane, on_front
from kvc.measure.report_page.rows import FULL, Look, Results, Run, Setting, full_of

SMALL_MAP, BARS = 164.0, 900.0  # px


def _where(run: Run, task: str, setting: Setting) -> str:
    """The setting in words, where a task has several."""
    return f" ({setting.said})" if len(run.results[task]) > 1 else ""


def _shown(run: Run, results: Results, key: str) -> tuple[list[Look], list[Any]]:
    """The methods that have a result, in the order of the page, and those results."""
    looks = [look for look in run.looks.values() if results.get(look.label, {}).get(key)]
    return looks, [results[look.label][key] for look in looks]


def memory(run: Run, planes: Sequence[Plane], at: str) -> str:
    """Memory against each quality."""
    figures = []
    for plane in planes:
        q = plane.quality
        title = q.name + _where(run, q.task, plane.setting)
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
        looks, found = _shown(run, results, "by_position")
        where = _where(run, "ppl", setting)
        raised = [[[a, b, math.exp(min(nll, 700))] for a, b, nll, *_ in one] for one in found]
        chart = curves.Curves(
            f"Perplexity by position{where}", "position", curves.by_position(looks, raised, 2)
        )
        figures.append(_lines(run, planes, chart, "Of the next token, by how many came before."))
        chart = curves.Curves(
            f"What compression adds{where}", "position", _added(run, results, looks, found),
            _three, log=False,
        )  # fmt: skip
        figures.append(_lines(run, planes, chart, "Nats per token above the full cache."))
    for setting, results in run.of("kl"):
        looks, found = _shown(run, results, "by_position")
        chart = curves.Curves(
            f"Divergence by position{_where(run, 'kl', setting)}",
            "position", curves.by_position(looks, found, 2), _three,
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
        looks, found = _shown(run, results, "by_position")
        length = max([length, *(int(results[look.label].get("length") or 0) for look in looks)])
        for column, name, note, form, ticks in (
            (2, "Divergence", "KL from the full cache, nats per token.", _three, tick),
            (3, "Agreement", "Share of tokens chosen as with it.", percent, tick_percent),
        ):
            title = f"{name} in long generation{_where(run, 'drift', setting)}"
            points = curves.by_position(looks, found, column)
            more = column == 3
            chart = curves.Curves(
                title, "generated tokens", points, form, ticks, more=more, log=not more
            )
            figures.append(_lines(run, planes, chart, note))
    note = f"The full cache's own text, up to {number(length)} tokens, read through each cache."
    return section(f"{at}drift", "Drift", note, grid(*figures))


def recall(run: Run, at: str) -> str:
    """Recall by depth and distance, a small map for each method."""
    inside = []
    for setting, results in run.of("recall"):
        looks, found = _shown(run, results, "cells")
        kinds: dict[str, list[tuple[Look, cells.Heat]]] = {}
        for look, group in zip(looks, found, strict=True):
            for kind, heat in cells.recall_maps(group, look.label):
                kinds.setdefault(kind, []).append((look, heat))
        for kind, maps in kinds.items():
            small = [_small(look, heat) for look, heat in maps]
            head, rows = ["method", *cells.table_of(maps[0][1])[0]], []
            for look, heat in maps:
                rows += [[look.label, *row] for row in cells.table_of(heat)[1]]
            title = f"{kind[:1].upper()}{kind[1:]}{_where(run, 'recall', setting)}"
            inside.append(tag("h3", words(title)) + grid(*small, kind="maps"))
            inside.append(folded("Figures", table(title, head, rows)))
    note = "Facts given back whole, in percent, by the depth in the context at which they are told."
    return section(f"{at}recall", "Recall of planted facts", note, *inside)


def _small(look: Look, heat: cells.Heat) -> str:
    name = tag("figcaption", glyph(look), words(look.label))
    return tag("figure", name, cells.draw(heat, SMALL_MAP), class_=f"map m m{look.index}")


def parts(run: Run, at: str) -> str:
    """Bytes by part."""
    figures = []
    for setting, results in run.of("bytes"):
        looks, _ = _shown(run, results, "parts")
        if not looks:
            continue
        shown = {look.label: results[look.label] for look in looks}
        small = [look for look in looks if look.method != FULL] or looks
        small.sort(key=lambda look: shown[look.label]["nbytes"])
        names = bars.parts_of({look.label: shown[look.label] for look in small})
        every = bars.parts_of(shown)
        rows = [[k, *(r["parts"].get(p) for p in every), r["nbytes"]] for k, r in shown.items()]
        figures.append(
            figure(
                f"Bytes by part{_where(run, 'bytes', setting)}",
                _dense(run, shown, hidden=len(small) < len(looks)),
                bars.legend(names)
                + bars.stacked(small, shown, names, "wide", BARS)
                + bars.stacked(small, shown, names, "narrow", NARROW),
                table("Bytes by part", ["method", *every, "all"], rows),
                "chart full-width",
            )
        )
    return section(f"{at}parts", "What the bytes are", "", *figures)


def _dense(run: Run, shown: Results, *, hidden: bool) -> str:
    full = full_of(run, shown)
    if full is None or not hidden:
        return ""
    return f"Bars share one scale. The full cache takes {size(full['bytes_per_token'])} per token."


def layers(run: Run, planes: Sequence[Plane], at: str) -> str:
    """Errors by layer."""
    figures = []
    for setting, results in run.of("layers"):
        for key, name in (("attention", "Attention's output"), ("k", "Keys"), ("v", "Values")):
            looks, found = _shown(run, results, key)
            title = f"{name}{_where(run, 'layers', setting)}"
            points = curves.by_layer(looks, found)
            chart = curves.Curves(title, "layer", points, _three, by_layer=True)
            figures.append(_lines(run, planes, chart, "Relative error, by layer."))
    return section(f"{at}layers", "Error by layer", "", grid(*figures))


def maps(run: Run, at: str) -> str:
    """KVSharer's distances and MiniCache's retained tokens."""
    figures: dict[str, tuple[list[str], Any]] = {}
    for setting, results in run.of("maps"):
        for label, result in results.items():
            for key in ("kvsharer", "minicache"):
                if given := result.get(key):
                    same = json.dumps([key, given, setting.said], sort_keys=True)
                    figures.setdefault(same, ([], (key, given)))[0].append(label)
    drawn = [_map(", ".join(labels), *given) for labels, given in figures.values()]
    return section(f"{at}maps", "What layers share and keep", "", grid(*drawn))


def _map(labels: str, key: str, given: Mapping[str, Any]) -> str:
    if key == "kvsharer":
        shared = given.get("map") or {}
        heat = cells.distance_map(given["distances"], shared, f"Distances of layers, {labels}")
        note = "The stronger the colour, the farther apart."
        if shared:
            note += " Framed: one layer reads the other's cache."
    else:
        heat = cells.retained_map(given["pairs"], given["retained"])
        most = max((cell.value or 0.0 for cell in heat.cells.values()), default=0.0)
        note = (
            f"{labels}: tokens that pairs of layers did not merge, in percent, by position. "
            f"The strongest colour: {percent(most)}."
        )
    drawn = cells.draw(heat, WIDE, "wide") + cells.draw(heat, NARROW, "narrow")
    figures = table(heat.title, *cells.table_of(heat))
    return figure(heat.title, note, drawn, figures, "chart top")


def costs(run: Run, at: str) -> str:
    """Free answers, speed and peak memory: one dot for each method."""
    figures = list(_dots(run))
    return section(f"{at}costs", "Length of answers, speed, peak memory", "", grid(*figures))


def _dots(run: Run) -> Iterator[str]:
    for task, key, title, note, form in (
        ("answers", "length", "Free answers", "Tokens until the end of text or the limit.", _three),
        ("time", "decode_tokens_per_s", "Decoding", "Tokens per second.", _three),
        ("time", "prefill_tokens_per_s", "Prompt", "Tokens per second.", _three),
        ("memory", "peak_bytes", "Peak memory", "Above the weights.", size),
    ):
        for setting, results in run.of(task):
            values = {k: r[key] for k, r in results.items() if known(r.get(key))}
            if not values:
                continue
            full = (full_of(run, results) or {}).get(key)
            name = f"{title}{_where(run, task, setting)}"
            drawn = "".join(
                bars.dots(name, list(run.looks.values()), values, form, full, kind, room)
                for kind, room in (("wide", WIDE), ("narrow", NARROW))
            )
            rows = [[label, value] for label, value in values.items()]
            dashes = " Dots: the full cache." if known(full) else ""
            yield figure(name, note + dashes, drawn, table(name, ["method", title], rows))


def _three(x: Any) -> str:
    return number(x, 3)
