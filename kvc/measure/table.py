"""Rows of an evaluation as a table for a reader: methods down, figures across."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from kvc.measure.results import Row

Result = dict[str, Any]
# The task, the head of the column, and its figure.
COLUMNS: tuple[tuple[str, str, Callable[[Result], str]], ...] = (
    ("bytes", "bytes/token", lambda x: f"{x['bytes_per_token']:.0f}"),
    ("bytes", "ratio", lambda x: f"{x['ratio']:.2f}"),
    ("ppl", "ppl", lambda x: f"{x['ppl']:.3f}"),
    ("kl", "kl", lambda x: _signless(x["mean"], 4)),
    ("kl", "kl p99", lambda x: f"{x['p99']:.3f}"),
    ("agree", "top1", lambda x: f"{100 * x['top1']:.1f}%"),
    ("agree", "same", lambda x: f"{x['same']:.1f}/{x['length']}"),
    ("recall", "recall", lambda x: f"{100 * x['exact']:.1f}%"),
    ("recall", "digits", lambda x: f"{100 * x['digits']:.1f}%"),
    ("layers", "layer error", lambda x: f"{fmean(x['attention']):.3f}"),
    ("answers", "answers", lambda x: f"{x['ratio']:.2f}x"),
    ("drift", "drift kl", lambda x: _signless(fmean(p[2] for p in x["by_position"]), 4)),
    ("drift", "per 1000", lambda x: f"{x['slope']:+.4f}"),
    ("time", "prefill/s", lambda x: f"{x['prefill_tokens_per_s']:.0f}"),
    ("time", "decode/s", lambda x: f"{x['decode_tokens_per_s']:.1f}"),
    ("memory", "peak MiB", lambda x: f"{x['peak_bytes'] / 2**20:.1f}"),
)


def table(rows: Sequence[Row]) -> str:
    """A line for each method, a column for each figure of its tasks; `-` where there is none."""
    found: dict[str, dict[str, Result]] = {}
    for row in rows:
        found.setdefault(row["label"], {})[row["task"]] = row["result"]
    tasks = {row["task"] for row in rows}
    columns = [column for column in COLUMNS if column[0] in tasks]
    lines = [["method", *(head for _, head, _ in columns)]]
    for label, results in found.items():
        cells = [show(results[task]) if task in results else "-" for task, _, show in columns]
        lines.append([label, *cells])
    wide = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, wide, strict=True))
        ).rstrip()
        for line in lines
    )


def _signless(x: float, digits: int) -> str:
    """A number to so many digits; rounding error below zero is no less than nothing."""
    return f"{round(x, digits) + 0.0:.{digits}f}"
