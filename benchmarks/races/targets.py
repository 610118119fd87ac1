"""The targets, and what the rows say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.races.rows import Row
from benchmarks.races.sizes import LLAMA2_13B, LLAMA3_8B

Rows = Sequence[Row]
LARGE = 512 * 1024  # tokens of all rows together
BITS = {"4 bits": (3.0, 2.1), "2 bits": (4.5, 2.6)}  # times faster: the kernel, the step


class Target(NamedTuple):
    """One line: what is asked for, and what was measured of it."""

    what: str
    goal: str
    found: list[float]
    met: Callable[[float], bool]


def targets(rows: Rows) -> Iterator[str]:
    """The table; targets of which nothing was measured say so."""
    yield "| target | goal | measured | met |"
    yield "|---|---|---|---|"
    for what, goal, found, met in (*_kernel(rows), *_step(rows), *_growth(rows), *_rest(rows)):
        figures = ", ".join(f"{x:.3g}" for x in found) or "-"
        verdict = "-" if not found else "yes" if all(map(met, found)) else "no"
        yield f"| {what} | {goal} | {figures} | {verdict} |"


def _least(goal: float) -> Callable[[float], bool]:
    return lambda x: x >= goal


def _most(goal: float) -> Callable[[float], bool]:
    return lambda x: x <= goal


def _size(row: Row) -> tuple[int, int]:
    return row["batch"], row["tokens"]


def _ours(rows: Rows, arm: str) -> list[Row]:
    """Rows of an arm in which nothing but our kernels ran."""
    return [row for row in rows if row["key"].endswith(f" {arm}") and row["mode"] == "fused"]


def _against(rows: Rows, arm: str, rival: Callable[[Row], bool]) -> dict[tuple[int, int], float]:
    """By size, how many times faster an arm is than the best of its rivals."""
    found = {}
    for row in _ours(rows, arm):
        beside = [x["ms"] for x in rows if rival(x) and _size(x) == _size(row)]
        if beside:
            found[_size(row)] = min(beside) / row["ms"]
    return found


def _kernel(rows: Rows) -> Iterator[Target]:
    rows = [row for row in rows if row["race"] == "kernel"]
    large = [row for row in rows if row["batch"] * row["tokens"] >= LARGE]
    for bits, (faster, _) in BITS.items():
        for codec in ("gear-l", "kivi"):
            arm = f"{codec} {bits}"
            shares = [row["share_of_copy"] for row in _ours(large, arm)]
            yield Target(f"kernel, {arm}: of the copy's rate", ">= 0.75", shares, _least(0.75))
            times = list(_against(large, arm, lambda row: " sdpa" in row["key"]).values())
            yield Target(
                f"kernel, {arm}: over the best SDPA", f">= {faster}", times, _least(faster)
            )
    for name in ("flashinfer", "flash-attn 3"):

        def rival(row: Row, name: str = name) -> bool:
            return bool(row["key"].endswith(name))

        by_size = [
            pair for bits in BITS for pair in _against(rows, f"gear-l {bits}", rival).items()
        ]
        alone = [x for size, x in by_size if size == (1, 65536)]
        many = [x for size, x in by_size if size == (16, 32768)]
        yield Target(f"kernel, gear-l over {name}, 1 x 64k", ">= 1", alone, _least(1))
        yield Target(f"kernel, gear-l over {name}, 16 x 32k", ">= 2.5", many, _least(2.5))


def _dense(row: Row) -> bool:
    return row["key"].endswith((" dense", "transformers dynamic"))


def _step(rows: Rows) -> Iterator[Target]:
    rows = [row for row in rows if row["race"] == "step" and row["model"] == LLAMA3_8B]
    for bits, (_, faster) in BITS.items():
        by_size = _against(rows, f"gear-l {bits}", _dense)
        many = {size: x for size, x in by_size.items() if size[1] == 8192 and size[0] >= 32}
        sizes = ", ".join(str(batch) for batch, _ in many) or "64"
        yield Target(
            f"step, gear-l {bits}, {sizes} x 8k: over the best dense",
            f">= {faster}",
            list(many.values()),
            _least(faster),
        )
        short = [x for size, x in by_size.items() if size == (1, 1024)]
        yield Target(
            f"step, gear-l {bits}, 1 x 1k: over the best dense", ">= 0.95", short, _least(0.95)
        )


def _growth(rows: Rows) -> Iterator[Target]:
    """The slope between the shortest and the longest text, over that which the bytes predict."""
    rows = [row for row in rows if row["race"] == "growth"]
    for arm in ("gear-l 4 bits", "gear-l 2 bits"):
        own = sorted(_ours(rows, arm), key=lambda row: row["tokens"])
        found = []
        if len(own) > 1:
            first, last = own[0], own[-1]
            predicted = (last["bytes"] - first["bytes"]) / last["copy_rate"] * 1e3
            found = [(last["ms"] - first["ms"]) / predicted]
        yield Target(
            f"growth, {arm}: slope over the bytes'",
            "0.85 to 1.15",
            found,
            lambda x: 0.85 <= x <= 1.15,
        )


def _rest(rows: Rows) -> Iterator[Target]:
    def of(race: str) -> list[Row]:
        return [row for row in rows if row["race"] == race]

    coding = of("encode")
    for arm in ("gear-l 4 bits", "gear-l 2 bits"):
        shares = [
            row["share_of_prefill"]
            for row in coding
            if row["key"].endswith(arm) and "share_of_prefill" in row
        ]
        yield Target(f"encoding a prompt, {arm}: of its prefill", "<= 0.05", shares, _most(0.05))
    slow = [row["slowest_over_median"] for row in coding if "slowest_over_median" in row]
    yield Target("encoding a block: slowest step over the median", "<= 1.5", slow, _most(1.5))
    peaks = [row["over_cache"] for row in of("memory") if " dense" not in row["key"]]
    yield Target("peak above weights and a piece, over the cache", "<= 1.25", peaks, _most(1.25))
    flat = [row["ms"] for row in of("less")]
    over = [max(flat) / min(flat)] if len(flat) > 1 else []
    yield Target("LESS: slowest length over the fastest", "<= 1.05", over, _most(1.05))
    shared = {row["key"].split()[-1]: row for row in of("sharing") if "new" in row}
    gain = []
    if {"dense", "freed"} <= shared.keys():
        gain = [shared["dense"]["seconds"] / shared["freed"]["seconds"]]
    yield Target(f"KVSharer at 25 %, {LLAMA2_13B}: generation", ">= 1.3", gain, _least(1.3))
    small = [row["ratio"] for row in of("sharing") if "+" in row["key"] and "ratio" in row]
    yield Target("MiniCache with 4 bits: times smaller", ">= 4", small, _least(4))
