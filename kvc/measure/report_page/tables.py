"""All figures of a run in one table, and what was run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvc.measure.report_page.figures import SCROLL, cell, glyph
from kvc.measure.report_page.markup import number, percent, size, tag, three, words
from kvc.measure.report_page.rows import Results, Run


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of a task."""

    key: str
    name: str
    form: Callable[[Any], str] = number


TASKS: dict[str, tuple[str, tuple[Column, ...]]] = {
    "bytes": (
        "Bytes of the cache",
        (
            Column("nbytes", "all", size),
            Column("bytes_per_token", "per token", size),
            Column("ratio", "dense / own", three),
        ),
    ),
    "ppl": (
        "Perplexity",
        (Column("ppl", "perplexity"), Column("nll", "nats"), Column("error", "s.e., nats", three)),
    ),
    "kl": (
        "Divergence, nats",
        (
            Column("mean", "mean", three),
            Column("median", "median", three),
            Column("p99", "99 %", three),
            Column("max", "max", three),
        ),
    ),
    "agree": (
        "Agreement",
        (Column("top1", "same token", percent), Column("same", "tokens till apart", three)),
    ),
    "recall": ("Recall", (Column("exact", "facts", percent), Column("digits", "digits", percent))),
    "answers": (
        "Free answers",
        (
            Column("length", "tokens", three),
            Column("ratio", "of the full", three),
            Column("ended", "ended", percent),
        ),
    ),
    "drift": (
        "Drift, nats by 1000 tokens",
        (Column("slope", "slope", three), Column("slope_error", "s.e.", three)),
    ),
    "time": (
        "Time",
        (
            Column("prefill_tokens_per_s", "prompt, tokens/s", three),
            Column("decode_tokens_per_s", "decode, tokens/s", three),
            Column("step_ms_median", "step, ms", three),
            Column("step_ms_p99", "99 %, ms", three),
        ),
    ),
    "memory": (
        "Memory",
        (Column("peak_bytes", "peak", size), Column("cache_bytes", "cache", size)),
    ),
}  # fmt: skip


def all_figures(run: Run) -> str:
    """A table with a row for each method and a column for each figure; a click sorts by it."""
    groups = []  # the title of some columns, they, and their results
    for task, (title, columns) in TASKS.items():
        settings = list(run.of(task))
        for setting, results in settings:
            there = [c for c in columns if any(c.key in result for result in results.values())]
            said = f"{title}: {setting.said}" if len(settings) > 1 else title
            if there:
                groups.append((said, there, results))
    if not groups:
        return ""
    top = [tag("th", words(t), colspan=len(c), scope="colgroup") for t, c, _ in groups]
    names = [column.name for _, columns, _ in groups for column in columns]
    heads = [_sorter("method"), *map(_sorter, names)]
    head = tag("thead", tag("tr", tag("td"), *top), tag("tr", *heads))
    rows = [_row(run, label, groups) for label in run.looks]
    caption = tag("caption", "A click on a column sorts by it.")
    return tag(
        "div",
        tag("table", caption, head, tag("tbody", *rows), class_="all"),
        **SCROLL,
        aria_label="All figures",
    )


def _sorter(name: str) -> str:
    return tag("th", tag("button", words(name), type="button"), scope="col", aria_sort="none")


def _row(run: Run, label: str, groups: Sequence[tuple[str, list[Column], Results]]) -> str:
    look = run.looks[label]
    name = tag("th", glyph(look), words(label), scope="row", title=_settings(run, label))
    cells = [
        cell(results.get(label, {}).get(column.key), column.form)
        for _, columns, results in groups
        for column in columns
    ]
    return tag("tr", name, *cells, class_=f"m m{look.index}")


def _settings(run: Run, label: str) -> str:
    look = run.looks[label]
    given = " ".join(f"{key}={value}" for key, value in look.settings.items())
    return f"{look.method} {given}".strip()


def what_was_run(run: Run) -> str:
    """The model, the backend, versions, texts, seeds and methods, as a list."""
    texts = dict.fromkeys(
        f"{s.text or 'text'} (sha256 {s.sha256[:16]})" for s in run.settings if s.text or s.sha256
    )
    contexts = dict.fromkeys(number(s.context) for s in run.settings if s.context)
    methods = dict.fromkeys(
        label if _settings(run, label) == label else f"{label} ({_settings(run, label)})"
        for label in run.looks
    )
    facts = {
        "model": [f"{run.model} ({run.fingerprint})" if run.fingerprint else run.model],
        "backend": [", ".join(x for x in (run.backend, run.dtype, run.device) if x)],
        "kvc": sorted(run.versions - {""}),
        "contexts": [f"{', '.join(contexts)} tokens"] if contexts else [],
        "texts": list(texts),
        "rows": [", ".join(dict.fromkeys(str(s.rows) for s in run.settings if s.rows))],
        "seeds": [", ".join(str(seed) for seed in sorted({s.seed for s in run.settings}))],
        "methods": [", ".join(methods)],
        "tasks": [", ".join(run.results)],
        "dates": [" to ".join(sorted({min(d), max(d)}))] if (d := run.dates - {""}) else [],
        "time": [f"{number(run.seconds / 60, 3)} minutes in all"] if run.seconds else [],
    }
    lines = [
        tag("dt", words(name)) + "".join(tag("dd", words(value)) for value in values)
        for name, values in facts.items()
        if any(values)
    ]
    return tag("dl", *lines)
