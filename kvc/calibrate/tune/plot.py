"""Bytes against divergence, drawn with matplotlib: what was tried, and the front."""

from __future__ import annotations

from importlib import import_module
from io import BytesIO
from pathlib import Path

from kvc.calibrate.tune.run import Tuned
from kvc.files import write_whole
from kvc.measure.plots import DPI, GREY, INK, RED, check_matplotlib


def draw_front(path: str | Path, found: Tuned) -> None:
    """The front as steps, and on it the method of the profile; PNG or SVG by the suffix.

    Raises:
        ConfigError: If matplotlib is missing.
        ArtifactError: If the file cannot be written.
    """
    check_matplotlib()
    figure = import_module("matplotlib.figure").Figure(
        figsize=(6.4, 4.4), dpi=DPI, layout="constrained", facecolor="white"
    )
    axes = figure.subplots()
    front, best = found.profile.front, found.profile.measured
    x = [100 * point["share"] for point in front]
    y = [max(point["kl"], 1e-7) for point in front]  # a logarithm has no zero
    axes.step(x, y, where="post", color=GREY, linewidth=1)
    axes.scatter(x, y, 28, INK, zorder=2)
    at = (100 * best["share"], max(best["quality"]["kl"], 1e-7))
    axes.scatter(*at, 64, RED, zorder=3)
    text = {"xytext": (8, 8), "textcoords": "offset points", "color": RED, "fontsize": 9}
    axes.annotate(f"{found.profile.method}, the profile", at, **text)
    axes.set_yscale("log")
    axes.set_xlabel(f"% of the dense cache's bytes at {best['context']} tokens", color=INK)
    axes.set_ylabel("divergence of the next token, nats", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    data, suffix = BytesIO(), Path(path).suffix[1:]
    # without a date the same search gives the same file
    figure.savefig(data, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    write_whole(path, data.getvalue())
