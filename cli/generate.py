"""`kvc generate`: text to stdout, how fast and how small to stderr."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from kvc.cli.options import (
    backend_option,
    dtype_option,
    method_option,
    model_option,
    prefill_option,
    prefill_step_option,
    seed_option,
    settings_option,
    temp_option,
    top_p_option,
)
from kvc.cli.prompt import encode, read_prompt, read_settings
from kvc.cli.run import Stats, hush, load, run


@click.command()
@click.argument("prompt", required=False)
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a file; - is stdin.")
@backend_option
@model_option
@method_option
@settings_option
@prefill_option
@prefill_step_option
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@temp_option
@top_p_option
@seed_option
@click.option(
    "--chat/--raw",
    default=None,
    help="With the model's chat template or without.  [default: with, if it has one]",
)
@click.option("--graph", is_flag=True, help="Replay steps as a CUDA graph, on a GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, text included.")
@click.option("--quiet", is_flag=True, help="No progress and no statistics on stderr.")
@dtype_option
def generate(
    prompt: str | None,
    prompt_file: str | None,
    backend: str,
    model: str | None,
    method: str,
    settings: tuple[str, ...],
    prefill: str,
    prefill_step: int,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int | None,
    chat: bool | None,
    graph: bool,
    as_json: bool,
    quiet: bool,
    dtype: str | None,
) -> None:
    """Continue PROMPT with a compressed cache.

    Example: kvc generate "It was a dark night" --method gear --set bits=4
    """
    from kvc.methods import parse

    text = read_prompt(prompt, prompt_file)
    hush(quiet)
    parsed = parse(method, read_settings(settings))
    engine = load(backend, model, dtype, quiet)
    ids = encode(engine, text, chat)
    limit = engine.context_length
    if limit is not None and len(ids) + max_tokens > limit:
        max_tokens = max(1, limit - len(ids))
        if not quiet:
            click.echo(f"kvc: the context of {limit} has room for {max_tokens} tokens", err=True)
    cache = engine.make_cache(parsed, prefill, free=True, graph=graph)
    stats = Stats(engine.name, method, len(ids))
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if not as_json:
            click.echo(piece, nl=False)

    sampling = {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed}
    run(engine, ids, cache, stats, show, quiet, prefill_step=prefill_step, **sampling)
    stats.measure(engine, cache)
    if as_json:
        click.echo(json.dumps({"text": "".join(shown), **asdict(stats)}))
    else:
        click.echo()
    if not quiet and not as_json:
        click.echo(stats.lines(), err=True)
    if stats.interrupted:
        click.get_current_context().exit(130)
