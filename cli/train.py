"""`kvc train`: learns what a method needs to know of a model."""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvc.cli.artifact import error_lines
from kvc.cli.options import backend_option, check_target, dtype_option, model_option, read_share
from kvc.cli.progress import Bars
from kvc.cli.run import load
from kvc.cli.workers import Apart, count_gpus
from kvc.errors import ConfigError

if TYPE_CHECKING:
    from kvc.methods.less import Less, Policy


@click.group()
def train() -> None:
    """Learn what a method needs to know of a model."""


@train.command()
@model_option
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    required=True,
    help="What to train on, in UTF-8; may be given again.",
)
@click.option(
    "--policy",
    type=click.Choice(["h2o", "sink", "tova"]),
    default="h2o",
    show_default=True,
    help="What decides which tokens go.",
)
@click.option(
    "--budget",
    default="5%",
    show_default=True,
    help="Tokens that stay, or a share of --length.",
)
@click.option("--out", metavar="FILE.safetensors", default="less.safetensors", show_default=True)
@click.option("--force", is_flag=True, help="Write over a file that exists.")
@click.option("--layers", metavar="START:STOP", help="Train these alone, e.g. 0:8.")
@click.option("--map", "sharing", metavar="MAP", help="Of kvsharer, to train for kvsharer+less.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Of the state.")
@click.option("--hidden", type=click.IntRange(1), default=512, show_default=True, help="Of maps.")
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Of Adam; halved after each quarter of the epochs.",
)
@click.option("--batch", type=click.IntRange(1), default=2, show_default=True, help="Sequences.")
@click.option(
    "--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.3, show_default=True
)
@click.option("--sequences", type=click.IntRange(2), default=128, show_default=True)
@click.option(
    "--length",
    type=click.IntRange(4),
    help="Tokens of a sequence.  [default: 2048, or the context]",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes that share the layers.  [default: one for each GPU]",
)
@backend_option
@dtype_option
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def less(
    model: str | None,
    texts: tuple[str, ...],
    policy: Policy,
    budget: str,
    out: str,
    force: bool,
    layers: str | None,
    sharing: str | None,
    sequences: int,
    length: int | None,
    seed: int,
    workers: int | None,
    backend: str,
    dtype: str | None,
    quiet: bool,
    **recipe: Any,
) -> None:
    """Train LESS's kernels for a model: what remembers the tokens that a policy drops.

    Each layer is kept as soon as it is done: killed, the same command goes on where it was. A table
    of errors ends it: of the policy alone, with the tokens that the state's bytes would buy, and
    with the state.

    Example: kvc train less --text a_book.txt --policy h2o --budget 5%
    """
    from kvc.calibrate.less.loss import Recipe
    from kvc.calibrate.less.training import Plan, train_layers
    from kvc.calibrate.rows import read_rows
    from kvc.files import read_kernels
    from kvc.methods import KVSharer

    check_target("--out", out, (".safetensors",), force)
    span = _span(layers)
    n_gpus = count_gpus(backend)
    if workers is None:
        workers = 1 if sharing else n_gpus  # layers that share a cache learn together
    elif workers > 1 and sharing:
        raise ConfigError("--workers: expected one with --map: layers that share learn together")
    try:
        if workers > 1:
            apart = Apart(click.get_current_context(), span, workers, n_gpus)
            apart.train(Path(out), quiet)
        else:
            engine = load(backend, model, dtype, quiet)
            length = length or min(2048, engine.context_length or 2048)
            rule = _policy(policy, budget, length)
            parts = tuple(i for i in engine.shape.full_layers if i in range(*span))
            if not parts:
                raise ConfigError(
                    f"--layers: expected some of 0:{engine.shape.n_layers} that keep all tokens, "
                    f"got {layers!r}"
                )
            rows = read_rows(engine, texts, sequences, length, seed)
            of = KVSharer(sharing) if sharing else None
            plan = Plan(rule, Recipe(seed=seed, **recipe), rows, parts, of, model or "bundled")
            with Bars(recipe["epochs"], quiet) as bars:
                train_layers(engine, plan, Path(out), bars)
    except KeyboardInterrupt:
        click.echo(f"kvc: interrupted; the same command goes on from {out}.work", err=True)
        click.get_current_context().exit(130)
    config = read_kernels(out).config
    for layer, found in config["errors"].items():
        if found["less"] >= found["bare"]:
            click.echo(
                f"kvc: warning: layer {layer}: the state makes the policy worse; train longer, or "
                "on more text",
                err=True,
            )
    if not quiet:
        click.echo("\n".join(error_lines(config["errors"])), err=True)
        click.echo(f"use it with --method less --set less.kernels={out}", err=True)


@train.command()
@click.argument("parts", nargs=-1, required=True, metavar="FILE.safetensors...")
@click.option("--out", metavar="FILE.safetensors", default="less.safetensors", show_default=True)
@click.option("--force", is_flag=True, help="Write over a file that exists.")
def merge(parts: tuple[str, ...], out: str, force: bool) -> None:
    """Put kernels of different layers, trained with --layers, into one file.

    Example: kvc train merge first.safetensors second.safetensors --out less.safetensors
    """
    from kvc.calibrate.less.training import merge as put_together

    check_target("--out", out, (".safetensors",), force)
    put_together(parts, out)
    click.echo(f"written to {out}", err=True)


def _policy(policy: Policy, budget: str, length: int) -> Less:
    """The policy with its budget in tokens.

    Raises:
        ConfigError: If the budget is neither tokens nor a share of `length`, or below one token.
    """
    from kvc.methods import Less

    if budget.strip().isdecimal():
        tokens = int(budget)
    else:
        share = read_share("--budget", budget, "--length")
        tokens = int(Decimal(str(share)) * length)  # 0.29 of 100 is 29
    if tokens < 1:
        raise ConfigError(
            f"--budget: expected one token or more, got {budget} of {length} tokens; raise it"
        )
    return Less.of_budget(policy, tokens)


def _span(layers: str | None) -> tuple[int, int]:
    """`2:5` as a start and a stop, which may be far behind the last layer.

    Raises:
        ConfigError: If it is none.
    """
    if layers is None:
        return 0, sys.maxsize
    start, colon, stop = layers.partition(":")
    if not (colon and all(x.isdecimal() or not x for x in (start, stop))):
        raise ConfigError(f"--layers: expected START:STOP such as 0:8, got {layers!r}")
    return int(start or 0), int(stop) if stop else sys.maxsize
