"""The page of `kvc eval --report`, read as a parser reads it: what it says is what rows say."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvc.errors import ArtifactError, ConfigError
from kvc.measure.report_page import write_report
from kvc.measure.report_page.markup import percent
from kvc.measure.report_page.page import page
from kvc.measure.report_page.quality import planes
from kvc.measure.report_page.rows import runs_of
from kvc.measure.report_page.tables import TASKS
from tests.report_rows import METHODS, row, rows_of

ALL = {
    "bytes",
    "ppl",
    "kl",
    "agree",
    "recall",
    "answers",
    "drift",
    "layers",
    "time",
    "memory",
    "maps",
}
SECTIONS = {  # tasks that are enough for a section, and tasks without which there is none
    "memory": ({"bytes", "ppl"}, {"bytes"}),
    "positions": ({"kl"}, {"ppl", "kl"}),
    "drift": ({"drift"}, {"drift"}),
    "recall": ({"recall"}, {"recall"}),
    "parts": ({"bytes"}, {"bytes"}),
    "layers": ({"layers"}, {"layers"}),
    "maps": ({"maps"}, {"maps"}),
    "costs": ({"answers"}, {"answers", "time", "memory"}),
    "figures": ({"ppl"}, ALL - {"layers", "maps"}),
    "run": ({"bytes"}, set()),
}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><svg onload=alert(1)>",
    "a&amp;b ' \" `",
    "\u202ereversed\u0000\x1b[31m",
    "{{7*7}} ]]> -->",
    "</script x <!-- <script",
    "w" * 300,
]
VOID = {"meta", "link"}


class Reader(HTMLParser):
    """Elements with their attributes and all text within them; and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.found) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.found[index][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, "".join(text)) for name, attrs, text in self.found if name == tag]


def sections(tasks: set[str]) -> set[str | None]:
    return {attrs["id"] for attrs, _ in Reader(page(rows_of(tasks))).all("section")}


def test_every_task_has_its_section_and_no_other() -> None:
    assert sections(ALL) == set(SECTIONS)
    for name, (enough, needed) in SECTIONS.items():
        assert name in sections(enough)
        assert not needed or name not in sections(ALL - needed)


def table_of_figures(text: str) -> list[tuple[str, list[tuple[str | None, str]]]]:
    """The large table: each row's method, and of its cells the full digits and the text."""
    (inside,) = re.findall(r'<table class="all">.*?</table>', text, re.S) or [""]
    body = inside.partition("<tbody>")[2].partition("</tbody>")[0]
    found = []
    for line in re.findall(r"<tr.*?</tr>", body, re.S):
        reader = Reader(line)
        (head,) = reader.all("th")
        found.append((head[1], [(attrs.get("data-v"), said) for attrs, said in reader.all("td")]))
    return found


def test_every_number_of_the_table_is_the_rows() -> None:
    rows = rows_of()
    by_task = {(r["label"], r["task"]): r["result"] for r in rows}
    found = table_of_figures(page(rows))
    assert [label for label, _ in found] == list(METHODS)
    columns = [(task, column) for task, (_, columns) in TASKS.items() for column in columns]
    columns = [c for c in columns if c[1].key != "error"]  # unknown in these rows, but shown
    for label, cells in found:
        shown = [(v, said) for v, said in cells if not (v is None and said == "\u2013")]
        assert len(shown) == len(columns)
        for (exact, said), (task, column) in zip(shown, columns, strict=True):
            value = by_task[label, task][column.key]
            assert exact is not None
            assert float(exact) == value
            assert said == column.form(value)
            assert float(re.sub("[^0-9e.-]", "", said.replace("\u2212", "-"))) or abs(value) < 1e-9


@pytest.mark.parametrize("task", ["ppl", "kl", "agree", "recall"])
def test_figures_behind_a_chart_are_the_rows(task: str) -> None:
    rows = rows_of({"bytes", task})
    (plane,) = planes(runs_of(rows)[0])
    values = {r["label"]: r["result"] for r in rows if r["task"] == task}
    held = {r["label"]: r["result"] for r in rows if r["task"] == "bytes"}
    expected = {
        label: (held[label]["nbytes"] / held[label]["dense_bytes"], result[plane.quality.key])
        for label, result in values.items()
    }
    assert {p.label: (p.share, p.value) for p in plane.points} == expected
    shown = {a["data-v"] for a, _ in Reader(page(rows)).all("td") if "data-v" in a}
    assert {repr(v) for pair in expected.values() for v in pair} <= shown


def test_headline_names_the_smallest_cache_that_keeps_the_quality() -> None:
    ((_, title),) = Reader(page(rows_of())).all("h1")
    assert title.startswith("gear2 keeps perplexity within")
    assert percent(METHODS["gear2"][1]) in title
    rows = [r for r in rows_of() if r["label"] not in ("gear2",)]
    ((_, title),) = Reader(page(rows)).all("h1")
    assert title.startswith("No method kept perplexity within")
    assert "gear came nearest" in title


def test_full_cache_alone_makes_a_page() -> None:
    rows = [r for r in rows_of() if r["label"] == "none"]
    ((_, title),) = Reader(page(rows)).all("h1")
    assert title == "bundled: the full cache alone was measured"


def test_one_method_without_the_full_cache_makes_a_page() -> None:
    rows = [r for r in rows_of() if r["label"] == "kivi"]
    reader = Reader(page(rows))
    assert {attrs["id"] for attrs, _ in reader.all("section")} == set(SECTIONS) - {"maps"}
    ((_, title),) = reader.all("h1")
    assert "No method kept perplexity" in title


def many(n: int) -> list[dict[str, Any]]:
    rows = rows_of({"bytes", "ppl", "kl", "recall", "layers"})
    some = [r for r in rows if r["label"] in ("none", "gear")]
    for i in range(n - 2):
        for r in [r for r in rows if r["label"] == "kivi"]:
            result = dict(r["result"])
            for key in ("nbytes", "ppl", "mean"):
                if key in result:
                    result[key] = type(result[key])(result[key] * (1 + i / 40))
            some.append({**r, "label": f"kivi group_size={i}", "result": result})
    return some


def test_forty_methods_are_all_in_every_chart() -> None:
    rows = many(40)
    text = page(rows)
    labels = {r["label"] for r in rows}
    assert len(labels) == 40
    assert {label for label, _ in table_of_figures(text)} == labels
    for svg in re.findall(r'<svg [^>]*class="wide">.*?</svg>', text, re.S):
        titles = {t.partition("\n")[0] for t in re.findall(r"<title>(.*?)</title>", svg, re.S)}
        assert labels - titles <= {"none"}  # bars leave the full cache to the words
    looks = runs_of(rows)[0].looks.values()
    assert max(Counter((k.color, k.shape, k.dash) for k in looks).values()) == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_and_never_markup(name: str) -> None:
    rows = rows_of({"bytes", "ppl", "recall", "layers", "maps"}, model=name, device=name)
    for r in rows:
        r["text"] = {"name": name, "sha256": name}
        if r["label"] != "none":
            r |= {"label": f"{r['label']} {name}", "settings": {name: name}}
        if r["task"] == "bytes":
            r["result"]["parts"] = {name: r["result"]["nbytes"]}
        for cell in r["result"].get("cells", ()):
            cell["kind"] = name
    text = page(rows)
    reader = Reader(text)
    plain = Reader(page(rows_of({"bytes", "ppl", "recall", "layers", "maps"})))
    assert {tag for tag, *_ in reader.found} <= {tag for tag, *_ in plain.found}
    assert len(reader.all("script")) == 2
    assert not any(key.startswith("on") for _, attrs, _ in reader.found for key in attrs)
    assert not re.search("[\x00-\x08\x1b\u202e]", text)
    ((_, kept),) = [s for s in reader.all("script") if s[0].get("id") == "rows"]
    assert "<" not in kept  # which browsers could take for the script's end
    assert [json.loads(line) for line in kept.splitlines()] == rows


def test_page_asks_the_network_for_nothing() -> None:
    text = page(rows_of())
    reader = Reader(text)
    named = [
        attrs[key]
        for _, attrs, _ in reader.found
        for key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
        if key in attrs
    ]
    assert all(name == "data:," or (name or "").startswith("#") for name in named)
    assert not re.search(r"url\(|@import|https?://", text)
    (policy,) = [a["content"] for a, _ in reader.all("meta") if "http-equiv" in a]
    assert (policy or "").startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_charts_are_named_for_those_who_do_not_see_them() -> None:
    reader = Reader(page(rows_of()))
    charts = [attrs for attrs, _ in reader.all("svg") if attrs.get("role") == "img"]
    assert len(charts) > 20
    assert all(attrs.get("aria-label") for attrs in charts)
    hidden = [a for a, _ in reader.all("svg") if a.get("role") != "img" and a.get("class") != "cut"]
    assert all(attrs.get("aria-hidden") == "true" for attrs in hidden)
    tables = [text for _, text in reader.all("figure") if "Figures" in text]
    assert len(tables) >= 15


def test_settings_are_not_mixed() -> None:
    rows = rows_of({"bytes", "ppl"}) + rows_of({"bytes", "ppl"}, context=512, seed=1)
    found = list(planes(runs_of(rows)[0]))
    assert [plane.setting.context for plane in found] == [2048, 512]
    assert all(len(plane.points) == len(METHODS) for plane in found)
    text = page(rows)
    assert "Perplexity (512 tokens, text.txt, 4 rows, seed 1)" in text
    without = [r for r in rows if r["task"] == "ppl" or r["context"] == 512]
    assert [plane.setting.context for plane in planes(runs_of(without)[0])] == [512]


def test_runs_of_two_backends_are_apart() -> None:
    rows = rows_of({"bytes", "ppl"}) + rows_of({"bytes", "ppl"}, backend="mlx")
    reader = Reader(page(rows))
    names = [attrs["id"] for attrs, _ in reader.all("section")]
    assert len(names) == len(set(names))
    heads = [text for attrs, text in reader.all("h2") if attrs.get("class") == "run"]
    assert heads == ["bundled, cpu float32 x86_64", "bundled, mlx float32 x86_64"]


def test_later_rows_replace_earlier_ones() -> None:
    rows = rows_of({"bytes", "ppl"})
    again = json.loads(json.dumps(next(r for r in rows if r["task"] == "ppl")))
    again["result"]["ppl"] = 12.375
    (_, cells), *_ = table_of_figures(page([*rows, again]))
    assert "12.375" in {exact for exact, _ in cells}


def test_same_rows_give_the_same_page(tmp_path: Path) -> None:
    write_report(rows_of(), tmp_path / "a.html")
    write_report(json.loads(json.dumps(rows_of())), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_what_is_no_number_is_not_drawn() -> None:
    rows = rows_of()
    for r in rows:
        if r["label"] == "h2o" and r["task"] == "kl":
            r["result"]["mean"] = math.nan
        if r["label"] == "kivi" and r["task"] == "ppl":
            r["result"]["ppl"] = math.inf
    text = page(rows)
    body = text.partition('<script type="application/json"')[0]
    assert not re.search(r'"(nan|inf)|NaN', body)
    Reader(text)


def test_missing_rows_and_keys_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="report: expected rows to show, got none"):
        write_report([], tmp_path / "report.html")
    broken = row("gear", "gear", "ppl", {})
    del broken["label"]
    with pytest.raises(ConfigError, match=r"row 1.*without label"):
        write_report([broken], tmp_path / "report.html")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_report(rows_of({"bytes"}), tmp_path / "no" / "report.html")
    assert list(tmp_path.iterdir()) == []
