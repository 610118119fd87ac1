"""Tables of the races' rows as Markdown, every figure from the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.races.rows import Row
from benchmarks.races.targets import targets

Rows = Sequence[Row]
GIB = 2**30


def tables(rows: Rows) -> str:
    """All of them: what was missed first, then race by race."""
    whole = [row for row in rows if not {"not_raced", "failed"} & row.keys()]
    lines = ["# Races on one device", "", *_head(rows), "", *targets(whole), ""]
    for title, race, make in SECTIONS:
        if some := [row for row in whole if row["race"] == race]:
            lines += [f"## {title}", "", *make(some), ""]
    lines += _missing(rows)
    return "\n".join(lines).rstrip() + "\n"


def _head(rows: Rows) -> Iterator[str]:
    devices = dict.fromkeys(row["device"] for row in rows if "device" in row)
    commits = dict.fromkeys(str(row["commit"]) for row in rows)
    versions = rows[0]["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    copy = max((row["copy_rate"] for row in rows if "copy_rate" in row), default=0)
    kind = "A dry run at tiny sizes: no figure here means anything. " if rows[0]["dry"] else ""
    yield (
        f"{kind}`python -m benchmarks.gpu` on {', '.join(devices) or 'no device'}, "
        f"{rows[0]['date']}, commit {', '.join(commits)}; {packages}. A large copy moves "
        f"{copy / 1e12:.2f} TB/s, bytes read and written. Times are medians in ms with their "
        "quartiles. Errors are the largest difference from float64 over the largest entry. Mode: "
        "`fused` is our kernels, `reference` the definitions in PyTorch, `both` kernels where "
        "there are any, `library` other code than ours."
    )


def _table(rows: Rows, columns: dict[str, Callable[[Row], Any]]) -> Iterator[str]:
    """One line for each row; a column is what it shows of a row."""
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield "| " + " | ".join(_cell(show, row) for show in columns.values()) + " |"


def _cell(show: Callable[[Row], Any], row: Row) -> str:
    try:
        value = show(row)
    except (KeyError, TypeError, ZeroDivisionError):
        return "-"
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _spread(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        low, high = row[f"{name}_spread"]
        return f"{row[name]:.3f} ({low:.3f} to {high:.3f})"

    return show


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[name]:.1f} %"


def _gib(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name] / GIB:.3f}"


def _of(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name]


def _correctness(rows: Rows) -> Iterator[str]:
    names = ("command", "passed", "failed_tests", "errors", "skipped", "cut", "seconds")
    return _table(rows, {name.replace("_", " "): _of(name) for name in names})


def _kernels(rows: Rows) -> Iterator[str]:
    return _table(
        rows,
        {
            "batch x tokens, arm": _of("key"),
            "mode": _of("mode"),
            "as a graph": _spread("graph_ms"),
            "as it comes": _of("eager_ms"),
            "CPU's part": _of("host_ms"),
            "MiB": lambda row: row["bytes"] / 2**20,
            "TB/s": lambda row: row["rate"] / 1e12,
            "of the copy's": _percent("share_of_copy"),
            "error": _of("error"),
            "loss of the codes": _of("loss_of_codes"),
        },
    )


def _steps(rows: Rows) -> Iterator[str]:
    return _table(
        rows,
        {
            "model, batch x tokens, arm": _of("key"),
            "mode": _of("mode"),
            "as a graph": _spread("graph_ms"),
            "as kvc records it": _spread("replayed_ms"),
            "as it comes": _spread("eager_ms"),
            "CPU's part": _of("host_ms"),
            "least by bytes": _of("floor_ms"),
            "cache, GiB": _gib("cache_bytes"),
            "dense, GiB": _gib("dense_bytes"),
            "error": _of("error"),
        },
    )


def _encoding(rows: Rows) -> Iterator[str]:
    return _table(
        rows,
        {
            "what": _of("key"),
            "mode": _of("mode"),
            "ms": _spread("ms"),
            "a layer's prefill": _of("prefill_ms"),
            "share of it": _percent("share_of_prefill"),
            "slowest step over the median": _of("slowest_over_median"),
            "error": _of("error"),
        },
    )


def _memory(rows: Rows) -> Iterator[str]:
    return _table(
        rows,
        {
            "arm": _of("key"),
            "mode": _of("mode"),
            "tokens": _of("tokens"),
            "prefill, s": _of("prefill_s"),
            "peak above weights, GiB": _gib("peak_bytes"),
            "of one piece, GiB": _gib("piece_bytes"),
            "cache, GiB": _gib("cache_bytes"),
            "(peak - piece) / cache": _of("over_cache"),
            "error": _of("error"),
        },
    )


def _texts(rows: Rows) -> Iterator[str]:
    return _table(
        rows,
        {
            "model, batch x prompt + new, arm": _of("key"),
            "mode": _of("mode"),
            "prefill, s": _of("prefill_s"),
            "first step, s": _of("first_step_s"),
            "later steps, ms": _spread("ms"),
            "tokens/s": _of("tokens_per_s"),
            "peak, GiB": _gib("peak_bytes"),
            "cache, GiB": _gib("cache_bytes"),
            "weights freed, GiB": _gib("freed_bytes"),
            "error": _of("error"),
        },
    )


def _sharing(rows: Rows) -> Iterator[str]:
    yield from _texts([row for row in rows if "new" in row])
    yield ""
    yield from _table(
        [row for row in rows if "ratio" in row],
        {
            "what": _of("key"),
            "tokens": _of("tokens"),
            "cache, GiB": _gib("cache_bytes"),
            "dense, GiB": _gib("dense_bytes"),
            "times smaller": _of("ratio"),
            "error": _of("error"),
        },
    )


def _missing(rows: Rows) -> Iterator[str]:
    lost = [row for row in rows if {"not_raced", "failed"} & row.keys()]
    if not lost:
        return
    yield "## Not raced, and failed"
    yield ""
    for row in lost:
        why = row.get("not_raced") or f"failed: {row['failed']}"
        yield f"- {row['race']}, {row['key']}: {why}"


SECTIONS: tuple[tuple[str, str, Callable[[Rows], Iterator[str]]], ...] = (
    ("Correctness", "tests", _correctness),
    ("Attention kernels", "kernel", _kernels),
    ("Decode steps", "step", _steps),
    ("Growth with the text", "growth", _steps),
    ("LESS at 5 %", "less", _steps),
    ("Encoding", "encode", _encoding),
    ("Peak memory, prompts in pieces", "memory", _memory),
    ("Generation", "generate", _texts),
    ("KVSharer and MiniCache", "sharing", _sharing),
)
