"""Rows of a bench as tables for a reader, one for each size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvc.measure.results import Row

Result = dict[str, Any]
Column = tuple[str, Callable[[Result], str]]


def _figure(name: str, digits: str = ".3g") -> Callable[[Result], str]:
    return lambda result: format(result[name], digits)


def _ms(name: str) -> Callable[[Result], str]:
    def show(result: Result) -> str:
        low, high = result[f"{name}_spread"]
        return f"{result[name]:.3g} ({low:.3g}-{high:.3g})"

    return show


def _times(name: str) -> Callable[[Result], str]:
    return lambda result: f"{result[name]:.2f}x"


def _kib(name: str) -> Callable[[Result], str]:
    return lambda result: f"{result[name] / 1024:.0f}"


def _mib(name: str) -> Callable[[Result], str]:
    return lambda result: f"{result[name] / 2**20:.1f}"


def _percent(name: str) -> Callable[[Result], str]:
    return lambda result: f"{100 * result[name]:.1f}%"


MODE: Column = ("mode", lambda result: str(result["mode"]))
RATIOS: tuple[Column, ...] = (
    ("speed/dense", _times("faster_than_dense")),
    ("speed/quantized", _times("faster_than_quantized")),
    ("size/dense", _times("smaller_than_dense")),
    ("size/quantized", _times("smaller_than_quantized")),
)
OFF: tuple[Column, ...] = (("error", _figure("error", ".1e")), ("loss", _figure("loss", ".1e")))
COLUMNS: dict[str, tuple[Column, ...]] = {
    "attention": (MODE, ("ms", _ms("ms")), ("KiB", _kib("bytes")), *RATIOS, *OFF),
    "generate": (
        MODE,
        ("step ms", _ms("ms")),
        ("slowest", _figure("slowest_step_ms")),
        ("prefill ms", _figure("prefill_ms", ".0f")),
        ("tokens/s", _figure("tokens_per_s")),
        ("KiB", _kib("bytes")),
        *RATIOS,
        *OFF,
    ),
    "encode": (
        MODE,
        ("prompt ms", _ms("ms")),
        ("of prefill", _percent("share_of_prefill")),
        ("block ms", _figure("block_ms")),
        ("of its prefill", _percent("block_share_of_prefill")),
        ("KiB", _kib("bytes")),
        *RATIOS[2:],
        *OFF,
    ),
    "memory": (
        MODE,
        ("peak MiB", _mib("peak_bytes")),
        ("cache MiB", _mib("bytes")),
        ("peak/cache", _times("over_cache")),
        ("peak/dense", _times("faster_than_dense")),
        ("peak/quantized", _times("faster_than_quantized")),
        *RATIOS[2:],
        OFF[0],
    ),
}
NOTES = (
    "/dense, /quantized: times faster, or smaller, than the library's own caches in the same run, "
    "the best quantized one of those raced. error: the largest difference of attention from the "
    "definitions in float64 over the same codes, over the largest entry; loss: "
)
LOSS = {
    "generate": "nats of KL divergence from the dense cache's next token, behind the last one.",
    "memory": "not measured.",
}


def table(rows: Sequence[Row]) -> str:
    """The rows of one point, with a line that says what it is, and who was not raced."""
    first = rows[0]
    lines = [_title(first), *_lines(rows, COLUMNS[first["what"]])]
    reasons: dict[str, str] = {}
    for row in rows:
        if why := row["result"].get("not_raced"):
            lines.append(f"not raced: {row['label']}: {why}")
        elif why := row["result"].get("no_kernel"):
            reasons.setdefault(why, row["label"])
    lines += [f"reference: {label}: {why}" for why, label in reasons.items() if why != "asked for"]
    return "\n".join(lines)


def note(what: str) -> str:
    """What the columns mean."""
    return NOTES + LOSS.get(what, "likewise from float64 over the tokens as they came.")


def _title(row: Row) -> str:
    prefill = f", prefill {row['prefill']}" if row["prefill"] else ""
    return (
        f"{row['what']}, {row['model']} on {row['device']} ({row['backend']}, {row['dtype']}): "
        f"batch {row['batch']}, {row['context']} tokens{prefill}"
    )


def _lines(rows: Sequence[Row], columns: Sequence[Column]) -> Iterator[str]:
    """Columns side by side; `-` where a row has no figure."""
    cells = [["", *(head for head, _ in columns)]]
    for row in rows:
        result = row["result"]
        if "not_raced" not in result:
            cells.append([row["label"], *(_cell(show, result) for _, show in columns)])
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        shown = [cell.rjust(width) for cell, width in zip(line[1:], wide[1:], strict=True)]
        yield "  ".join([line[0].ljust(wide[0]), *shown]).rstrip()


def _cell(show: Callable[[Result], str], result: Result) -> str:
    try:
        return show(result)
    except KeyError:
        return "-"
