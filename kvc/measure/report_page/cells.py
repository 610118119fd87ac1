"""Heat maps: recall by distance and depth, KVSharer's distances, MiniCache's retained tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvc.measure.report_page.markup import known, number, percent, tag, width
from kvc.measure.report_page.svg import SMALL, Frame, drawing, hint, rect, text

DARK = 0.55  # the share of the deep colour above which text on it is light


@dataclass(frozen=True, slots=True)
class Cell:
    """One value in a map, from 0 to 1 as a colour; nothing was measured where it is None."""

    value: float | None
    heat: float | None
    said: str  # within, if there is room
    hint: str
    mark: bool = False


@dataclass(frozen=True, slots=True)
class Heat:
    """A map of cells: what its rows and columns are called, and what they are."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_label: str
    column_label: str
    cells: Mapping[tuple[int, int], Cell]


def draw(heat: Heat, room: float, kind: str = "any", most: float = 46.0) -> str:
    """The map, as SVG `room` wide; cells are at most so wide."""
    left = max(width(row, SMALL) for row in heat.rows) + 10
    wide = min((room - left - 4) / max(len(heat.columns), 1), most)
    high = min(max(wide, 18.0 if len(heat.rows) <= 8 else 0.0), 24.0)
    step = math.ceil(12 / high)  # between the names of rows
    frame = Frame(room, 22 + high * len(heat.rows) + 38, left, 4, 22, 38)
    marks = [text(0, 10, f"{heat.row_label} \u2193", "title")]
    marks += [
        text(left - 6, 22 + high * (i + 0.5) + 4, row, "tick", "end")
        for i, row in enumerate(heat.rows)
        if i % step == 0
    ]
    ended, bottom = -1e9, frame.y[0]
    for j, column in enumerate(heat.columns):
        middle, half = left + wide * (j + 0.5), width(column, SMALL) / 2
        if middle - half > ended + 3 and middle + half < room + 4:
            marks.append(text(middle, bottom + 14, column, "tick", "middle"))
            ended = middle + half
    marks.append(text(left, bottom + 31, f"{heat.column_label} \u2192", "title"))
    for (i, j), cell in heat.cells.items():
        marks.append(_cell(cell, left + wide * j, 22 + high * i, wide, high))
    said = f"{heat.title}: {heat.row_label} by {heat.column_label}. The figures are below."
    return drawing(frame, said, kind, *marks)


def _cell(cell: Cell, x: float, y: float, wide: float, high: float) -> str:
    gap = 1 if wide > 8 else 0
    box = (x, y, wide - gap, high - gap)
    if cell.heat is None:
        return rect(*box, "blank", hint(cell.hint))
    marks = [rect(*box, "paper"), rect(*box, "heat", fill_opacity=f"{max(cell.heat, 0.02):.3f}")]
    deep = "deep" if cell.heat > DARK else "pale"
    if cell.mark:
        marks.append(rect(x + 1, y + 1, wide - gap - 2, high - gap - 2, "mark"))
    if cell.said and width(cell.said, 10) < wide - 2 and high >= 12:
        marks.append(
            text(x + wide / 2 - gap / 2, y + high / 2 + 3, cell.said, f"in {deep}", "middle")
        )
    return tag("g", hint(cell.hint), *marks)


def recall_maps(cells: Sequence[Mapping[str, Any]], title: str) -> list[tuple[str, Heat]]:
    """A map for each kind of question and number of facts: which, and the map.

    Rows are depths. Columns are contexts, as needle tests have them; distances from the fact to the
    question where a depth of a context has several.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((str(cell["kind"]), int(cell["facts"])), []).append(cell)
    found = []
    for (kind, facts), group in groups.items():
        name = f"{kind}, {facts} {'fact' if facts == 1 else 'facts'}"
        places = {(cell["context"], *cell["depth"]) for cell in group}
        heat = _recall(f"{title}, {name}", group, by_distance=len(places) < len(group))
        found.append((name, heat))
    return found


def _recall(title: str, group: Sequence[Mapping[str, Any]], *, by_distance: bool) -> Heat:
    depths = sorted({tuple(cell["depth"]) for cell in group})

    def column(cell: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(cell["distance"]) if by_distance else (cell["context"],)

    columns = sorted({column(cell) for cell in group})
    sums: dict[tuple[int, int], tuple[int, int, set[str]]] = {}
    for cell in group:  # more than one where buckets of the same place were kept apart
        at = depths.index(tuple(cell["depth"])), columns.index(column(cell))
        asked, exact, far = sums.get(at, (0, 0, set()))
        far.add("\u2013".join(number(t) for t in cell["distance"]))
        sums[at] = asked + cell["asked"], exact + cell["exact"], far
    found = {}
    for (i, j), (asked, exact, far) in sums.items():
        share = exact / asked if asked else None
        lines = [f"{exact} of {asked} facts", f"told at {_depth(depths[i])} % of the context"]
        lines.append(f"{' and '.join(sorted(far))} tokens before the question")
        said = "" if share is None else f"{100 * share:.0f}"
        found[i, j] = Cell(share, share, said, "\n".join([title, *lines]))
    names = ["\u2013".join(_tokens(t) for t in column) for column in columns]
    label = "tokens to the question" if by_distance else "tokens of context"
    return Heat(title, tuple(map(_depth, depths)), tuple(names), "depth, %", label, found)


def _depth(depth: Sequence[float]) -> str:
    return "\u2013".join(f"{100 * d:.0f}" for d in depth)


def _tokens(n: float) -> str:
    """A number of tokens in few letters."""
    return f"{n / 1024:g}k" if n >= 1024 and n % 128 == 0 else str(n)


def distance_map(distances: Sequence[Sequence[Any]], shared: Mapping[str, Any], title: str) -> Heat:
    """KVSharer's distances of layers: each pair once; a frame where one reads the other's cache."""
    n = len(distances)
    pairs = {(max(i, j), min(i, j)) for i in range(n) for j in range(len(distances[i])) if i != j}
    values = {
        (i, j): value
        for i, j in pairs
        if known(value := _either(distances, i, j))
    }  # fmt: skip
    low, high = min(values.values(), default=0.0), max(values.values(), default=1.0)
    owners = {int(layer): int(owner) for layer, owner in shared.items()}
    found = {}
    for (i, j), value in values.items():
        mark = owners.get(i) == j or owners.get(j) == i
        lines = [f"layers {j} and {i}", f"distance {number(value)}"]
        if mark:
            reader, owner = (i, j) if owners.get(i) == j else (j, i)
            lines.append(f"layer {reader} reads the cache of layer {owner}")
        heat = (value - low) / (high - low) if high > low else 0.5
        found[i, j] = Cell(value, heat, number(value, 3), "\n".join(lines), mark)
    cells = {(i - 1, j): cell for (i, j), cell in found.items()}  # layer 0 is below none
    readers, owners_ = tuple(map(str, range(1, n))), tuple(map(str, range(n - 1)))
    return Heat(title, readers, owners_, "layer", "layer", cells)


def _either(matrix: Sequence[Sequence[Any]], i: int, j: int) -> Any:
    """The entry below the diagonal, or above where there is none."""
    below = matrix[i][j] if j < len(matrix[i]) else None
    return below if known(below) else matrix[j][i] if i < len(matrix[j]) else None


def retained_map(pairs: Sequence[Sequence[int]], retained: Sequence[Sequence[Any]]) -> Heat:
    """MiniCache's retained tokens: the share of each bucket of positions, for each pair.

    Colours reach to the largest share: a few percent are what there is to see.
    """
    names = tuple(f"{a} and {b}" for a, b in pairs)
    n = max((len(row) for row in retained), default=0)
    most = max((share for row in retained for share in row if known(share)), default=0.0)
    found = {}
    for i, row in enumerate(retained):
        for j, share in enumerate(row):
            if not known(share):
                continue
            place = f"bucket {j + 1} of {len(row)}"
            lines = [f"layers {names[i]}", place, f"{percent(share)} of the tokens kept apart"]
            heat = share / most if most else 0.0
            found[i, j] = Cell(share, heat, f"{100 * share:.0f}", "\n".join(lines))
    edges = tuple(f"{100 * (j + 1) / n:.0f} %" for j in range(n))
    title = "Tokens that MiniCache kept apart"
    return Heat(title, names, edges, "layers", "position, of the context", found)


def table_of(heat: Heat) -> tuple[list[str], list[list[Any]]]:
    """The map's figures: rows by columns."""
    head = [f"{heat.row_label} / {heat.column_label}", *heat.columns]
    cells = heat.cells
    rows = [
        [row, *(cells[i, j].value if (i, j) in cells else None for j in range(len(heat.columns)))]
        for i, row in enumerate(heat.rows)
    ]
    return head, rows
