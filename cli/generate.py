"""`kvc generate`: text to stdout, how fast and how small to stderr."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from click.core import ParameterSource

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
from kvc.errors import ConfigError


@click.command()
@click.argument("prompt", required=False)
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a file; - is stdin.")
@backend_option
@model_option
@method_option
@settings_option
@click.option(
    "--cache",
    "cache_file",
    metavar="FILE.kvc",
    help="Go on behind the text of a cache file, which stays as it is; its method is taken.",
)
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
    cache_file: str | None,
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
    from kvc.api import load_cache
    from kvc.methods import parse
    from kvc.text import split_start

    text = read_prompt(prompt, prompt_file)
    hush(quiet)
    given, held = read_settings(settings), 0
    if cache_file is None:
        parsed = parse(method, given)
    else:
        method, of_file = check_file(cache_file, given)
        dtype = dtype or of_file
    engine = load(backend, model, dtype, quiet)
    ids = encode(engine, text, chat if cache_file is None else bool(chat))
    if cache_file is None:
        cache = engine.make_cache(parsed, prefill, free=True, graph=graph)
    else:
        ids = split_start(engine, ids)[1]  # the text has begun in the file
        cache, tokens = load_cache(
            engine.model, cache_file, kernels=given.get("less.kernels"), free=True, graph=graph
        )
        held = len(tokens)
    limit = engine.context_length
    if limit is not None and held + len(ids) + max_tokens > limit:
        max_tokens = limit - held - len(ids)
        if held and max_tokens < 1:
            raise ConfigError(
                f"generate: {cache_file} has {held} tokens, the prompt {len(ids)} and the model's "
                f"context {limit}; shorten the prompt, or make a file of less text"
            )
        max_tokens = max(1, max_tokens)
        if not quiet:
            click.echo(f"kvc: the context of {limit} has room for {max_tokens} tokens", err=True)
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
        known = {"cache": cache_file, "cache_tokens": held} if cache_file else {}
        click.echo(json.dumps({"text": "".join(shown), **known, **asdict(stats)}))
    else:
        click.echo()
    if not quiet and not as_json:
        click.echo(stats.lines(), err=True)
        if cache_file:
            click.echo(f"file     {held} tokens in {cache_file}", err=True)
    if stats.interrupted:
        click.get_current_context().exit(130)


def check_file(path: str, settings: dict[str, str]) -> tuple[str, str]:
    """The method and the dtype of a cache file, before a model is loaded.

    Raises:
        CacheFileError: If it is damaged or there is none.
        ConfigError: If it holds several texts, or options say what the file does.
    """
    from kvc.saving import facts

    context = click.get_current_context()
    for name in ("method", "prefill"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ConfigError(f"generate: --cache {path} has its {name}; leave out --{name}")
    if others := [key for key in settings if key != "less.kernels"]:
        raise ConfigError(f"generate: --cache {path} has its settings; leave out --set {others[0]}")
    found = facts(path)
    if found["rows"] != 1:
        raise ConfigError(f"--cache {path}: expected one text, got {found['rows']} rows")
    return found["name"], found["dtype"]
