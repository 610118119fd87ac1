"""Finds the rows of the tables by which attention's Triton kernels are compiled.

`python -m benchmarks.configs` times every candidate of every row on the GPU that is there, each at
all of the row's sizes, writes them as JSON lines to `benchmarks/results/configs.jsonl`, and says
which is the fastest beside the one in the table. The table is written by hand from that: what is
faster by less than the runs spread is not worth a change, and `python -m tests.triton_aot` must
find no spills in it. `--dry-run` does it at tiny sizes, with TRITON_INTERPRET=1 in the interpreter.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch

from benchmarks.races.device import Device
from benchmarks.races.inputs import coded
from benchmarks.races.lab import interpreted
from benchmarks.races.rows import PACKAGES, Row, Rows, read
from kvc.cuda_kernels import attend_coded, attend_dense
from kvc.cuda_kernels.launch import Config, capability, newest
from kvc.measure.provenance import commit, versions
from kvc.methods import Gear, parse
from kvc.ops.dispatch import mode

RESULTS = Path(__file__).with_name("results") / "configs.jsonl"
TILES, WARPS, STAGES = (16, 32, 64, 128), (2, 4, 8, 16), (1, 2, 3, 4)
HEADS, QUERY_HEADS, WIDTH = 8, 32, 128
BLOCK = 128  # tokens, of which prompts are whole numbers
SIZES = ((1, 32768), (16, 8192), (64, 4096))  # batch and tokens
DRY = ((1, 200),)

Run = Callable[[], Any]


class Sweep(NamedTuple):
    """One row of a table, and what may stand in it."""

    kernel: str
    row: str
    now: Any  # what stands in it
    candidates: tuple[Any, ...]
    put: Callable[[Any], Any]  # a context in which a candidate stands in it
    runs: Callable[[int, int], list[Run]]  # calls that take the row, of batch x tokens


def randn(device: Device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random numbers."""
    generator = torch.Generator(device.at).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device.at).to(dtype)


def sweeps(device: Device) -> Iterator[Sweep]:
    """All rows of the newest tables for the device."""
    yield from of_dense(device)
    yield from of_coded(device)


def of_dense(device: Device) -> Iterator[Sweep]:
    """By bytes of a number and width of a token."""
    dtypes = {2: torch.float16 if device.name == "cpu" else torch.bfloat16, 4: torch.float32}
    table = newest(attend_dense.TABLE, capability(torch.empty(0, device=device.at)))
    for key, (rows, config) in table.items():
        itemsize, D = key

        def runs(batch: int, n: int, itemsize: int = itemsize, D: int = D) -> list[Run]:
            new = partial(randn, device, dtypes[itemsize])
            k, v = new(batch, HEADS, n, D), new(batch, HEADS, n, D)
            q = new(batch, QUERY_HEADS, 1, D)
            return [partial(attend_dense.run, q, k, v, D**-0.5, dtype=q.dtype)]

        found = [Config(*each) for each in itertools.product(TILES, WARPS[1:3], STAGES)]
        candidates = tuple((rows, each) for each in found)
        put = partial(in_row, table, key)
        name = f"{itemsize} bytes, D {D}"
        yield Sweep("attend_dense", name, (rows, config), candidates, put, runs)


def of_coded(device: Device) -> Iterator[Sweep]:
    """Of folded codes, and of tokens that are decoded: plain ones, and those with more beside."""
    around = capability(torch.empty(0, device=device.at))
    half = torch.float16 if device.name == "cpu" else torch.bfloat16

    def calls(
        methods: list[tuple[str, dict[str, Any]]], dtype: torch.dtype, batch: int, n: int
    ) -> list[Run]:
        q, found = randn(device, dtype, batch, QUERY_HEADS, 1, WIDTH), []
        one = randn(device, dtype, 1, HEADS, n // BLOCK * BLOCK, WIDTH)
        for method in methods:
            codec = parse(*method).codec
            assert isinstance(codec, Gear)
            with mode("reference"):
                k, v = coded(codec, "k", one, batch), coded(codec, "v", one, batch)
            found.append(partial(attend_coded.run, q, k, v, WIDTH**-0.5))
        return found

    folded: list[tuple[str, dict[str, Any]]] = [("kivi", {"bits": bits}) for bits in (2, 4, 8)]
    folded.append(("gear-l", {"bits": 4, "prefill_rank": 2}))
    teams, key = attend_coded.TEAMS, oldest(attend_coded.TEAMS, around)
    several = tuple(itertools.product(WARPS, STAGES))
    put = partial(in_row, teams, key)
    yield Sweep("attend_coded", "folded", teams[key], several, put, partial(calls, folded, half))

    table, key = attend_coded.TABLE, oldest(attend_coded.TABLE, around)
    few = [Config(*each) for each in itertools.product(TILES[:3], WARPS[1:], STAGES[:2])]
    put = partial(in_row, table, key)
    plain, heavy = table[key]
    runs = partial(calls, [("kivi", {"bits": 4})], torch.float32)
    yield Sweep(
        "attend_coded", "decoded", table[key], tuple((x, heavy) for x in few), put, runs
    )  # fmt: skip
    runs = partial(calls, [("gear2", {}), ("gear", {}), ("gear-l", {})], half)
    yield Sweep(
        "attend_coded", "decoded with more", table[key], tuple((plain, x) for x in few), put, runs
    )  # fmt: skip


def oldest(table: Mapping[int, Any], around: int) -> int:
    """The key whose row `newest` gives."""
    return next(key for key in table if table[key] is newest(table, around))


def in_row(table: dict[Any, Any], key: Any, candidate: Any) -> Any:
    """A context in which a candidate stands in a row of a table."""
    return patch.dict(table, {key: candidate})


def timed(device: Device, sweep: Sweep, candidate: Any, runs: list[Run]) -> Row:
    """Milliseconds of each run with a candidate and their geometric mean, or why there are none."""
    try:
        with sweep.put(candidate):
            each = [device.sample(run, seconds=0.1, least=5, most=30).median for run in runs]
    except Exception as why:  # what a compiler refuses has many names
        return {"why": (str(why).splitlines() or [type(why).__name__])[0]}
    return {"each_ms": [1e3 * x for x in each], "ms": 1e3 * statistics.geometric_mean(each)}


def search(device: Device, rows: Rows, sizes: tuple[tuple[int, int], ...], few: int | None) -> None:
    """Times what has no row yet."""
    for sweep in sweeps(device):
        done = rows.done(sweep.kernel)
        calls = [run for size in sizes for run in sweep.runs(*size)]
        candidates = sweep.candidates if few is None else sweep.candidates[:few]
        for candidate in dict.fromkeys((sweep.now, *candidates)):
            key = f"{sweep.row}: {shown(candidate)}"
            if key in done:
                continue
            row = {"row": sweep.row, "now": candidate == sweep.now}
            rows.write(sweep.kernel, key, row | timed(device, sweep, candidate, calls))
        device.tidy()


def shown(candidate: Any) -> str:
    """A candidate as it is written in the table."""
    return str(tuple(candidate) if isinstance(candidate, Config) else candidate)


def table(path: Path) -> Iterator[str]:
    """Of each row of the tables: the best candidate, and what stands there."""
    by_row: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read(path):
        if "ms" in row:
            by_row.setdefault((row["race"], row["row"]), []).append(row)
    for (kernel, _), found in by_row.items():
        best = min(found, key=lambda row: row["ms"])
        now = next((row for row in found if row["now"]), best)
        gain = now["ms"] / best["ms"]
        yield f"{kernel}, {best['key']}: {best['ms']:.4f} ms, {gain:.3f}x of {now['key']}"


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Of the rows.")
@click.option("--resume", is_flag=True, help="Keep the rows that are there.")
@click.option("--dry-run", "dry", is_flag=True, help="Two candidates each, tiny, on the CPU.")
def main(out: Path | None, resume: bool, dry: bool) -> None:
    """Time candidates, and say which are the fastest."""
    if not dry and not torch.cuda.is_available():
        raise click.UsageError("there is no CUDA GPU; --dry-run runs everything without one")
    if dry and os.environ.get("TRITON_INTERPRET") != "1":
        raise click.UsageError("--dry-run: expected TRITON_INTERPRET=1 in the environment")
    if out is None:
        out = Path(tempfile.gettempdir()) / RESULTS.name if dry else RESULTS
    if not resume:
        out.unlink(missing_ok=True)
    device = Device("cpu" if dry else "cuda")
    common = {"device": device.title, "commit": commit(), "versions": versions(PACKAGES)}
    with interpreted():
        search(device, Rows(out, common), DRY if dry else SIZES, 1 if dry else None)
    click.echo("\n".join(table(out)))
    click.echo(f"rows: {out}", err=True)


if __name__ == "__main__":
    main()
