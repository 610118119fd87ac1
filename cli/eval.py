"""`kvc eval`: what methods cost a model in quality, against what they save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvc.cli.options import backend_option, check_target, dtype_option, model_option
from kvc.cli.prompt import read_settings
from kvc.cli.run import held_interrupts, load

if TYPE_CHECKING:
    from kvc.backends.base import Engine
    from kvc.measure.choice import Choice
    from kvc.measure.inputs import Inputs
    from kvc.measure.results import Results, Row


@click.command("eval")
@model_option
@click.option(
    "--method",
    "methods",
    metavar="METHOD",
    multiple=True,
    help="Presets joined by +, and settings behind them, as in 'gear bits=4'; may be given again. "
    "The full cache is always measured.  [default: all presets that the model takes]",
)
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter of all methods that have it, e.g. gear.bits=4; may be given again.",
)
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    help="What is read, in UTF-8; may be given again.  [default: a bundled text]",
)
@click.option(
    "--tasks",
    metavar="TASK,...",
    help="Of bytes, time, memory, ppl, kl, agree, recall, layers, answers, maps, drift; or all.  "
    "[default: bytes,ppl,kl,agree,recall,layers]",
)
@click.option(
    "--context",
    type=int,
    help="Tokens of a row.  [default: 2048, or as many as the model has room for]",
)
@click.option("--rows", type=click.IntRange(1), default=4, show_default=True, help="Rows of text.")
@click.option(
    "--length",
    type=int,
    help="Tokens that drift generates.  [default: 4096, or as many as the model has room for]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the choice of rows, of facts and of samples.",
)
@click.option(
    "--out", metavar="FILE.jsonl", help="Keep rows here as they are made; those there stay."
)
@click.option(
    "--report",
    metavar="FILE.html",
    help="Write a page that shows the rows, with those of --out that were there.",
)
@backend_option
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON lines, not the table.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def evaluate(
    model: str | None,
    methods: tuple[str, ...],
    settings: tuple[str, ...],
    texts: tuple[str, ...],
    tasks: str | None,
    context: int | None,
    rows: int,
    length: int | None,
    seed: int,
    out: str | None,
    report: str | None,
    backend: str,
    dtype: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure methods through the cache: bytes against quality.

    The context is read and compressed, then what follows is read token by token, or written.
    Killed, the same command with --out goes on where it was.

    Example: kvc eval --method gear --method 'gear bits=4' --tasks bytes,ppl,kl
    """
    from kvc.demo import path
    from kvc.measure.choice import read_choices
    from kvc.measure.evaluate import check, read_tasks
    from kvc.measure.inputs import Inputs, sizes_for
    from kvc.measure.results import results_file
    from kvc.measure.table import table
    from kvc.text import read_text

    wanted, common = read_tasks(tasks), read_settings(settings)
    choices = read_choices(methods, common) if methods else []
    paths = [Path(text) for text in texts] or [path() / "text.txt"]
    for each in paths:
        read_text(each)
    if report is not None:
        check_target("--report", report, (".html",), force=True)
    with results_file(Path(out) if out else None) as results:
        engine = load(backend, model, dtype, quiet)
        sizes = sizes_for(engine.context_length, context, rows, length, seed)
        choices = choices or _presets(engine, common, quiet)
        inputs = Inputs(engine, paths, sizes)
        check(inputs, choices, wanted)
        try:
            found = run(inputs, choices, wanted, results, model or "bundled", quiet)
        except KeyboardInterrupt:
            if out is None:
                raise
            click.echo(f"kvc: interrupted; the same command goes on from {out}", err=True)
            click.get_current_context().exit(130)
        if report is not None:
            from kvc.measure.report_page import write_report

            write_report([*results.rows.values()], Path(report))
    if as_json:
        for row in found:
            click.echo(json.dumps(row))
    else:
        click.echo(table(found))


def run(
    inputs: Inputs,
    choices: list[Choice],
    tasks: tuple[str, ...],
    results: Results,
    model: str,
    quiet: bool,
) -> list[Row]:
    """Evaluates, with a bar where stderr is a terminal.

    Raises:
        KeyboardInterrupt: Between two tokens; rows that are made are among the results.
    """
    from tqdm import tqdm

    from kvc.measure.evaluate import evaluate

    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    # disable=None: no bar where stderr is no terminal
    with (
        held_interrupts() as check,
        tqdm(total=1, bar_format=form, leave=False, disable=quiet or None) as bar,
    ):

        def show(what: str, done: float, total: int) -> None:
            bar.total = total
            bar.set_description_str(what, refresh=False)
            bar.update(done - bar.n)
            check()

        return evaluate(inputs, choices, tasks, results, model, show)


def _presets(engine: Engine, common: dict[str, str], quiet: bool) -> list[Choice]:
    """All that the model takes; says why others are left out."""
    from kvc.measure.choice import allowed_presets

    found, left_out = allowed_presets(engine, common)
    for name, why in left_out.items() if not quiet else ():
        click.echo(f"kvc: {name} is left out: {why}", err=True)
    return found
