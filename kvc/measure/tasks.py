"""What can be asked of a method: the tasks, which of them one pass answers, and their results."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from kvc.measure.divergence import Divergence, divergence
from kvc.measure.held import hold
from kvc.measure.inputs import OPENING, Inputs, OnStep
from kvc.measure.layers import layer_errors
from kvc.measure.maps import layer_distances, retained_shares
from kvc.measure.needles import needles
from kvc.measure.runs import answers, same_prefix
from kvc.methods import Method

Found = dict[str, dict[str, Any]]  # results by task
DECODED = 32  # tokens behind the prompt in what is measured on one sequence or by layers
WARM = 2  # steps before those that are timed
BUCKETS = 8  # of positions behind the prompt
LONG_BUCKETS = 16  # of a long generation


def forced(inputs: Inputs, method: Method, tasks: Collection[str], on_step: OnStep) -> Found:
    """The second half of each row, token by token behind the first."""
    sub = parts(on_step, 3 if "agree" in tasks else 1)
    found = divergence(inputs.engine, inputs.ids, method, inputs.sizes.context // 2, on_step=sub[0])
    ppl, kl = found.perplexity, found.kl
    results: Found = {
        "ppl": {
            "ppl": ppl.ppl,
            "nll": ppl.mean(),
            "error": finite(ppl.error()),
            "rows": len(inputs.ids),
            "by_position": [
                [start, stop, ppl.mean(at.start, at.stop), finite(ppl.error(at.start, at.stop))]
                for start, stop, at in found.buckets(BUCKETS)
            ],
        },
        "kl": {
            "mean": kl.mean(),
            "median": np.median(kl),
            "p99": np.quantile(kl, 0.99),
            "max": kl.max(),
            "by_position": [
                [start, stop, kl[:, at].mean()] for start, stop, at in found.buckets(BUCKETS)
            ],
        },
    }
    if "agree" in tasks:
        rows = inputs.greedy(sub[1])
        prompt = rows.shape[1] - inputs.run
        runs = divergence(inputs.engine, rows, method, prompt, on_step=sub[2])
        results["agree"] = {
            "top1": found.same.mean(),
            "same": 1 + same_prefix(runs).mean(),  # the first is the exact prompt's
            "length": inputs.run,
            "runs": len(rows),
        }
    return results


def recalled(inputs: Inputs, method: Method, tasks: Collection[str], on_step: OnStep) -> Found:
    """Facts in contexts of three lengths."""
    cells = needles(inputs.engine, inputs.facts, method, on_step=on_step)
    asked = sum(cell.asked for cell in cells)
    return {
        "recall": {
            "exact": sum(cell.exact for cell in cells) / asked,
            "digits": sum(cell.digits * cell.asked for cell in cells) / asked,
            "cells": [cell._asdict() for cell in cells],
        }
    }


def answered(inputs: Inputs, method: Method, tasks: Collection[str], on_step: OnStep) -> Found:
    """What the library's own loop writes, and with the full cache."""
    prompts, limit = inputs.prompts, inputs.answer
    first, second = parts(on_step, 2)
    full = inputs.full_answers(first)
    found = full
    if method.parts:
        found = answers(inputs.engine, prompts, method, limit, on_step=second)
    length, full_length = found.tokens.mean(), full.tokens.mean()
    return {
        "answers": {
            "length": length,
            "full_length": full_length,
            "ratio": length / full_length,
            "ended": found.ended,
            "limit": limit,
            "runs": len(prompts),
        }
    }


def drifted(inputs: Inputs, method: Method, tasks: Collection[str], on_step: OnStep) -> Found:
    """A long text of the full model's own, token by token."""
    first, second = parts(on_step, 2)
    rows = inputs.long(first)
    found = divergence(inputs.engine, rows, method, OPENING, on_step=second)
    slope, error = slope_of(found)
    return {
        "drift": {
            "length": inputs.sizes.length,
            "runs": len(rows),
            "by_position": [
                [start, stop, found.kl[:, at].mean(), found.same[:, at].mean(),
                 found.nll[:, at].mean()]
                for start, stop, at in found.buckets(LONG_BUCKETS)
            ],
            "slope": slope,
            "slope_error": error,
        }
    }  # fmt: skip


def by_layer(inputs: Inputs, method: Method, tasks: Collection[str], on_step: OnStep) -> Found:
    """Each layer by itself."""
    prompt = inputs.sizes.context - DECODED
    found = layer_errors(inputs.engine, inputs.ids, method, prompt, on_step=on_step)
    return {"layers": found._asdict()}


def one_sequence(inputs: Inputs, method: Method, tasks: Collection[str], on_step: OnStep) -> Found:
    """Bytes, time and memory of one row."""
    prompt = inputs.sizes.context - DECODED
    row = inputs.ids[0]
    if "time" in tasks:  # libraries compile for new shapes
        hold(inputs.engine, row[: prompt + WARM], method, prompt)
    found = hold(inputs.engine, row, method, prompt, peak="memory" in tasks, on_step=on_step)
    report = found.report
    results: Found = {
        "bytes": {
            "nbytes": report.nbytes,
            "dense_bytes": report.dense_bytes,
            "ratio": report.ratio,
            "bytes_per_token": report.nbytes / inputs.sizes.context,
            "tokens": inputs.sizes.context,
            "parts": report.parts,
            "layers": report.layers,
        },
        "memory": {"peak_bytes": found.peak, "cache_bytes": report.nbytes},
    }
    if "time" in tasks:
        seconds = found.steps[1:]  # the first compresses the prompt
        results["time"] = {
            "prefill_s": found.prefill,
            "prefill_tokens_per_s": prompt / found.prefill,
            "compress_s": found.steps[0],
            "decode_tokens_per_s": len(seconds) / seconds.sum(),
            "step_ms_median": 1000 * np.median(seconds),
            "step_ms_p99": 1000 * np.quantile(seconds, 0.99),
        }
    return results


def mapped(inputs: Inputs, method: Method, tasks: Collection[str], on_step: OnStep) -> Found:
    """What a layout rests on."""
    engine, ids = inputs.engine, inputs.ids
    return {
        "maps": {
            "kvsharer": layer_distances(engine, ids, method),
            "minicache": retained_shares(engine, ids, method),
        }
    }


class Pass(NamedTuple):
    """One way through the model, and the tasks whose results it has."""

    tasks: tuple[str, ...]
    run: Callable[[Inputs, Method, Collection[str], OnStep], Found]


PASSES = (
    Pass(("bytes", "time", "memory"), one_sequence),
    Pass(("ppl", "kl", "agree"), forced),
    Pass(("recall",), recalled),
    Pass(("layers",), by_layer),
    Pass(("answers",), answered),
    Pass(("maps",), mapped),
    Pass(("drift",), drifted),
)
TASKS = tuple(task for each in PASSES for task in each.tasks)
USUAL = ("bytes", "ppl", "kl", "agree", "recall", "layers")  # unless others are asked for


def parts(on_step: OnStep, n: int) -> list[OnStep]:
    """Told of `n` stretches of one way, one after the other and equally long."""

    def part(i: int) -> OnStep:
        return lambda done, total: on_step(i * total + done, n * total)

    return [part(i) for i in range(n)]


def finite(x: float) -> float | None:
    """JSON has no infinity: the standard error of one row is none."""
    return x if np.isfinite(x) else None


def slope_of(found: Divergence) -> tuple[float, float]:
    """Nats of divergence that 1000 tokens add, by least squares, and its standard error.

    The error is that of the parts' means about the line: neighbours are no independent samples.
    """
    parts = list(found.buckets(LONG_BUCKETS))
    x = np.array([(start + stop) / 2000 for start, stop, _ in parts])
    y = np.array([found.kl[:, at].mean() for _, _, at in parts])
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    rest = y - y.mean() - slope * away
    return slope, float(np.sqrt(rest @ rest / max(1, len(x) - 2) / (away @ away)))
