"""`kvc train`: learns what a method needs to know of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvc.cli.artifact import error_lines
from kvc.cli.options import backend_option, check_target, dtype_option, model_option, read_share
from kvc.cli.progress import Bars
from kvc.cli.run import load
from kvc.errors import ConfigError

if TYPE_CHECKING:
    from kvc.methods import Less

SINKS = 4  # first tokens that sink + recent keeps


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
    policy: str,
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
    from kvc.calibrate.capture import layers_of
    from kvc.calibrate.less import Recipe
    from kvc.calibrate.rows import read_rows
    from kvc.calibrate.training import Plan, check_budget
    from kvc.calibrate.training import train as run
    from kvc.files import read_kernels
    from kvc.methods import KVSharer

    check_target("--out", out, (".safetensors",), force)
    span = _span(layers)
    if workers is None:
        workers = _n_gpus(backend)
    if workers > 1:
        _apart(click.get_current_context(), span, workers, Path(out), quiet)
    else:
        engine = load(backend, model, dtype, quiet)
        length = length or min(2048, engine.context_length or 2048)
        parts = layers_of(engine.shape, *span)
        if not parts:
            raise ConfigError(
                f"--layers: expected some of 0:{engine.shape.n_layers}, got {layers!r}"
            )
        rule = _policy(policy, budget, length)
        check_budget(rule, length)
        rows = read_rows(engine, texts, sequences, length, seed)
        plan = Plan(
            rule,
            Recipe(seed=seed, **recipe),
            rows,
            parts,
            KVSharer(sharing) if sharing else None,
            model or "bundled",
        )
        with Bars(len(parts), recipe["epochs"], quiet) as bars:
            try:
                run(engine, plan, Path(out), bars)
            except KeyboardInterrupt:
                click.echo(f"kvc: interrupted; the same command goes on from {out}.work", err=True)
                click.get_current_context().exit(130)
    if not quiet:
        lines = error_lines(read_kernels(out).config["errors"])
        click.echo("\n".join([*lines, f"written to {out}"]), err=True)


@train.command()
@click.argument("parts", nargs=-1, required=True, metavar="FILE.safetensors...")
@click.option("--out", metavar="FILE.safetensors", default="less.safetensors", show_default=True)
@click.option("--force", is_flag=True, help="Write over a file that exists.")
def merge(parts: tuple[str, ...], out: str, force: bool) -> None:
    """Put kernels of different layers, trained with --layers, into one file.

    Example: kvc train merge first.safetensors second.safetensors --out less.safetensors
    """
    from kvc.calibrate.training import merge as put_together

    check_target("--out", out, (".safetensors",), force)
    put_together(parts, out)
    click.echo(f"written to {out}", err=True)


def _policy(policy: str, budget: str, length: int) -> Less:
    """The policy with its budget in tokens, split as the paper does.

    Raises:
        ConfigError: If the budget is neither tokens nor a share of `length`.
    """
    from kvc.methods import Less

    if budget.strip().isdecimal():
        c = int(budget)
    else:
        c = int(read_share("--budget", budget, "--length") * length)
    if c < 1:
        raise ConfigError(
            f"--budget: expected one token or more, got {budget} of {length} tokens; raise it"
        )
    if policy == "h2o":
        return Less("h2o", heavy=c // 2, recent=c - c // 2)
    if policy == "sink":
        return Less("sink", heavy=min(SINKS, c // 2), recent=c - min(SINKS, c // 2))
    return Less("tova", heavy=c, recent=0)


def _span(layers: str | None) -> tuple[int, int | None]:
    """`2:5` as a start and a stop.

    Raises:
        ConfigError: If it is none.
    """
    if layers is None:
        return 0, None
    start, colon, stop = layers.partition(":")
    if not (colon and all(x.isdecimal() or not x for x in (start, stop))):
        raise ConfigError(f"--layers: expected START:STOP such as 0:8, got {layers!r}")
    return int(start or 0), int(stop) if stop else None


def _n_gpus(backend: str) -> int:
    """How many GPUs there are for a backend; 1 where it uses none."""
    from importlib import import_module

    from kvc.api import best_backend

    if (best_backend() if backend == "auto" else backend) != "cuda":
        return 1
    return max(1, import_module("torch").cuda.device_count())


def _apart(
    ctx: click.Context, span: tuple[int, int | None], workers: int, out: Path, quiet: bool
) -> None:
    """Trains ranges of layers in processes of their own.

    Raises:
        ConfigError: If layers share caches: an owner and its sharers learn together.
        BackendError: If one of them fails.
    """
    from importlib import import_module

    from tqdm import tqdm

    from kvc.calibrate.spread import ranges, train_apart
    from kvc.demo import path

    if ctx.params["sharing"]:
        raise ConfigError("--workers: expected one with --map: layers that share learn together")
    auto = import_module("transformers").AutoConfig
    config = auto.from_pretrained(ctx.params["model"] or str(path()))
    n_layers = config.get_text_config(decoder=True).num_hidden_layers
    parts = ranges(n_layers, span[0], span[1] or n_layers, workers)
    devices = []
    if _n_gpus(ctx.params["backend"]) > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = seen.split(",") if seen else [str(i) for i in range(workers)]
    total = sum(b - a for a, b in parts)
    with tqdm(
        total=total, desc="training", unit="layer", leave=False, disable=quiet or None
    ) as bar:
        train_apart(_arguments(ctx), parts, devices, out, lambda done: bar.update(done - bar.n))


def _arguments(ctx: click.Context) -> list[str]:
    """The command's options as they were given, but for what each process has of its own."""
    given = []
    for option in ctx.command.params:
        value = ctx.params[str(option.name)]
        if value is None or option.name in ("layers", "out", "force", "workers", "quiet"):
            continue
        for item in value if option.multiple else (value,):
            given += [option.opts[0], str(item)]
    return given
