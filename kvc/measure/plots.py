"""Pictures, drawn with matplotlib: of the extra `plot`, and without its global state."""

from __future__ import annotations

from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvc.errors import ConfigError
from kvc.files import write_whole

if TYPE_CHECKING:
    from kvc.calibrate.kvsharer.search import Search

UNITS = {
    "positionwise": "mean distance at equal heads and positions,\nhalf of keys, half of values",
    "flat": "distance of all heads and positions together,\nof the mean of keys and values",
    "normalized": "mean distance at equal heads and positions,\nin mean norms of a layer's vectors",
}
ORDERS = {
    "dissimilar": "the most dissimilar pairs first",
    "similar": "the most similar pairs first",
    "random": "pairs in a random order",
}
DPI = 150
INK, GREY, RED = "#1f2328", "#57606a", "#d1242f"


def check_matplotlib() -> None:
    """That there is what draws.

    Raises:
        ConfigError: If it does not import.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        why = (str(error).splitlines() or ["no reason"])[0]
        raise ConfigError(
            f"--plot: matplotlib does not import ({why}); pip install 'kvc[plot]'"
        ) from None


def draw_distances(path: str | Path, search: Search) -> None:
    """A map of every two layers' distance, as PNG or SVG by the suffix.

    Accepted pairs have the number of their turn, rejected ones a cross. On white, so that it can be
    read on any page.

    Args:
        path: The file.
        search: One that has ended, or been prepared at least.

    Raises:
        ConfigError: If matplotlib is missing.
        ArtifactError: If the file cannot be written.
    """
    check_matplotlib()
    Figure = import_module("matplotlib.figure").Figure
    ticker = import_module("matplotlib.ticker")
    numbers, n = search.numbers, len(search.numbers)
    place = {number: at for at, number in enumerate(numbers)}
    cells = np.full((n, n), np.nan)  # only below the diagonal are there pairs
    for (i, j), distance in search.ranked.items():
        cells[place[i], place[j]] = distance

    side = min(max(3.2 + 0.3 * n, 5.0), 10.0)  # inches
    figure = Figure(figsize=(side + 1.2, side), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(cells), cmap="cividis", interpolation="nearest")
    step = -(-n // 24)  # of the ticks, so that their numbers do not touch
    for axis, label in (
        (axes.xaxis, "layer whose cache is read"),
        (axes.yaxis, "layer that reads it"),
    ):
        axis.set_major_locator(ticker.FixedLocator(range(0, n, step)))
        axis.set_major_formatter(ticker.FixedFormatter([str(i) for i in numbers[::step]]))
        axis.set_label_text(label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    cell = 0.72 * 72 * side / (n + 1)  # points
    _mark(axes, search, place, min(cell, 22.0))
    bar = figure.colorbar(image, ax=axes, shrink=0.85, pad=0.03)
    bar.set_label(UNITS[search.settings.distance], color=INK)
    title = f"{len(search.accepted)} of {n} layers read another's cache"
    how = f"{ORDERS[search.settings.order]}, cosine above {search.settings.threshold:g}"
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=24)
    below = {"xytext": (0, 8), "textcoords": "offset points", "color": GREY, "fontsize": 9}
    axes.annotate(how, (0, 1), xycoords="axes fraction", **below)

    data, suffix = BytesIO(), Path(path).suffix[1:]
    # without a date the same search gives the same file
    figure.savefig(data, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    write_whole(path, data.getvalue())


def _mark(axes: Any, search: Search, place: dict[int, int], size: float) -> None:
    """Marks the pairs that were tried; `size` is a cell's, in points."""
    rejected = [tried for tried in search.tried if not tried.accepted]
    for pairs, marker, color, edge, part, label in (
        (search.accepted, "o", RED, "white", 0.8, "accepted, in this order"),
        (rejected, "X", "white", INK, 0.45, "rejected"),  # seen on dark and on light cells
    ):
        if pairs:
            x, y = [place[p.owner] for p in pairs], [place[p.layer] for p in pairs]
            style = {"marker": marker, "edgecolors": edge, "linewidths": 0.8, "label": label}
            drawn = axes.scatter(x, y, (part * size) ** 2, color, **style)
            drawn.set_gid(label.split(",")[0])
    for turn, pair in enumerate(search.accepted, 1):
        at = (place[pair.owner], place[pair.layer])
        font = {"color": "white", "fontsize": 0.42 * size, "fontweight": "bold"}
        axes.annotate(str(turn), at, ha="center", va="center", **font)
    if search.tried:
        legend = axes.legend(loc="upper right", frameon=False, labelcolor=INK, fontsize=9)
        for handle in legend.legend_handles:
            handle.set_sizes([50.0])
