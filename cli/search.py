"""`kvc search`: looks for what a method needs to know of a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from kvc.cli.options import (
    backend_option,
    check_target,
    dtype_option,
    model_option,
    read_share,
)
from kvc.cli.prompt import read_settings
from kvc.cli.run import held_interrupts, load
from kvc.errors import ConfigError


@click.group()
def search() -> None:
    """Search for what a method needs to know of a model."""


@search.command()
@model_option
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    required=True,
    help="Where the sentences come from, in UTF-8; may be given again.",
)
@click.option("--share", required=True, help="Of the layers, e.g. 25% or 0.25.")
@click.option(
    "--out", metavar="FILE.json", default="kvsharer.json", show_default=True, help="The map."
)
@click.option("--force", is_flag=True, help="Write over files that exist.")
@click.option(
    "--threshold",
    type=float,
    default=0.5,
    show_default=True,
    help="A pair is accepted if the last states' cosine is above it.",
)
@click.option(
    "--distance",
    type=click.Choice(["positionwise", "flat", "normalized"]),
    default="positionwise",
    show_default=True,
    help="Of two layers' keys and values.",
)
@click.option(
    "--similarity",
    type=click.Choice(["per_sentence", "mean_repr"]),
    default="per_sentence",
    show_default=True,
    help="The cosine of each sentence's states, or of their mean's.",
)
@click.option(
    "--order",
    type=click.Choice(["dissimilar", "similar", "random"]),
    default="dissimilar",
    show_default=True,
    help="Which pairs are tried first.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the choice of sentences, and of a random order.",
)
@click.option(
    "--with", "with_method", metavar="METHOD", help="Compress what is shared while trying pairs."
)
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter of that method, e.g. gear.bits=4; may be given again.",
)
@click.option("--sentences", type=click.IntRange(1), default=30, show_default=True)
@click.option(
    "--length", type=click.IntRange(4), default=64, show_default=True, help="Tokens of a sentence."
)
@backend_option
@dtype_option
@click.option(
    "--plot",
    metavar="FILE.png|FILE.svg",
    help="Draw the layers' distances, with the chosen pairs marked.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress and no pairs on stderr.")
def kvsharer(
    model: str | None,
    texts: tuple[str, ...],
    share: str,
    out: str,
    force: bool,
    with_method: str | None,
    settings: tuple[str, ...],
    sentences: int,
    length: int,
    backend: str,
    dtype: str | None,
    plot: str | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Search for a map of layers that read other layers' caches.

    Prints the map as `--set kvsharer.map=` takes it, and writes it to a file. Killed, the same
    command goes on where it was.

    Example: kvc search kvsharer --text a_book.txt --share 25%
    """
    from kvc.calibrate.kvsharer.search import Search, Settings
    from kvc.calibrate.rows import read_rows
    from kvc.methods import KVSharer, method_of, parse

    method = None
    if with_method is not None:
        method = parse(with_method, read_settings(settings))
        if not method.parts:
            raise ConfigError(f"--with: expected a method that compresses, got {with_method!r}")
        method_of(KVSharer("0:0")) + method  # what cannot go with a map is refused
    elif settings:
        raise ConfigError("--set: says how --with METHOD compresses, got no --with")
    wanted = Settings(read_share("--share", share, "the layers"), method=method, **choices)
    check_target("--out", out, (".json",), force)
    if plot is not None:
        from kvc.measure.plots import check_matplotlib

        check_target("--plot", plot, (".png", ".svg"), force)
        check_matplotlib()
    engine = load(backend, model, dtype, quiet)
    rows = read_rows(engine, texts, sentences, length, wanted.seed)
    found = Search(engine, rows, wanted, model or "bundled")
    checkpoint = Path(f"{out}.part")
    if found.resume(checkpoint) and not quiet:
        click.echo(f"kvc: going on from {checkpoint}: {len(found.tried)} pairs are tried", err=True)
    try:
        run(found, checkpoint, quiet)
    except KeyboardInterrupt:
        if not checkpoint.exists():
            raise
        click.echo(f"kvc: interrupted; the same command goes on from {checkpoint}", err=True)
        click.get_current_context().exit(130)
    found.write(out, f"searched on {', '.join(Path(text).name for text in texts)}", checkpoint)
    n = len(found.accepted)
    if n < found.count:
        click.echo(
            f"kvc: warning: only {n} of {found.count} layers share: no other pair of "
            f"{len(found.ranked)} is above the threshold {wanted.threshold:g}",
            err=True,
        )
    if plot is not None:
        from kvc.measure.plots import draw_distances

        draw_distances(plot, found)
    if as_json:
        click.echo(json.dumps({**result(found), "out": out, "plot": plot}))
        return
    click.echo(found.text)
    if not quiet:
        total = len(found.numbers)
        click.echo(f"{n} of {total} layers read another's cache; written to {out}", err=True)


def run(found: Any, checkpoint: Path, quiet: bool) -> None:
    """Searches, with a bar where stderr is a terminal, and a line for every pair.

    Raises:
        KeyboardInterrupt: After the pair in hand; what was tried is in the checkpoint.
    """
    from tqdm import tqdm

    with held_interrupts() as check:
        bar = {"leave": False, "disable": quiet or None}  # None: no bar where stderr is no terminal
        with tqdm(total=len(found.rows.ids), desc="full model", unit="sentence", **bar) as shown:

            def on_rows(n: int) -> None:
                shown.update(n)
                check()

            found.prepare(on_rows)
        with tqdm(total=found.count, desc="sharing", unit="layer", **bar) as shown:
            for n, tried in enumerate(found.run(checkpoint), 1):
                if not quiet:
                    verdict = "accepted" if tried.accepted else "rejected"
                    pair = f"{tried.layer}:{tried.owner}"
                    shown.write(
                        f"{verdict}  {pair:<6}  distance {tried.distance:<8g}  "
                        f"similarity {tried.similarity:.6f}",
                        file=sys.stderr,
                    )
                shown.update(int(tried.accepted))
                shown.set_postfix_str(f"{n} tried")
                check()


def result(found: Any) -> dict[str, Any]:
    """What was found, for a program."""
    return {
        "map": found.text,
        "owners": found.owners,
        "complete": len(found.accepted) == found.count,
        "tried": [tried._asdict() for tried in found.tried],
        "fingerprint": found.shape.fingerprint,
        "calibration": found.rows.digest,
        "config": found.config,
    }
