"""Rows as `kvc eval` writes them, made from a formula, for tests of the page that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
CONTEXT, LAYERS = 2048, 4
DENSE = CONTEXT * 4096  # bytes
# label: method, share of the dense bytes, nats above the full cache, recall
METHODS = {
    "none": ("none", 1.0, 0.0, 0.975),
    "kivi": ("kivi", 0.15625, 0.0411, 0.9),
    "gear": ("gear", 0.2265625, 0.0153, 0.95),
    "gear2": ("gear2", 0.234375, 0.0042, 0.975),
    "h2o": ("h2o", 0.05078125, 0.0483, 0.025),
    "minicache": ("minicache", 0.7578125, 0.3412, 0.4),
    "kvsharer+gear": ("kvsharer+gear", 0.171875, 0.3302, 0.2),
}
EDGES = [(0, 512), (512, 1024), (1024, 2047)]


def row(label: str, method: str, task: str, result: Row, **more: Any) -> Row:
    """One row."""
    return {
        "version": 1,
        "kvc": "0.1.0",
        "model": "bundled",
        "fingerprint": "llama-4l",
        "backend": "cpu",
        "dtype": "float32",
        "device": "x86_64",
        "context": CONTEXT,
        "rows": 4,
        "text": {"name": "text.txt", "sha256": "5f" * 32},
        "seed": 0,
        "method": method,
        "settings": {},
        "label": label,
        "task": task,
        "date": "2026-11-23T22:00:00",
        "seconds": 1.5,
        "result": result,
        **more,
    }


def results(label: str, share: float, added: float, recall: float) -> Iterator[tuple[str, Row]]:
    """What every task found of one method, by its task."""
    nbytes, kl = int(DENSE * share), 0.8 * added
    parts = {"codes": nbytes // 2, "scales": nbytes // 4, "window": nbytes - 3 * (nbytes // 4)}
    yield (
        "bytes",
        {
            "nbytes": nbytes,
            "dense_bytes": DENSE,
            "ratio": 1 / share,
            "bytes_per_token": nbytes / CONTEXT,
            "tokens": CONTEXT,
            "parts": parts,
            "layers": [nbytes // LAYERS] * LAYERS,
        },
    )
    nll = 3.5641 + added
    by_position = [[a, b, nll + 0.1 * i, 0.01] for i, (a, b) in enumerate(EDGES)]
    yield "ppl", {
        "ppl": math.exp(nll), "nll": nll, "error": None, "rows": 4, "by_position": by_position,
    }  # fmt: skip
    yield "kl", {
        "mean": kl, "median": kl / 2, "p99": 8 * kl, "max": 40 * kl,
        "by_position": [[a, b, kl * (1 + i)] for i, (a, b) in enumerate(EDGES)],
    }  # fmt: skip
    yield "agree", {"top1": 1 - math.sqrt(kl) / 2, "same": 64 - 50 * kl, "length": 64, "runs": 4}
    yield "recall", {
        "exact": recall, "digits": recall, "cells": list(cells(recall)),
    }  # fmt: skip
    yield "answers", {
        "length": 100 * (1 + added), "full_length": 100.0, "ratio": 1 + added, "ended": 0.75,
        "limit": 128, "runs": 4,
    }  # fmt: skip
    drift = [[a, b, kl * (1 + i), 1 - kl, 2 + added] for i, (a, b) in enumerate(EDGES)]
    yield "drift", {
        "length": 2048, "runs": 1, "by_position": drift, "slope": kl / 4, "slope_error": kl / 9,
    }  # fmt: skip
    errors = [added * (1 + i) for i in range(LAYERS)]
    yield "layers", {"attention": errors, "k": [2 * e for e in errors], "v": errors}
    yield "time", {
        "prefill_s": 1.25, "prefill_tokens_per_s": 1638.4, "decode_tokens_per_s": 80 - 30 * added,
        "step_ms_median": 12.5, "step_ms_p99": 19.25,
    }  # fmt: skip
    yield "memory", {"peak_bytes": nbytes + 3 * 2**20, "cache_bytes": nbytes}
    yield (
        "maps",
        {
            "kvsharer": shared() if "kvsharer" in label else None,
            "minicache": kept() if "minicache" in label else None,
        },
    )


def cells(recall: float) -> Iterator[Row]:
    """Recall by depth, in contexts of two lengths."""
    for kind, facts in (("single", 1), ("multi-key", 8)):
        for context in (1024, 2048):
            for low, high in ((0.0, 0.5), (0.5, 1.0)):
                far = [int((1 - high) * context), int((1 - low) * context)]
                yield {
                    "kind": kind, "facts": facts, "context": context, "depth": [low, high],
                    "distance": far, "asked": 40, "exact": round(40 * recall), "digits": recall,
                }  # fmt: skip


def shared() -> Row:
    """Distances of layers, on both sides of the diagonal, and a map."""
    distances = [[abs(i - j) / 10 + 0.5 * (i != j) for j in range(LAYERS)] for i in range(LAYERS)]
    return {"distances": distances, "map": {"3": 0}}


def kept() -> Row:
    """Retained tokens of a pair of layers."""
    return {"pairs": [[2, 3]], "retained": [[0.25, 0.0625, 0.03125]]}


def rows_of(tasks: set[str] | None = None, **more: Any) -> list[Row]:
    """Rows of all methods, of these tasks or of all."""
    return [
        row(label, method, task, result, **more)
        for label, (method, *figures) in METHODS.items()
        for task, result in results(label, *figures)
        if tasks is None or task in tasks
    ]
