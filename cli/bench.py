"""`kvc bench`: compressed caches against the library's own, in one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvc.cli.options import backend_option, dtype_option, model_option
from kvc.cli.run import held_interrupts, load
from kvc.errors import ConfigError

if TYPE_CHECKING:
    from kvc.measure.speed.race import Point, Race

WHAT = ("attention", "generate", "encode", "memory")
METHODS = "none,kivi,gear-l,gear,gear2"
CONTEXTS = {"attention": "1k,8k", "generate": "512,2k", "encode": "2k", "memory": "2k"}
PREFILLS = {"generate": ("exact",), "memory": ("exact", "stream")}


@click.command()
@click.argument("what", type=click.Choice(WHAT))
@model_option
@click.option(
    "--methods",
    default=METHODS,
    show_default=True,
    help="Joined by commas, settings behind each: 'gear bits=4,kivi'.",
)
@click.option(
    "--contexts", metavar="N,N", help="Tokens, as in 512,8k.  [default: what takes a minute]"
)
@click.option("--batch", "batches", metavar="N,N", default="1", show_default=True, help="Rows.")
@backend_option
@click.option(
    "--mode",
    "wish",
    type=click.Choice(["fused", "reference"]),
    help="Kernels or definitions.  [default: kernels for methods all of whose ops have one]",
)
@click.option(
    "--prefill",
    type=click.Choice(["exact", "stream"]),
    help="Of generate and memory.  [default: exact; memory takes both]",
)
@click.option("--out", metavar="FILE.jsonl", help="Adds rows here, and measures none twice.")
@click.option("--repeat", type=click.IntRange(1), help="Rounds in which all take turns.")
@click.option("--json", "as_json", is_flag=True, help="Print rows, as JSON lines.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@dtype_option
def bench(
    what: Any,
    model: str | None,
    methods: str,
    contexts: str | None,
    batches: str,
    backend: str,
    wish: str | None,
    prefill: str | None,
    out: str | None,
    repeat: int | None,
    as_json: bool,
    quiet: bool,
    dtype: str | None,
) -> None:
    """Race methods against the dense and the quantized caches of the library that runs the model.

    attention is one layer's, of one query in each row; generate is the library's own loop, told
    the same tokens; encode is compressing a prompt and a block, beside the prefill; memory is the
    peak above the weights.

    Example: kvc bench attention --methods "gear bits=4,kivi" --contexts 1k,32k
    """
    from kvc.demo import path
    from kvc.measure.choice import read_choice
    from kvc.measure.results import results_file
    from kvc.measure.speed.bench import Bench
    from kvc.measure.speed.race import REPEAT, Point, Race

    if prefill and what not in ("generate", "memory"):
        raise ConfigError(f"--prefill: expected none, {what} takes prompts as they are")
    choices = [read_choice(text) for text in methods.split(",") if text.strip()]
    labels = [choice.label for choice in choices]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"--methods: {twice[0]} is given twice")
    lengths = [_number("--contexts", text) for text in (contexts or CONTEXTS[what]).split(",")]
    rows = [_number("--batch", text) for text in batches.split(",")]
    if least := [n for n in lengths if n < 16]:
        raise ConfigError(f"--contexts: expected at least 16 tokens, got {least[0]}")
    with results_file(Path(out) if out else None) as results:
        engine = load(backend, model, dtype, quiet)
        most = _most_tokens(what, engine.context_length)
        if contexts is None:
            lengths = [min(n, most) for n in lengths]
        elif longest := [n for n in lengths if n > most]:
            raise ConfigError(
                f"--contexts: expected at most {most} tokens, for which the model has room, got "
                f"{longest[0]}"
            )
        kinds = (prefill,) if prefill else PREFILLS.get(what, ("",))
        sizes = dict.fromkeys((b, n) for b in rows for n in lengths)
        points = [Point(b, n, kind) for kind in kinds for b, n in sizes]
        race = Race(
            what, Bench(engine, wish or ""), model or "bundled", model or str(path()), dtype,
            choices, points, repeat or REPEAT[what],
        )  # fmt: skip
        try:
            _show(race, points, results, as_json, quiet)
        except KeyboardInterrupt:
            kept = f"; the same command goes on from {out}" if out else ""
            click.echo(f"kvc: interrupted{kept}", err=True)
            click.get_current_context().exit(130)
    if out and not quiet:
        click.echo(f"rows: {out}", err=True)


def _show(race: Race, points: Sequence[Point], results: Any, as_json: bool, quiet: bool) -> None:
    """Prints rows or tables as points are done; Ctrl-C keeps those."""
    from tqdm import tqdm

    from kvc.measure.speed.table import note, table

    total = len(points) * len(race.arms)
    # disable=None: no bar where stderr is no terminal
    bar = tqdm(total=total, desc=race.what, unit="arm", leave=False, disable=quiet or None)

    def done() -> None:
        bar.update(1)

    with held_interrupts() as check, bar:
        for n, rows in enumerate(race.run(results, check, done), 1):
            bar.update(n * len(race.arms) - bar.n)  # those that were there already
            with tqdm.external_write_mode():
                for line in map(json.dumps, rows) if as_json else [table(rows), ""]:
                    click.echo(line)
    if not as_json:
        click.echo(note(race.what))


def _number(option: str, text: str) -> int:
    """A number of tokens or rows, as in 512 or 8k.

    Raises:
        ConfigError: If it is none.
    """
    word = text.strip().lower()
    digits = word.removesuffix("k")
    if not digits.isdecimal() or not int(digits):
        raise ConfigError(f"{option}: expected numbers such as 512 or 8k, got {text!r}")
    return int(digits) * (1024 if word.endswith("k") else 1)


def _most_tokens(what: str, limit: int | None) -> int:
    """Tokens of a prompt for which a model has room beside what follows them."""
    from kvc.measure.speed import generate, memory

    if what == "attention" or limit is None:  # a layer alone has no end
        return sys.maxsize
    return limit - {"generate": generate.NEW, "memory": memory.NEW}.get(what, 0)
