"""Sections of a page that show what is kept: facts, bytes, layers, and what it costs in time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kvc.measure.report_page import bars, cells
from kvc.measure.report_page.figures import (
    NARROW,
    WIDE,
    figure,
    folded,
    glyph,
    grid,
    section,
    table,
)
from kvc.measure.report_page.markup import known, percent, size, tag, three, words
from kvc.measure.report_page.rows import FULL, Look, Results, Run, full_of

SMALL_MAP, BARS = 164.0, 900.0  # px


def recall(run: Run, at: str) -> str:
    """Recall by depth and distance, a small map for each method."""
    inside = []
    for setting, results in run.of("recall"):
        looks, found = run.shown(results, "cells")
        kinds: dict[str, list[tuple[Look, cells.Heat]]] = {}
        for look, group in zip(looks, found, strict=True):
            for kind, heat in cells.recall_maps(group, look.label):
                kinds.setdefault(kind, []).append((look, heat))
        for kind, maps in kinds.items():
            small = [_small(look, heat) for look, heat in maps]
            head, rows = ["method", *cells.table_of(maps[0][1])[0]], []
            for look, heat in maps:
                rows += [[look.label, *row] for row in cells.table_of(heat)[1]]
            title = f"{kind[:1].upper()}{kind[1:]}{run.where('recall', setting)}"
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
        looks, _ = run.shown(results, "parts")
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
                f"Bytes by part{run.where('bytes', setting)}",
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
        ("answers", "length", "Free answers", "Tokens until the end of text or the limit.", three),
        ("time", "decode_tokens_per_s", "Decoding", "Tokens per second.", three),
        ("time", "prefill_tokens_per_s", "Prompt", "Tokens per second.", three),
        ("memory", "peak_bytes", "Peak memory", "Above the weights.", size),
    ):
        for setting, results in run.of(task):
            values = {k: r[key] for k, r in results.items() if known(r.get(key))}
            if not values:
                continue
            full = (full_of(run, results) or {}).get(key)
            name = f"{title}{run.where(task, setting)}"
            drawn = "".join(
                bars.dots(name, list(run.looks.values()), values, form, full, kind, room)
                for kind, room in (("wide", WIDE), ("narrow", NARROW))
            )
            rows = [[label, value] for label, value in values.items()]
            dashes = " Dots: the full cache." if known(full) else ""
            yield figure(name, note + dashes, drawn, table(name, ["method", title], rows))
