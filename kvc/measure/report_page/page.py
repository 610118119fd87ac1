"""The page as a whole: a headline, the smallest caches that keep a quality, and the sections."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvc.files import write_whole
from kvc.measure.report_page import kept, sections, tables
from kvc.measure.report_page.figures import SCROLL, glyph, section
from kvc.measure.report_page.markup import listed, percent, short, tag, words
from kvc.measure.report_page.quality import Plane, headline, planes
from kvc.measure.report_page.rows import FULL, Run, as_json, runs_of
from kvc.measure.report_page.script import SCRIPT
from kvc.measure.report_page.style import style


def write_report(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a page of rows of `kvc eval`: of all models, backends, methods and tasks in them.

    The same rows give the same page. What has no rows is left out.

    Raises:
        ConfigError: If there are no rows, or one lacks what names it.
        ArtifactError: If the file cannot be written.
    """
    write_whole(path, page(rows).encode())


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """That page, as HTML.

    Raises:
        ConfigError: If there are no rows, or one lacks what names it.
    """
    runs = runs_of(rows)
    found = [list(planes(run)) for run in runs]
    title = headline(runs[0], found[0])
    parts = [
        _run(run, some, f"r{i}-" if len(runs) > 1 else "")
        for i, (run, some) in enumerate(zip(runs, found, strict=True))
    ]
    data = tag("script", as_json(rows), type="application/json", id="rows")
    above = [_above(runs), tag("h1", words(title)), *_summary(runs[0], found[0])]
    top = tag("header", *above, _contents("".join(parts)))
    script = f"<script>{SCRIPT}</script>"
    body = tag("body", _bar(runs), tag("main", top, *parts), _foot(), data, script)
    return f'<!doctype html>\n<html lang="en">{_head(title)}{body}</html>\n'


def _head(title: str) -> str:
    """Nothing is fetched and no script runs but the page's own: the policy says so to browsers."""
    digest = b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    return (
        '<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,">'
        f"<title>{words(title)}</title><style>{style()}</style></head>"
    )


def _bar(runs: Sequence[Run]) -> str:
    """The names of the methods, which can be picked in all charts, and the theme."""
    looks = {look.index: look for run in runs for look in run.looks.values()}
    chips = [
        tag(
            "button", glyph(look), words(short(look.label, 26)), type="button", class_="chip",
            data_m=look.index, aria_pressed="false", title=f"{look.label}: {look.does}",
        )
        for look in looks.values()
    ]  # fmt: skip
    theme = tag("button", "Dark", type="button", id="theme")
    names = tag("div", *chips, class_="chips", role="group", aria_label="Pick methods")
    return tag("nav", names, theme, class_="bar", aria_label="Methods and theme")


def _above(runs: Sequence[Run]) -> str:
    said = [f"{run.model}, {run.backend} {run.dtype}".strip() for run in runs]
    return tag("p", words(f"kvc eval \u00b7 {listed(dict.fromkeys(said))}"), class_="eyebrow")


def _summary(run: Run, found: Sequence[Plane]) -> list[str]:
    """For each quality the smallest cache that keeps it, as a table."""
    rows = []
    for plane in found:
        q, best = plane.quality, plane.best
        what = f"{q.promise}" + (f", {plane.setting.said}" if len(found) > 4 else "")
        cells = [tag("th", words(what[:1].upper() + what[1:]), scope="row")]
        if best is None or run.looks[best.label].method == FULL:
            cells.append(tag("td", "the full cache alone", colspan=3, class_="quiet"))
        else:
            look = run.looks[best.label]
            value = q.form(best.value)
            cells += [
                tag("td", glyph(look), words(best.label)),
                tag("td", words(percent(best.share)), class_="n", data_v=repr(best.share)),
                tag("td", words(value), class_="n", data_v=repr(best.value)),
            ]
        full = "" if plane.full is None else q.form(plane.full)
        rows.append(tag("tr", *cells, tag("td", words(full), class_="n")))
    if not rows:
        return []
    heads = ("To keep", "the smallest cache that does", "of the bytes", "its figure", "full cache")
    head = tag("thead", tag("tr", *(tag("th", words(name), scope="col") for name in heads)))
    table = tag("table", head, tag("tbody", *rows), class_="summary")
    return [tag("div", table, **SCROLL, aria_label="The smallest caches")]


def _contents(parts: str) -> str:
    """Links to the sections that there are."""
    heads = re.findall(r'<section id="([^"]+)"><h2>([^<]+)</h2>', parts)
    links = [tag("a", title, href=f"#{name}") for name, title in heads]
    return tag("nav", *links, class_="contents", aria_label="Contents") if len(links) > 2 else ""


def _run(run: Run, found: Sequence[Plane], at: str) -> str:
    """All sections of one run."""
    name = f"{run.model}, {run.backend} {run.dtype} {run.device}".strip()
    title = tag("h2", words(name), class_="run") if at else ""
    return title + "".join(
        (
            sections.memory(run, found, at),
            sections.positions(run, found, at),
            sections.drift(run, found, at),
            kept.recall(run, at),
            kept.parts(run, at),
            sections.layers(run, found, at),
            kept.maps(run, at),
            kept.costs(run, at),
            section(f"{at}figures", "All figures", "", tables.all_figures(run)),
            section(f"{at}run", "What was run", "", tables.what_was_run(run)),
        )
    )


def _foot() -> str:
    save = tag("button", "Save the rows as JSON lines", type="button", id="save")
    return tag("footer", save)
