"""The charts of the page of `kvc eval --report`: marks stand where figures are, labels apart."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from kvc.measure.report_page.bars import stacked
from kvc.measure.report_page.cells import distance_map, draw, recall_maps, retained_map, table_of
from kvc.measure.report_page.curves import Curves, by_layer, by_position
from kvc.measure.report_page.curves import draw as draw_curves
from kvc.measure.report_page.labels import Box, along, around
from kvc.measure.report_page.markup import number, percent, short, size, width
from kvc.measure.report_page.page import page
from kvc.measure.report_page.quality import Point, mark_front, planes
from kvc.measure.report_page.rows import runs_of
from kvc.measure.report_page.style import DARK, LIGHT
from kvc.measure.report_page.svg import Frame, Scale, outliers, scale_of
from tests.report_rows import METHODS, cells, kept, rows_of, shared


def test_marks_stand_where_the_scales_put_them() -> None:
    rows = rows_of({"bytes", "kl"})
    svg, *_ = re.findall(r'<svg [^>]*class="wide">.*?</svg>', page(rows), re.S)
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5"[^>]*><title>(\w+)', svg)
    (plane,) = planes(runs_of(rows)[0])
    points = {p.label: p for p in plane.points}
    frame = Frame(540, 380, left=50)
    shares = [p.share for p in plane.points]
    x = Scale(min(shares) / 1.15, max(shares) * 1.15, *frame.x, log=True)
    y = scale_of([p.value for p in plane.points], *frame.y, log=6)
    assert {label for *_, label in places} == {"none", "kivi", "gear", "gear2"}
    for at, up, label in places:
        assert float(at) == pytest.approx(x(points[label].share), abs=0.051)
        assert float(up) == pytest.approx(y(points[label].value), abs=0.051)


def test_front_is_what_nothing_dominates() -> None:
    given = [("a", 1.0, 5.0), ("b", 2.0, 5.0), ("c", 2.0, 4.0), ("d", 3.0, 6.0), ("e", 2.0, 4.0)]
    points = [Point(label, share, None, value) for label, share, value in given]
    assert {p.label for p in mark_front(points, more=False) if p.front} == {"a", "c", "e"}
    assert {p.label for p in mark_front(points, more=True) if p.front} == {"a", "d"}
    for more in (False, True):
        for p in mark_front(points, more):
            beaten = any(
                q.share <= p.share
                and (q.value >= p.value if more else q.value <= p.value)
                and (q.share, q.value) != (p.share, p.value)
                for q in points
            )
            assert p.front != beaten


def test_lines_go_through_their_figures_and_are_named() -> None:
    run = runs_of(rows_of({"layers"}))[0]
    looks = list(run.looks.values())
    values = [[1.0 + i, 2.5 + i, 0.5 + i] for i in range(len(looks))]
    chart = Curves("errors", "layer", by_layer(looks, values), by_layer=True, log=False)
    svg = draw_curves(chart, (), "wide", 540, 330)
    found = re.findall(r"<title>(.*?)\n.*?\n(.*?)</title></circle>", svg, re.S)
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(dots) == len(found) == 3 * len(looks)
    y = scale_of([v for one in values for v in one], 288, 14)
    expected = [y(v) for one in values for v in one]
    assert [float(cy) for _, cy in dots] == pytest.approx(expected, abs=0.051)
    assert [said for _, said in found] == [number(v) for one in values for v in one]
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="label">(.*?)</text>', svg)
    assert [name for *_, name in labels] == list(METHODS)
    ends = sorted((v[-1], float(up)) for v, (_, up, _) in zip(values, labels, strict=True))
    assert all(a[1] - b[1] >= 12.9 for a, b in pairwise(ends))  # higher figures, higher names


def test_lines_far_off_leave_the_scale_and_say_so() -> None:
    looks = list(runs_of(rows_of({"ppl"}))[0].looks.values())
    found = [[[0, 10, 36 + i / 10], [10, 20, 35 + i / 10]] for i in range(len(looks))]
    found[5] = [[0, 10, 90.0], [10, 20, 99.0]]
    chart = Curves("perplexity", "position", by_position(looks, found, 2))
    svg = draw_curves(chart, (), "wide", 540, 330)
    assert svg.count("\u2191") == 1
    assert "minicache \u2191" in svg
    assert svg.count('class="cut"') == 1
    assert chart.rows()[1][0] == ["0\u201310", *(one[0][2] for one in found)]


def test_cells_are_as_deep_as_their_shares() -> None:
    some = [dict(cell, exact=10 * i) for i, cell in enumerate(cells(0.5))][:4]
    ((name, heat),) = recall_maps(some, "gear")
    assert name == "single, 1 fact"
    assert heat.columns == ("1k", "2k")
    opacities = re.findall(r'class="heat"[^>]* fill-opacity="([\d.]+)"', draw(heat, 164))
    assert [float(x) for x in opacities] == [0.02, 0.25, 0.5, 0.75]
    assert table_of(heat)[1] == [["0\u201350", 0.0, 0.5], ["50\u2013100", 0.25, 0.75]]
    apart = [dict(cell, context=512) for cell in some]
    ((_, heat),) = recall_maps(apart, "gear")
    assert len(heat.columns) == 4  # distances, where a depth of a context has several


def test_maps_have_every_pair_once_and_frame_those_that_share() -> None:
    given = shared()
    heat = distance_map(given["distances"], given["map"], "distances")
    values = {(int(heat.rows[i]), j): cell.value for (i, j), cell in heat.cells.items()}
    expected = {(i, j): given["distances"][i][j] for i in range(4) for j in range(i)}
    assert values == expected
    heats = [cell.heat for cell in heat.cells.values() if cell.heat is not None]
    assert (min(heats), max(heats)) == (0.0, 1.0)
    assert [key for key, cell in heat.cells.items() if cell.mark] == [(2, 0)]
    assert draw(heat, 343).count('class="mark"') == 1
    heat = retained_map(**kept())
    assert [cell.value for cell in heat.cells.values()] == kept()["retained"][0]
    assert [cell.heat for cell in heat.cells.values()] == [1.0, 0.25, 0.125]
    assert table_of(heat)[1] == [["2 and 3", *kept()["retained"][0]]]


def test_segments_of_bars_are_as_wide_as_their_bytes() -> None:
    run = runs_of(rows_of({"bytes"}))[0]
    looks = [run.looks[label] for label in ("gear", "minicache")]
    ((_, results),) = run.of("bytes")
    svg = stacked(looks, results, ["codes", "scales", "window"], "wide", 1112)
    boxes = re.findall(r'<rect class="p(\d)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    assert [place for place, *_ in boxes] == ["0", "1", "2"] * 2
    counts = [n for look in looks for n in results[look.label]["parts"].values()]
    unit = float(boxes[3][2]) + 1  # pixels of the first segment, and the gap behind it
    for (_, _, wide), count in zip(boxes, counts, strict=True):
        assert float(wide) + 1 == pytest.approx(unit * count / counts[3], abs=0.15)
    starts = [float(x) for _, x, _ in boxes]
    assert starts[0] == starts[3]
    assert starts[1] == pytest.approx(starts[0] + unit * counts[0] / counts[3], abs=0.15)


def test_long_names_keep_both_ends() -> None:
    assert short("gear k_bits=2 v_bits=4 rank=18", 18) == "gear k\u2026s=4 rank=18"
    assert short("gear", 4) == "gear"
    assert len(short("w" * 300, 26)) == 26


def test_numbers_in_words() -> None:
    shown = {
        36.0401: "36.04", 0.00321: "0.003210", 128: "128", 4096.0: "4\u202f096",
        -0.25: "\u22120.2500", 1.25e-7: "1.25e\u22127", 123456.7: "123\u202f457",
        -3.9e-9: "≈ 0",
    }  # fmt: skip
    assert {x: number(x) for x in shown} == shown
    assert [number(x) for x in (math.nan, math.inf, None, "x")] == ["\u2013"] * 4
    assert [percent(x) for x in (0, 1, 0.234375, 0.99999, 0.00001)] == [
        "0\u202f%", "100\u202f%", "23.4\u202f%", "99.999\u202f%", "0.001\u202f%",
    ]  # fmt: skip
    assert [size(x) for x in (0, 434, 2048, 1536, 43 * 2**20)] == [
        "0\u202fB", "434\u202fB", "2\u202fKiB", "1.50\u202fKiB", "43\u202fMiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(35.2, 37.1, False), (0.0, 1.0, False), (1e-4, 0.3, True), (0.9, 950.0, True), (-3, 8, False)],
)
def test_ticks_are_round_and_within(low: float, high: float, log: bool) -> None:
    scale = Scale(low, high, 300, 20, log)
    ticks = scale.ticks(6)
    assert 3 <= len(ticks) <= 9
    assert all(low <= t <= high for t in ticks)
    assert all(20 - 1e-9 <= scale(t) <= 300 + 1e-9 for t in ticks)
    assert all(len(f"{t:g}".strip("-0.").replace(".", "").rstrip("0")) <= 4 for t in ticks)


def test_zero_has_a_place_below_a_logarithmic_axis() -> None:
    scale = scale_of([0.0, 1e-4, 0.3], 300, 20, log=12)
    assert scale.log
    assert scale(0.0) == 300
    assert scale(1e-4) < 300 - 15
    assert scale.ticks()[0] == 0


def test_rounding_is_drawn_as_nothing() -> None:
    scale = scale_of([9.1e-10, 3e-8, 2e-4, 0.2], 300, 20, log=12)
    assert scale.log
    assert scale.nearly
    assert scale(3e-8) == scale(0.0) == scale(-1e-9) == 300
    assert scale.low > 1e-5
    least = scale_of([2e-7, 5e-7, 2e-6, 0.2], 300, 20, log=12)
    assert not least.nearly  # no gap: these may be more than rounding
    assert least(2e-7) > least(5e-7)


def test_outliers_are_few_and_far() -> None:
    assert outliers([35.3, 35.4, 36.0, 36.9, 49.0, 50.0]) == [4, 5]
    assert outliers([1.0, 2.0, 3.0, 4.0]) == []
    assert outliers([1.0, 1.1, 50.0, 50.1]) == []
    assert outliers([]) == []


def test_labels_meet_nothing() -> None:
    frame = Frame(540, 380, left=50)
    points = [(80 + 75 * (i % 6) + i, 60 + 37 * (i % 5), f"method {i}") for i in range(30)]
    placed = around(points, range(30), frame)
    assert len(placed) == 30
    boxes = [label.box for label in placed]
    for i, box in enumerate(boxes):
        assert box.left >= frame.left - 2
        assert box.right <= frame.width - 2
        assert not any(box.meets(other) for other in boxes[i + 1 :])
        for j, (x, y, _) in enumerate(points):
            assert j == placed[i].index or not box.meets(Box(x - 4, y - 4, x + 4, y + 4))


def test_labels_along_an_edge_keep_order_and_distance() -> None:
    places = along([100, 101, 102, 40, 300], 20, 310)
    assert places[3] == 40
    assert places[4] == 300
    assert places[:3] == pytest.approx([88, 101, 114])
    many = along([50.0] * 40, 20, 310)
    assert sorted(many) == many
    assert many[0] >= 20 - 1e-9
    assert many[-1] <= 310 + 1e-9
    assert along([], 0, 1) == []


def luminance(color: str) -> float:
    """Relative luminance of a colour (WCAG 2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read(theme: dict[str, str]) -> None:
    assert theme.keys() == LIGHT.keys()
    for name in ("ink", "dim", *(f"c{i}" for i in range(8))):
        assert contrast(theme[name], theme["paper"]) >= 4.5, name
    for i in range(10):
        assert contrast(theme["ink"], theme[f"p{i}"]) >= 4.5, f"p{i}"
    assert contrast(theme["deep"], theme["heat"]) >= 4.5


def test_width_is_rather_too_large() -> None:
    assert width("minicache+gear") >= 0.6 * 12 * len("minicache+gear")  # DejaVu Sans, a wide one
    assert width("\u6a21\u578b") == 24
