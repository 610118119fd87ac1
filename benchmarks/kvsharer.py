"""What KVSharer's maps cost the bundled model, and what skipped projections save.

`python -m benchmarks.kvsharer --train BOOK --text ANOTHER` searches maps on one text for three
shares, orders and distances, each with the acceptance test, and measures them on another one:
perplexity in a pass through the cache, and recall of planted facts. Then it tries every single
pair, to see whether dissimilar layers are the better ones; and it times the same map with the
sharers' projections skipped and running (PyTorch). JSON lines and tables go to benchmarks/results;
`--times` renews only the times there, or adds those of another device.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np

from benchmarks.kvsharer_tables import tables
from kvc import demo
from kvc.api import load_engine
from kvc.backends.base import Engine
from kvc.calibrate.kvsharer.distances import DISTANCES
from kvc.calibrate.kvsharer.search import Search, Settings
from kvc.calibrate.rows import Rows, read_rows
from kvc.measure.perplexity import perplexity
from kvc.measure.recall import recall
from kvc.methods import Method, parse
from kvc.text import read_text, split_start

RESULTS = Path(__file__).parent / "results"
SHARES = (0.125, 0.25, 0.375)
SEEDS = (0, 1, 2)
CONTEXT = 1024
N_ROWS, N_FACTS = 16, 24  # contexts of the perplexity, and of the recall: of 8 facts each
PROMPT, NEW = 1024, 32  # of the timing
WIDE = {  # a model without grouped heads, in which these projections weigh more
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 2048,
    "max_position_embeddings": 4096,
}  # fmt: skip
TIMED = {"full": "none", "projections run": "kvsharer", "projections skipped": "kvsharer"}
MAP = "2:1,6:1"  # 25 % of 8 layers


class Lab:
    """A model and the held-out text."""

    def __init__(self, engine: Engine, text: str) -> None:
        self.engine = engine
        self.ids = read_rows(engine, [text], N_ROWS, CONTEXT).ids
        self.text = split_start(engine, engine.encode(read_text(text)))[1]
        self.full = perplexity(engine, self.ids, parse("none"), step=CONTEXT)

    def loss(self, method: Method) -> dict[str, Any]:
        """Perplexity, and what it lost to the full cache, with the error over contexts."""
        found = perplexity(self.engine, self.ids, method, step=CONTEXT)
        lost = (found.rows - self.full.rows).mean(1)
        error = lost.std(ddof=1) / len(lost) ** 0.5
        return {"ppl": found.ppl, "lost_nats": float(lost.mean()), "error_nats": float(error)}

    def row(self, method: Method) -> dict[str, Any]:
        """The same with recall."""
        known = recall(
            self.engine, [self.text], method, n=N_FACTS, length=CONTEXT, step=CONTEXT, seed=0
        )
        return {**self.loss(method), "digits": known.digits, "numbers": known.numbers}


def settings() -> Iterator[Settings]:
    """All searches of the table."""
    for share in SHARES:
        for distance in DISTANCES:
            yield Settings(share, distance=distance)
        yield Settings(share, order="similar")
        for seed in SEEDS:
            yield Settings(share, order="random", seed=seed)


def quality(lab: Lab, rows: Rows) -> Iterator[dict[str, Any]]:
    """A row for the full cache and for each search."""
    yield {"kind": "map", "order": "full", "share": 0.0, **lab.row(parse("none"))}
    for wanted in settings():
        search = Search(lab.engine, rows, wanted)
        tried = list(search.run())
        yield {
            "kind": "map",
            "order": wanted.order,
            "distance": wanted.distance,
            "share": wanted.share,
            "seed": wanted.seed,
            "map": search.text,
            "sharers": len(search.accepted),
            "rejected": len(tried) - len(search.accepted),
            "similarity": search.accepted[-1].similarity,
            **lab.row(parse("kvsharer", {"map": search.text})),
        }


def pairs(lab: Lab, rows: Rows) -> Iterator[dict[str, Any]]:
    """A row for every single pair: its distances, its similarity, what it costs."""
    found = {how: Search(lab.engine, rows, Settings(0.125, 1.01, how)) for how in DISTANCES}
    for search in found.values():
        search.prepare()
    for tried in found["positionwise"].run():
        pair = (tried.layer, tried.owner)
        yield {
            "kind": "pair",
            "pair": list(pair),
            "distances": {how: search.ranked[pair] for how, search in found.items()},
            "similarity": tried.similarity,
            **lab.loss(parse("kvsharer", {"map": f"{pair[0]}:{pair[1]}"})),
        }


def times(device: str) -> Iterator[dict[str, Any]]:
    """Rows of seconds, medians of runs that take turns: the bundled model, and a wide one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvc.backends.torch import cache as adapter
    from kvc.backends.torch.engine import Engine as TorchEngine
    from kvc.backends.torch.projections import skip

    torch.manual_seed(0)
    wide = LlamaForCausalLM(LlamaConfig(**WIDE)).to(device).eval()
    bundled = load_engine(device, str(demo.path()), "float32")
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    about = {"kind": "time", "device": name, "threads": torch.get_num_threads()}
    open_all = patch.object(adapter, "skip", lambda gates, _: skip(gates, ()))
    ids = np.random.default_rng(0).integers(3, 2000, (1, PROMPT + NEW)).astype(np.int32)
    for model, engine, repeats in (
        ("bundled", bundled, 41),
        ("random, width 1024, 16 heads", TorchEngine(wide, None, device), 11),
    ):
        taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in TIMED}
        for repeat in range(repeats + 1):
            for arm, method in TIMED.items():
                cache = engine.make_cache(parse(method, {"map": MAP} if arm != "full" else {}))
                with open_all if arm == "projections run" else nullcontext():
                    start = _now(device)
                    engine.logits(ids[:, :PROMPT], cache)
                    middle = _now(device)
                    for t in range(PROMPT, PROMPT + NEW):
                        engine.logits(ids[:, t : t + 1], cache)
                    end = _now(device)
                if repeat:  # the first warms up
                    taken[arm].append((middle - start, (end - middle) / NEW))
        for arm, runs in taken.items():
            prefill, decode = (statistics.median(run[i] for run in runs) for i in (0, 1))
            yield {
                **about,
                "model": model,
                "arm": arm,
                "repeats": repeats,
                "prompt": PROMPT,
                "new": NEW,
                "prefill_s": prefill,
                "decode_s_per_token": decode,
                "ratios": _ratios(taken["projections skipped"], runs),
            }


def _now(device: str) -> float:
    """Seconds, when the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _ratios(
    base: list[tuple[float, float]], runs: list[tuple[float, float]]
) -> list[dict[str, float]]:
    """Of prefill and of decoding, to the runs beside them: the median and the quartiles."""
    found = []
    for i in (0, 1):
        each = [run[i] / other[i] for run, other in zip(runs, base, strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        found.append({"median": middle, "low": low, "high": high})
    return found


@click.command()
@click.option("--train", help="The text of the search.")
@click.option("--text", help="Another one, for perplexity and recall.")
@click.option("--times", "only_times", is_flag=True, help="Only time, and keep the other rows.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=0, help="CPU threads; 0 leaves the choice to PyTorch.")
def main(train: str | None, text: str | None, only_times: bool, device: str, threads: int) -> None:
    """Measure, and write rows and tables."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if only_times:
        lines = (RESULTS / "kvsharer.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
    elif train and text:
        found = list(measured(train, text, device))
    else:
        raise click.UsageError("expected --train and --text, or --times")
    timed = list(times(device))
    name = timed[0]["device"]
    found = [row for row in found if row["kind"] != "time" or row["device"] != name] + timed
    lines = [json.dumps(row) + "\n" for row in found]
    (RESULTS / "kvsharer.jsonl").write_text("".join(lines), encoding="utf-8")
    (RESULTS / "kvsharer.md").write_text(tables(found), encoding="utf-8")


def measured(train: str, text: str, device: str) -> Iterator[dict[str, Any]]:
    """All rows but those of times, shown as they come."""
    import torch

    engine = load_engine(device, str(demo.path()), "float32")
    rows = read_rows(engine, [train], 30, 64)
    lab = Lab(engine, text)
    about = {
        "kind": "about",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "train": Path(train).name,
        "text": Path(text).name,
        "tokens": int(lab.ids.size),
        "context": CONTEXT,
        "facts": 8 * N_FACTS,
    }
    for row in chain([about], quality(lab, rows), pairs(lab, rows)):
        click.echo(json.dumps(row))
        yield row


if __name__ == "__main__":
    main()
