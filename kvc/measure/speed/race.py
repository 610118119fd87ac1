"""A bench's races point by point: rows, what they were measured with, and who is left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvc.errors import KernelUnavailable
from kvc.measure.choice import Choice
from kvc.measure.provenance import commit, versions
from kvc.measure.results import Results, Row
from kvc.measure.speed import attention, encode, generate, memory
from kvc.measure.speed.bench import Bench
from kvc.measure.speed.clock import NotRaced, Times, in_turns
from kvc.measure.speed.library import DENSE
from kvc.version import __version__

What = Literal["attention", "generate", "encode", "memory"]
REPEAT: dict[What, int] = {"attention": 15, "generate": 3, "encode": 3, "memory": 1}
Check = Callable[[], None]
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """Where arms meet."""

    batch: int
    context: int
    prefill: str = ""


@dataclass
class Race:
    """Caches of one model at several sizes.

    Attributes:
        what: Which race.
        bench: The model.
        model: What it is called, a path or a name.
        dtype: As it was asked for.
        choices: The methods.
        points: The sizes.
        repeat: Rounds.
    """

    what: What
    bench: Bench
    model: str
    path: str
    dtype: str | None
    choices: Sequence[Choice]
    points: Sequence[Point]
    repeat: int
    common: Row = field(init=False)

    def __post_init__(self) -> None:
        """Notes what stands in every row."""
        engine, library = self.bench.engine, self.bench.library
        shape = engine.shape
        self.common = {
            "version": 1,
            "commit": commit(),
            "device": library.device(),
            "versions": versions(library.PACKAGES),
            "model": self.model,
            "fingerprint": shape.fingerprint,
            "layers": self.bench.n_layers,
            "heads": shape.n_heads,
            "kv_heads": shape.n_kv_heads,
            "head_dim": shape.head_dim,
            "backend": engine.name,
            "dtype": self.bench.xp.dtype_name(self.bench.like),
            "what": self.what,
            "asked": self.bench.wish,
            "repeat": self.repeat,
        }

    @property
    def arms(self) -> list[str]:
        """Labels: the library's own caches, then the methods."""
        return [*self.bench.library.RIVALS, *(choice.label for choice in self.choices)]

    def row(self, point: Point, label: str) -> Row:
        """What one row is asked for."""
        rival = label in self.bench.library.RIVALS
        choice = next((c for c in self.choices if c.label == label), None)
        return {
            **self.common,
            "label": label,
            "method": None if rival or choice is None else choice.name,
            "settings": dict(choice.settings) if choice else {},
            "batch": point.batch,
            "context": point.context,
            "prefill": point.prefill,
        }

    def run(self, results: Results, check: Check, done: Check) -> Iterator[list[Row]]:
        """The rows of each point; those that are there already are not measured again.

        Ratios are of one run: if an arm of a point has no row, all its arms run again.

        Args:
            results: Takes them.
            check: Called before each measurement; raises after Ctrl-C.
            done: Called when an arm is ready, and once more with its times.
        """
        for point in self.points:
            asked = [self.row(point, label) for label in self.arms]
            known = [results.get(row) for row in asked]
            if all(known):
                yield [row for row in known if row]
                continue
            start = time.perf_counter()
            found = self._point(point, check, done)
            compare(self.what, found, [*self.bench.library.RIVALS])
            seconds = round(time.perf_counter() - start, 2)
            rows = [
                {**row, "kvc": __version__, "seconds": seconds, "result": found[row["label"]]}
                for row in asked
            ]
            for row in rows:
                results.add(row)
            yield rows

    def _point(self, point: Point, check: Check, done: Check) -> dict[str, Result]:
        measure = {
            "attention": self._attention,
            "generate": self._generate,
            "encode": self._encode,
            "memory": self._memory,
        }[self.what]
        return measure(point, check, done)

    def _ready(
        self, make: Callable[[str, Choice | None], Any], check: Check, done: Check
    ) -> tuple[dict[str, Any], dict[str, Result]]:
        """The arms that can be raced, and results of the others, which say why."""
        arms: dict[str, Any] = {}
        out: dict[str, Result] = {}
        for label in self.arms:
            check()
            choice = next((c for c in self.choices if c.label == label), None)
            try:
                arms[label] = make("" if choice else label, choice)
            except (NotRaced, KernelUnavailable) as why:
                out[label] = {"not_raced": str(why)}
            except (RuntimeError, MemoryError) as error:  # of a device's memory, above all
                first = (str(error).splitlines() or ["no reason"])[0]
                out[label] = {"not_raced": f"{type(error).__name__}: {first}"}
            done()
        return arms, out

    def _attention(self, point: Point, check: Check, done: Check) -> dict[str, Result]:
        bench, size = self.bench, (point.batch, point.context)

        def make(name: str, choice: Choice | None) -> attention.Arm:
            if choice:
                return attention.ours(bench, choice, *size)
            return attention.rival(bench, name, *size)

        arms, found = self._ready(make, check, done)
        times = in_turns({label: arm.run for label, arm in arms.items()}, self.repeat, check)
        return found | {label: arm.result(times[label]) for label, arm in arms.items()}

    def _generate(self, point: Point, check: Check, done: Check) -> dict[str, Result]:
        size = (point.batch, point.context, generate.NEW)

        def make(name: str, choice: Choice | None) -> generate.Arm:
            arm = generate.Arm(self.bench, name, choice, point.prefill, size)
            arm.warm_up()
            return arm

        arms, found = self._ready(make, check, done)
        runs = in_turns({label: arm.run for label, arm in arms.items()}, self.repeat, check)
        full = arms[DENSE].log_probs if DENSE in arms else None
        return found | {label: arm.result(runs[label], full) for label, arm in arms.items()}

    def _encode(self, point: Point, check: Check, done: Check) -> dict[str, Result]:
        bench, size = self.bench, (point.batch, point.context)
        prefill = encode.Prefill(bench, *size)
        prefill.run()

        def make(name: str, choice: Choice | None) -> encode.Arm:
            if choice:
                return encode.Ours(bench, choice, *size)
            return encode.Rival(bench, name, *size)

        arms, found = self._ready(make, check, done)
        runs = in_turns(
            {"": prefill.run, **{label: arm.run for label, arm in arms.items()}},
            self.repeat,
            check,
        )
        whole = Times.of(runs.pop(""))
        return found | {label: arm.result(runs[label], whole) for label, arm in arms.items()}

    def _memory(self, point: Point, check: Check, done: Check) -> dict[str, Result]:
        engine = self.bench.engine

        def make(name: str, choice: Choice | None) -> Result:
            task = memory.Task(
                engine.name, self.path, self.dtype, self.bench.wish, name,
                choice.label if choice else "", point.prefill or "exact",
                point.batch, point.context,
            )  # fmt: skip
            each = [memory.measure(task, self.bench) for _ in range(self.repeat)]
            peaks = Times.of([one["peak_bytes"] for one in each])
            return {
                **each[0],
                "peak_bytes": int(peaks.median),
                "peak_bytes_spread": [int(peaks.low), int(peaks.high)],
                "over_cache": int(peaks.median) / each[0]["bytes"],
            }

        arms, found = self._ready(make, check, done)
        return found | arms


SPEED: dict[What, str] = {
    "attention": "ms", "generate": "ms", "encode": "ms", "memory": "peak_bytes",
}  # fmt: skip


def compare(what: What, found: Mapping[str, Result], rivals: Sequence[str]) -> None:
    """Adds ratios to the library's dense cache, and to the best of its quantized ones.

    `faster` are times (of memory: peaks) of the rival over one's own; `smaller` are bytes.
    """
    figure = SPEED[what]
    groups = {"dense": rivals[:1], "quantized": rivals[1:]}
    for result in found.values():
        if "not_raced" in result:
            continue
        for name, group in groups.items():
            beside = [found[r] for r in group if "not_raced" not in found.get(r, {"not_raced": 1})]
            if beside:
                best = min(other[figure] for other in beside)
                least = min(other["bytes"] for other in beside)
                result[f"faster_than_{name}"] = best / result[figure]
                result[f"smaller_than_{name}"] = least / result["bytes"]
