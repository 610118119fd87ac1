"""The page of `kvc eval --report` in headless Chromium: a desk and a phone, light and dark."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from kvc.measure.report_page import write_report
from tests.conftest import REQUIRED
from tests.report_rows import METHODS, rows_of

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZES = [(1280, 900), (375, 800)]
THEMES = ["light", "dark"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: the system's, or playwright's own. A failure where KVC_REQUIRE names it."""
    fail = pytest.fail if "chromium" in REQUIRED else pytest.skip
    try:
        api = import_module("playwright.sync_api")
    except ImportError as error:
        fail(f"playwright does not import: {error}")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path, args=flags)
        except api.Error as error:
            fail(f"no Chromium starts: {error.message.splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(rows_of(), path)
    return path


class Opened:
    """A page, and what it said and asked for while it was used."""

    def __init__(self, browser: Any, path: Path, size: tuple[int, int], theme: str) -> None:
        view = {"width": size[0], "height": size[1]}
        self.context = browser.new_context(viewport=view, color_scheme=theme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.uri = path.as_uri()

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.context.close()
        if kind is None:
            assert self.said == []
            assert [url for url in self.asked if not url.startswith("data:,")] == [self.uri]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("size", SIZES, ids=["desk", "phone"])
def test_page_fits_and_is_silent(
    browser: Any, report: Path, size: tuple[int, int], theme: str
) -> None:
    with Opened(browser, report, size, theme) as page:
        page.wait_for_load_state("load")
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (theme == "light")


@pytest.mark.parametrize("size", SIZES, ids=["desk", "phone"])
def test_one_drawing_of_each_chart_is_shown(
    browser: Any, report: Path, size: tuple[int, int]
) -> None:
    with Opened(browser, report, size, "light") as page:
        shown = {
            kind: page.evaluate(
                f"[...document.querySelectorAll('svg.{kind}')]"
                ".filter(s => s.getBoundingClientRect().width > 0).length"
            )
            for kind in ("wide", "narrow")
        }
        every = page.evaluate("document.querySelectorAll('svg.wide').length")
        assert sorted(shown.values()) == [0, every]
        assert shown["wide" if size[0] > 760 else "narrow"] == every


@pytest.mark.parametrize("size", SIZES, ids=["desk", "phone"])
def test_labels_of_a_chart_do_not_overlap(
    browser: Any, report: Path, size: tuple[int, int]
) -> None:
    with Opened(browser, report, size, "light") as page:
        met = page.evaluate(
            """() => {
              const met = [];
              for (const svg of document.querySelectorAll('#memory .wide, #memory .narrow')) {
                const texts = [...svg.querySelectorAll('.label, .tick')];
                const boxes = texts.map(t => t.getBoundingClientRect()).map(
                  b => ({l: b.left + 1, r: b.right - 1, t: b.top + 2, b: b.bottom - 2}));
                boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
                  if (a.l < b.r && b.l < a.r && a.t < b.b && b.t < a.b)
                    met.push([texts[i].textContent, texts[i + 1 + j].textContent]);
                }));
              }
              return met;
            }"""
        )
        assert met == []


@pytest.mark.parametrize("theme", THEMES)
def test_toggle_turns_the_theme_over_and_is_remembered(
    browser: Any, report: Path, theme: str
) -> None:
    with Opened(browser, report, SIZES[0], theme) as page:
        paper = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(paper)
        assert page.inner_text("#theme") == ("Dark" if theme == "light" else "Light")
        page.click("#theme")
        after = page.evaluate(paper)
        assert after != before
        assert page.evaluate("document.documentElement.dataset.theme") != theme
        page.click("#theme")
        assert page.evaluate(paper) == before


def test_columns_sort_both_ways(browser: Any, report: Path) -> None:
    with Opened(browser, report, SIZES[0], "light") as page:
        names = "[...document.querySelectorAll('.all tbody th')].map(t => t.textContent)"
        assert page.evaluate(names) == list(METHODS)
        column = page.locator(".all th button", has_text="perplexity")
        column.click()
        by_loss = sorted(METHODS, key=lambda name: METHODS[name][2])
        assert page.evaluate(names) == by_loss
        assert page.locator("th[aria-sort=ascending]").inner_text().startswith("perplexity")
        column.click()
        assert page.evaluate(names) == by_loss[::-1]
        page.locator(".all th button", has_text="method").click()
        assert page.evaluate(names) == sorted(METHODS)
        assert page.locator(".all th[aria-sort=ascending]").count() == 1


def test_hints_show_values_and_picking_fades_the_rest(browser: Any, report: Path) -> None:
    with Opened(browser, report, SIZES[0], "light") as page:
        assert page.locator("svg title").count() == 0  # the page's own hints took their place
        page.locator("#memory svg.wide").first.locator("g.m3 circle").hover()
        lines = page.inner_text("#tip").splitlines()
        assert lines[0] == "gear2"
        assert lines[1].startswith("perplexity 35.")
        assert lines[2].startswith("23.4\u202f% of the bytes")

        opacity = (
            "m => getComputedStyle(document.querySelector(`#memory svg.wide g.m${m}`)).opacity"
        )
        page.click(".chip[data-m='3']")
        assert page.get_attribute(".chip[data-m='3']", "aria-pressed") == "true"
        assert [float(page.evaluate(opacity, m)) < 0.5 for m in (1, 2, 3)] == [True, True, False]
        page.keyboard.press("Escape")
        assert [float(page.evaluate(opacity, m)) for m in (1, 3)] == [1, 1]


def test_rows_can_be_saved(browser: Any, report: Path) -> None:
    with Opened(browser, report, SIZES[0], "light") as page:
        with page.expect_download() as download:
            page.click("#save")
        text = Path(download.value.path()).read_text(encoding="utf-8")
        assert [json.loads(line) for line in text.splitlines()] == rows_of()


def test_hostile_names_run_nothing(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    name = "</script><script>document.title = 'run'</script><img src=x onerror=alert(1)>"
    write_report(rows_of({"bytes", "ppl"}, model=name, device=name), path)
    with Opened(browser, path, SIZES[1], "light") as page:
        assert page.title() != "run"
        assert page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[1][0]
