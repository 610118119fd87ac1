"""The README's table of what presets cost and what they keep, made from measured rows.

`python -m benchmarks.presets` prints it from `results/eval.jsonl`, rows of `kvc eval`, and from
`results/encode.jsonl`, rows of `kvc bench encode`. A test holds the README to it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
CONTEXT = 2048  # tokens of a row, and of the prompt that is compressed
HEAD = (
    "method", "bytes/token", "smaller by", "divergence, nats", "perplexity", "same first choice",
    "facts recalled", "compressing / prefill",
)  # fmt: skip


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of results."""
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def table(folder: Path = RESULTS) -> str:
    """Methods that have a row of every task, in the order in which they were measured."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows_of(folder / "eval.jsonl"):
        if row["context"] == CONTEXT:
            found[row["label"]][row["task"]] = row["result"]
    encode = {
        row["label"]: row["result"]["share_of_prefill"]
        for row in rows_of(folder / "encode.jsonl")
        if row["method"] not in (None, "none")  # of ours; the full cache compresses nothing
    }
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for label, tasks in found.items():
        if {"bytes", "ppl", "kl", "agree", "recall"} <= tasks.keys():
            cells = (
                f"`{label}`",
                f"{tasks['bytes']['bytes_per_token']:.0f}",
                f"{tasks['bytes']['ratio']:.2f}x",
                f"{abs(tasks['kl']['mean']):.4f}",  # below zero by rounding alone
                f"{tasks['ppl']['ppl']:.2f}",
                f"{100 * tasks['agree']['top1']:.1f} %",
                f"{100 * tasks['recall']['exact']:.0f} %",
                f"{100 * encode[label]:.1f} %" if label in encode else "",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
