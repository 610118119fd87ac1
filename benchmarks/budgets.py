"""Methods against each other at equal bytes, and what each part of `gear2` is worth there.

`python -m benchmarks.budgets --train BOOK` gives every method as many of the dense cache's bytes as
a budget allows: the widest codes that fit and then newest tokens, as many kept tokens, as many
layers that do not share. `kvc tune` on the book stands beside them. All are measured on the bundled
text, which no part of the tuning saw. Rows, as `kvc eval` makes them, go to `budgets.jsonl` as they
are made, and are not made again; the tables are in `budgets.md` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import click
from tqdm import tqdm

from kvc import demo
from kvc.api import load_engine
from kvc.calibrate.kvsharer.search import Search as MapSearch
from kvc.calibrate.kvsharer.search import Settings
from kvc.calibrate.rows import Rows, read_rows
from kvc.calibrate.tune.others import WIDTHS, evicting, merging
from kvc.calibrate.tune.run import settings as tuned_settings
from kvc.calibrate.tune.search import Search
from kvc.calibrate.tune.sizes import Sizes
from kvc.calibrate.tune.space import choice_of, kinds, read_methods
from kvc.calibrate.tune.widen import wider
from kvc.files import write_whole
from kvc.measure.choice import Choice, read_choice
from kvc.measure.evaluate import evaluate
from kvc.measure.inputs import Inputs
from kvc.measure.inputs import Sizes as Reading
from kvc.measure.results import Row, results_file
from kvc.methods import PRESETS

RESULTS = Path(__file__).with_name("results")
BUDGETS = (0.5, 0.25, 0.125)  # of the dense bytes
CONTEXT, ROWS = 2048, 4  # of the text that is measured
TUNED = (4, 2048)  # rows and tokens of the calibration text, as in `kvc tune`
TASKS = ("bytes", "ppl", "kl")
CODECS = ("kivi", "kcvt", "token", "gear-s", "gear-l", "gear", "gear2")
EVICTING = ("streaming", "h2o", "tova", "less")
PLAIN = {"prefill_rank": "0", "rank": "0"}
# What gear2 has and kivi has not, a part at a time; both have two bits of keys where K4 is not.
PARTS: dict[str, Mapping[str, str]] = {
    "4-bit keys": {"k_bits": "4"},
    "4-bit values": {"v_bits": "4"},
    "rotation": {"rotate": "hadamard"},
    "dual scales": {"scales": "dual", "buffer": "128"},
    "sinks": {"sink": "64"},
    "low rank": {"prefill_rank": "2", "rank": "2"},
}
MISSING: dict[str, Mapping[str, str]] = {
    "4-bit keys": {"k_bits": "2"},
    "rotation": {"rotate": ""},
    "dual scales": {"scales": ""},
    "sinks": {"sink": "0"},
    "low rank": PLAIN,
}


class Entry(NamedTuple):
    """A line of a table."""

    what: str
    choice: Choice


class Lab:
    """The bundled model, and bytes of methods on it.

    Args:
        backend: Where it runs.
        train: The text that maps and profiles are made from.
    """

    def __init__(self, backend: str, train: str) -> None:
        self.engine = load_engine(backend, str(demo.path()), "float32")
        text = demo.path() / "text.txt"
        self.inputs = Inputs(self.engine, [text], Reading(CONTEXT, ROWS, CONTEXT))
        self.train: Rows = read_rows(self.engine, [train], *TUNED)
        self.sizes = Sizes(self.engine, self.train.ids[0], CONTEXT)

    def filled(self, name: str, settings: Mapping[str, str], budget: float) -> Choice | None:
        """A codec with these settings, and as many newest tokens as fit; None if none fit."""
        given = {**{f"gear.{key}": x for key, x in settings.items()}, "gear.window": "0"}
        choice = choice_of(name, given)
        if self.sizes.of(choice.method) > budget:
            return None
        return wider(self.sizes, choice, budget) or choice

    def coded(
        self, name: str, budget: float, settings: Mapping[str, str] | None = None
    ) -> Choice | None:
        """A codec in the widest codes that fit, then filled."""
        for k_bits, v_bits in WIDTHS:
            widths = {"k_bits": str(k_bits), "v_bits": str(v_bits)}
            if choice := self.filled(name, {**(settings or {}), **widths}, budget):
                return choice
        return None

    def shared(self, budget: float, order: str) -> Choice | None:
        """KVSharer with as few sharers as fit, from a search down a ranking."""
        layers = len(self.engine.shape.full_layers)
        for sharers in range(1, layers):
            any_map = {"kvsharer.map": ",".join(f"{i}:0" for i in range(1, sharers + 1))}
            if self.sizes.of(choice_of("kvsharer", any_map).method) > budget:
                continue
            settings = Settings(sharers / layers, -1.0, order=order)
            found = MapSearch(self.engine, self.train, settings)
            list(found.run())
            return choice_of("kvsharer", {"kvsharer.map": found.text})
        return None

    def order(self, budget: float) -> Iterator[Entry]:
        """Every method at a budget."""
        for name in CODECS:
            if choice := self.coded(name, budget):
                yield Entry(name, choice)
        for name in EVICTING:
            for choice in evicting(self.sizes, name, budget):
                yield Entry(choice.name, choice)
        for choice in merging(self.sizes, "minicache", kinds(self.engine.shape, ["gear"]), budget):
            yield Entry(choice.name, choice)
        for order in ("dissimilar", "similar"):
            if choice := self.shared(budget, order):
                yield Entry(f"kvsharer, {order} layers", choice)
        for name in ("kvsharer+kivi", "kvsharer+gear"):
            if choice := self.coded(name, budget):
                yield Entry(name, choice)

    def tuned(self, budget: float, work: Path) -> Iterator[Entry]:
        """What `kvc tune` finds, by itself and where it may evict tokens."""
        every = ",".join(name for name in PRESETS if name != "none")
        for what, names in (("tuned", None), ("tuned, eviction allowed", every)):
            with results_file(work) as scores:
                search = Search(self.engine, self.train, CONTEXT, read_methods(names), scores)
                best = search.within(budget)
                yield Entry(what, choice_of(best.choice.name, tuned_settings(search, best)))

    def parts(self) -> Iterator[Entry]:
        """`gear2`, without each of its parts, and each of them alone beside `kivi`."""
        whole = read_choice("gear2")
        budget = self.sizes.of(whole.method)
        yield Entry("gear2", whole)
        for part, settings in MISSING.items():
            if choice := self.filled("gear2", settings, budget):
                yield Entry(f"gear2 without {part}", choice)
        for name in ("kivi", "gear-l", "gear"):
            if choice := self.filled(name, {}, budget):
                yield Entry(f"{name}, 2 bits", choice)
            if choice := self.filled(name, {"bits": "4"}, budget):
                yield Entry(f"{name}, 4 bits", choice)
        for part, settings in PARTS.items():
            if choice := self.filled("kivi", settings, budget):
                yield Entry(f"kivi with {part}", choice)

    def measure(self, entries: list[Entry], out: Path, what: str) -> list[tuple[str, list[Row]]]:
        """The rows of each entry, made where they are missing."""
        found = []
        with results_file(out) as results:
            for what_is, choice in tqdm(entries, desc=what, disable=None):
                both = [read_choice("none"), choice]
                rows = evaluate(self.inputs, both, TASKS, results, "bundled")
                found.append((what_is, [row for row in rows if row["label"] == choice.label]))
        return found


def lines(found: list[tuple[str, list[Row]]]) -> Iterator[str]:
    """A table, the least divergence first."""
    yield "| method | settings | bytes | divergence, nats | perplexity |"
    yield "|---|---|---|---|---|"
    tasks = [(what, {row["task"]: row["result"] for row in rows}, rows[0]) for what, rows in found]
    for what, result, row in sorted(tasks, key=lambda each: each[1]["kl"]["mean"]):
        said = row["label"].partition(" ")[2] or "as preset"
        yield (
            f"| {what} | `{said}` | {100 / result['bytes']['ratio']:.2f} % "
            f"| {result['kl']['mean']:.3g} | {result['ppl']['ppl']:.2f} |"
        )


@click.command()
@click.option("--train", required=True, help="A book that maps and profiles are made from.")
@click.option("--backend", default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(train: str, backend: str, out: Path) -> None:
    """Measure, and write the tables."""
    lab = Lab(backend, train)
    file = out / "budgets.jsonl"
    text = ["# Methods at equal bytes", "", _head(lab), ""]
    budget = lab.sizes.of(read_choice("gear2").method) / lab.sizes.dense
    text += [f"## The parts of gear2, all at its own {100 * budget:.1f} %", ""]
    text += [*lines(lab.measure([*lab.parts()], file, "parts")), ""]
    for share in BUDGETS:
        nbytes = share * lab.sizes.dense
        entries = [*lab.order(nbytes), *lab.tuned(nbytes, out / ".tune.jsonl")]
        text += [f"## At most {100 * share:g} % of the dense bytes", ""]
        text += [*lines(lab.measure(entries, file, f"{share:.1%}")), ""]
        write_whole(out / "budgets.md", "\n".join(text).encode())
    (out / ".tune.jsonl").unlink()


def _head(lab: Lab) -> str:
    shape = lab.engine.shape
    return (
        f"Made by `python -m benchmarks.budgets`: the bundled model ({shape.fingerprint}) in "
        f"float32 on {lab.engine.name}, {ROWS} rows of {CONTEXT} tokens of its text, the second "
        "half of each read token by token behind the compressed first. Every method has the widest "
        "codes that fit, and then as many exact newest tokens; or as many kept tokens; or as few "
        "sharing layers. Maps and the tuned profile were made from another book. Divergence is "
        "that of the next token from the full cache's. What is missing does not fit."
    )


if __name__ == "__main__":
    main()
