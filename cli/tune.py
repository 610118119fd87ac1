"""`kvc tune`: the method and the bits that suit one model, under a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvc.cli.options import backend_option, check_target, dtype_option, model_option, read_share
from kvc.cli.run import held_interrupts, in_units, load
from kvc.errors import ConfigError

if TYPE_CHECKING:
    from kvc.calibrate.rows import Rows
    from kvc.calibrate.tune.run import Goal, Tuned
    from kvc.calibrate.tune.search import Search

CONTEXT = 2048  # tokens, unless others are asked for


@click.command()
@model_option
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    required=True,
    help="What quality is measured on, in UTF-8; may be given again.",
)
@click.option("--memory", metavar="SHARE", help="Of the dense cache's bytes at most, e.g. 25%.")
@click.option(
    "--max-ppl-increase",
    metavar="SHARE",
    help="Of perplexity at most, e.g. 1%; the fewest bytes are searched.",
)
@click.option(
    "--context",
    type=int,
    help="Tokens at which bytes are measured.  [default: 2048, or as many as the model has room "
    "for]",
)
@click.option(
    "--methods",
    metavar="PRESET,...",
    help="Presets that may be used.  [default: all that keep every token]",
)
@click.option("--rows", type=click.IntRange(1), default=4, show_default=True, help="Rows of text.")
@click.option(
    "--length", type=int, help="Tokens of a row.  [default: those of the context, up to 2048]"
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the choice of rows.",
)
@click.option("--out", metavar="FILE.json", default="profile.json", show_default=True)
@click.option("--force", is_flag=True, help="Write over files that exist.")
@click.option("--plot", metavar="FILE.png|FILE.svg", help="Draw bytes against divergence.")
@backend_option
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def tune(
    model: str | None,
    texts: tuple[str, ...],
    memory: str | None,
    max_ppl_increase: str | None,
    context: int | None,
    methods: str | None,
    rows: int,
    length: int | None,
    seed: int,
    out: str,
    force: bool,
    plot: str | None,
    backend: str,
    dtype: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find the method that loses least at so many bytes, or has the fewest bytes at such a loss.

    Kinds of codes, what is kept exact, and bits of each layer's keys and values are searched on
    calibration text. What is found is a profile, which --method @profile.json takes. Killed, the
    same command goes on where it was.

    Example: kvc tune --text a_book.txt --memory 25%
    """
    from kvc.calibrate.rows import read_rows
    from kvc.calibrate.tune.run import Goal
    from kvc.calibrate.tune.search import Search
    from kvc.calibrate.tune.space import read_methods
    from kvc.text import read_text

    goal = Goal(
        read_share("--memory", memory, "the dense cache") if memory else None,
        read_share("--max-ppl-increase", max_ppl_increase, "the perplexity")
        if max_ppl_increase
        else None,
    )
    presets = read_methods(methods)
    check_target("--out", out, (".json",), force)
    if plot is not None:
        from kvc.measure.plots import check_matplotlib

        check_target("--plot", plot, (".png", ".svg"), force)
        check_matplotlib()
    for text in texts:
        read_text(text)
    engine = load(backend, model, dtype, quiet)
    context = room(context, engine.context_length)
    length = min(context, CONTEXT) if length is None else length
    pieces = read_rows(engine, texts, rows, length, seed)
    search = Search(engine, pieces, context, presets)
    if goal.memory is not None:
        search.check(goal.memory * search.sizes.dense)
    try:
        found = run(search, pieces, goal, out, model or "bundled", seed, quiet)
    except KeyboardInterrupt:
        click.echo(f"kvc: interrupted; the same command goes on from {out}.work", err=True)
        click.get_current_context().exit(130)
    if plot is not None:
        from kvc.calibrate.tune.plot import draw_front

        draw_front(plot, found)
    if as_json:
        click.echo(json.dumps(facts(found, out)))
    else:
        show(found, out)


def room(context: int | None, limit: int | None) -> int:
    """Tokens that bytes are measured at.

    Raises:
        ConfigError: If the model has no room for what was asked for.
    """
    if context is None:
        return min(CONTEXT, limit or CONTEXT)
    if context < 64 or (limit is not None and context > limit):
        wanted = "at least 64" if limit is None else f"64 to {limit}"
        raise ConfigError(f"--context: expected {wanted} tokens, got {context}")
    return context


def run(
    search: Search, rows: Rows, goal: Goal, out: str, model: str, seed: int, quiet: bool
) -> Tuned:
    """Tunes and writes the profile, with a bar where stderr is a terminal.

    Raises:
        KeyboardInterrupt: Between two pieces of text; what was measured is kept beside `out`.
    """
    from tqdm import tqdm

    from kvc.calibrate.tune.run import tune
    from kvc.calibrate.work import work_folder
    from kvc.files import write_profile
    from kvc.measure.results import results_file

    shape = search.shape
    claim = {
        "model": model,
        "layers": shape.fingerprint,
        "backend": search.engine.name,
        "dtype_bytes": shape.dtype_bytes,
        "text": rows.digest,
    }
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with (
        work_folder(Path(out), claim) as work,
        results_file(work / "scores.jsonl") as results,
        held_interrupts() as check,
        # disable=None: no bar where stderr is no terminal
        tqdm(total=1, bar_format=form, leave=False, disable=quiet or None) as bar,
    ):

        def show(what: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description_str(what[:60], refresh=False)
            bar.update(done - bar.n)
            check()

        search.quality.results, search.on_progress = results, show
        found = tune(search, rows, goal, model, seed)
        write_profile(out, found.profile)
    return found


def facts(found: Tuned, out: str) -> dict[str, Any]:
    """What was found, for a program."""
    fit = found.fit
    return {
        "out": out,
        "label": found.best.choice.label,
        "fit": {**fit._asdict(), "needed": fit.needed, "fits": fit.fits},
        **{k: v for k, v in found.profile._asdict().items() if k != "version"},
    }


def show(found: Tuned, out: str) -> None:
    """The same for a reader."""
    from kvc.cli.profile import fit_line, front_lines, measured_rows

    profile = found.profile
    click.echo(f"{'method':<12}{found.best.choice.label}")
    for key, text in measured_rows(profile.measured).items():
        click.echo(f"{key:<12}{text}")
    click.echo(f"{'memory':<12}{fit_line(found.fit, profile.measured['context'])}")
    click.echo("\n" + "\n".join(front_lines(profile.front)))
    click.echo(f"\nwritten to {out}; take it with --method @{out}")
    budget = profile.config.get("memory")
    if budget is not None and profile.measured["share"] < 0.9 * budget:
        size = in_units(budget * profile.measured["dense_bytes"])
        click.echo(f"kvc: no method that was tried gains by more of the {size}", err=True)
