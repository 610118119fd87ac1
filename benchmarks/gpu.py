"""All races on a GPU: correctness, kernels, decode steps, memory, encoding, growth, generation.

`python -m benchmarks.gpu` runs the tests that need a GPU and then every race, in less than nine
minutes; each row goes to `benchmarks/results/gpu.jsonl` as soon as it is measured. `--table` makes
`gpu.md` beside it from the rows. Whatever is missing, a kernel, a peer's package or memory, becomes
a row that says so. `--dry-run` does all of it at tiny sizes on the CPU, with TRITON_INTERPRET=1 in
the environment by the kernels, in Triton's interpreter.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import click

from benchmarks.races.plan import RACES, SECONDS, Options, run_all
from benchmarks.races.rows import PACKAGES, read
from benchmarks.races.table import tables
from kvc.measure.provenance import commit, versions

RESULTS = Path(__file__).with_name("results")


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file of the rows; by default benchmarks/results/gpu.jsonl, or a temporary one.",
)
@click.option(
    "--only", multiple=True, type=click.Choice([race.name for race in RACES]), help="These races."
)
@click.option("--resume", is_flag=True, help="Keep the rows that are there, and add the others.")
@click.option("--seconds", default=SECONDS, show_default=True, help="For all races together.")
@click.option(
    "--mode",
    type=click.Choice(["fused", "reference"]),
    help="Kernels, or definitions alone; fused unless a dry run does without the interpreter.",
)
@click.option("--dry-run", "dry", is_flag=True, help="Tiny sizes, on the CPU.")
@click.option("--table", "only_table", is_flag=True, help="Only make the table, of rows there are.")
def main(
    out: Path | None,
    only: tuple[str, ...],
    resume: bool,
    seconds: float,
    mode: str | None,
    dry: bool,
    only_table: bool,
) -> None:
    """Race, and write rows and tables."""
    if out is None:
        out = (Path(tempfile.gettempdir()) if dry else RESULTS) / "gpu.jsonl"
    if not only_table:
        no_kernels = dry and os.environ.get("TRITON_INTERPRET") != "1"
        race(out, only, resume, seconds, mode or ("reference" if no_kernels else "fused"), dry)
    rows = list(read(out))
    if not rows:
        raise click.UsageError(f"expected rows in {out}, found none; run the races first")
    text = tables(rows)
    if only_table:
        out.with_suffix(".md").write_text(text, encoding="utf-8")
    click.echo(text)
    click.echo(f"rows: {out}", err=True)


def race(
    out: Path, only: tuple[str, ...], resume: bool, seconds: float, mode: str, dry: bool
) -> None:
    """All rows, in a new file unless the run goes on with an old one."""
    import torch

    from benchmarks.races.lab import interpreted

    if not dry and not torch.cuda.is_available():
        raise click.UsageError("there is no CUDA GPU; --dry-run runs everything without one")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        out.unlink(missing_ok=True)
    common = {
        "commit": commit(),
        "versions": versions(PACKAGES) | {"cuda": torch.version.cuda},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "dry": dry,
    }
    with interpreted():
        run_all(only, Options(out, dry, mode, common), seconds)


if __name__ == "__main__":
    main()
