"""Race of encoding: a prompt's against its prefill, and a block's against the steps around it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import cache, partial

import torch
from transformers import DynamicCache

from benchmarks.races.inputs import fill, wide
from benchmarks.races.lab import Lab, shape_fields
from benchmarks.races.rows import Row, Task
from benchmarks.races.sizes import ARMS, LLAMA3_8B
from benchmarks.races.step import Step
from kvc.methods import Gear, parse
from kvc.ops.codec import Code, Spec, arrays, decode, encode
from kvc.ops.dispatch import Mode, mode
from kvc.ops.residual import Seed

CODED = ("gear-l 4 bits", "gear-l 2 bits", "kivi 2 bits", "gear 2 bits", "gear2")


def lost(x: torch.Tensor, code: Code, spec: Spec) -> float:
    """What the codes miss of x, relative, by the root of the sum of squares."""
    return float((decode(code, spec).double() - x.double()).norm() / x.double().norm())


class Prompts:
    """Encoding a layer's prompt, and what a layer's prefill takes."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.prefill = cache(self._prefill)

    def _prefill(self, n: int) -> float:
        """Milliseconds of one layer's share in a prefill of n tokens."""
        model = self.lab.model(LLAMA3_8B)
        ids = torch.full((1, n), 7, device=model.device)

        @torch.no_grad()
        def run() -> None:
            kept = DynamicCache(config=model.config)
            model(ids, past_key_values=kept, use_cache=True, logits_to_keep=1)

        taken = self.lab.device.sample(run, seconds=1, least=3, most=5, cold=False)
        return 1e3 * taken.median / model.config.num_hidden_layers

    def row(self, arm: str, n: int) -> Row:
        """K and V of one layer."""
        lab, of = self.lab, shape_fields(self.lab, LLAMA3_8B, 1, n)
        codec = parse(*ARMS[arm]).codec
        assert isinstance(codec, Gear)
        kv = lab.randn(2, 1, of["kv_heads"], n, of["head_dim"])
        specs = [codec.spec(role, n, of["head_dim"]) for role in ("k", "v")]
        settings: Row = {
            "rank": codec.prefill_rank,
            "outliers": codec.outliers,
            "n_iter": codec.n_iter,
            "seed": Seed(codec.seed, 0, 0),
        }

        def run(x: torch.Tensor = kv) -> list[Code]:
            return [encode(y, spec, **settings) for y, spec in zip(x, specs, strict=True)]

        def measure(how: Mode) -> Row:
            taken = lab.device.sample(run, seconds=0.5, least=3, most=20, cold=False)
            ours = [lost(*each) for each in zip(kv, run(), specs, strict=True)]
            with mode("reference"):
                truth = [lost(*each) for each in zip(kv, run(wide(kv)), specs, strict=True)]
            codes = sum(x.nbytes for code in run() for _, x in arrays(code))
            return {
                **taken.fields("ms"),
                "bytes": kv.nbytes + codes,
                "lost": ours,
                "lost_float64": truth,
                "error": max(abs(a / b - 1) for a, b in zip(ours, truth, strict=True)),
            }

        prefill = self.prefill(n)
        found = lab.in_mode(measure)
        share = {"prefill_ms": prefill, "share_of_prefill": found["ms"] / prefill}
        return of | {"layers": 1} | found | share


def spikes(lab: Lab, arm: str, batch: int, n: int) -> Row:
    """The slowest of the steps in which one block is due, over the median of all."""
    of, model = shape_fields(lab, LLAMA3_8B, batch, n), lab.model(LLAMA3_8B)

    def measure(how: Mode) -> Row:
        cache = lab.cache(model, parse(*ARMS[arm]))
        with mode("reference"):
            fill(lab, cache.store, of["kv_heads"], of["head_dim"], batch, n)
        lab.device.tidy()
        step = Step(model, cache, batch)
        lab.device.events([step] * lab.sizes.unwatched)
        each = lab.device.events([step] * lab.sizes.watched)
        median = statistics.median(each)
        return {
            "ms": median,
            "ms_spread": [min(each), max(each)],
            "slowest_over_median": max(each) / median,
            "error": None,
        }

    return of | lab.in_mode(measure)


def race(lab: Lab) -> Iterator[Task]:
    """Prompts, then blocks."""
    prompts = Prompts(lab)
    for n in lab.sizes.prompts:
        for arm in CODED:
            yield Task(f"prompt {n} {arm}", partial(prompts.row, arm, n))
    for batch, n in lab.sizes.spikes:
        for arm in ("gear-l 2 bits", "gear 2 bits"):
            yield Task(f"block {batch} x {n} {arm}", partial(spikes, lab, arm, batch, n))
