"""`kvc serve`: an OpenAI-compatible server over compressed caches."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import click

from kvc.cli.options import (
    backend_option,
    chat_template_option,
    dtype_option,
    method_option,
    model_option,
    prefill_option,
    prefill_step_option,
    settings_option,
)
from kvc.cli.prompt import read_settings
from kvc.cli.run import hush, load
from kvc.errors import ConfigError

NEEDS = ("starlette", "uvicorn", "pydantic", "prometheus_client")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_size(option: str, text: str) -> int:
    """Bytes, as 2GB or 512MiB or a number.

    Raises:
        ConfigError: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    if not found:
        raise ConfigError(f"{option}: expected a size such as 2GB or 512MiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: a free one."
)
@backend_option
@model_option
@click.option("--name", help="What requests call the model.  [default: as --model]")
@method_option
@settings_option
@prefill_option
@prefill_step_option
@click.option(
    "--max-batch", type=click.IntRange(1), default=8, show_default=True, help="Answers at a time."
)
@click.option(
    "--queue",
    "max_waiting",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Requests that may wait; more of them are answered 429.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Of a chat's answer, where the request does not say.",
)
@click.option(
    "--prefix-cache",
    metavar="SIZE",
    default="2GB",
    show_default=True,
    help="Memory for the caches of what prompts began with; 0 keeps none.",
)
@click.option(
    "--cache-dir", metavar="DIR", help="Where those go that have no room, and all at the end."
)
@click.option(
    "--cache-dir-size", metavar="SIZE", default="20GB", show_default=True, help="Room there."
)
@chat_template_option
@click.option("--api-key", envvar="KVC_API_KEY", help="What clients must show.  [or: $KVC_API_KEY]")
@click.option(
    "--max-body", metavar="SIZE", default="8MB", show_default=True, help="Of a request, at most."
)
@click.option(
    "--shutdown-timeout",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds that answers have to end after SIGTERM or Ctrl-C.",
)
@click.option("--quiet", is_flag=True, help="Warnings and errors only.")
@dtype_option
def serve(
    host: str,
    port: int,
    backend: str,
    model: str | None,
    name: str | None,
    method: str,
    settings: tuple[str, ...],
    prefill: str,
    prefill_step: int,
    max_batch: int,
    max_waiting: int,
    max_tokens: int,
    prefix_cache: str,
    cache_dir: str | None,
    cache_dir_size: str,
    chat_template: str | None,
    api_key: str | None,
    max_body: str,
    shutdown_timeout: int,
    quiet: bool,
    dtype: str | None,
) -> None:
    """Serve a model with a compressed cache, as OpenAI's API does.

    Answers /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics and
    /openapi.json. Prompts that begin alike are read once. SIGTERM or Ctrl-C lets answers end, and
    keeps the caches of prompts in --cache-dir; a second one ends at once.

    Example: kvc serve --method gear --port 8080 --prefix-cache 2GB --cache-dir caches
    """
    if missing := [module for module in NEEDS if not find_spec(module)]:
        raise ConfigError(
            f"serve: {missing[0]} is not installed; python3 -m pip install 'kvc[serve]'"
        )
    from kvc.demo import path
    from kvc.methods import parse
    from kvc.serve.app import Server, Settings
    from kvc.serve.folder import Folder
    from kvc.serve.metrics import Metrics
    from kvc.serve.model import Served
    from kvc.serve.prefixes import Prefixes
    from kvc.serve.prompts import Reader
    from kvc.serve.run import address, bind, is_loopback, run
    from kvc.serve.worker import Worker
    from kvc.text import read_text

    parsed = parse(method, read_settings(settings))
    budget = read_size("--prefix-cache", prefix_cache)
    shelf_budget = read_size("--cache-dir-size", cache_dir_size)
    body = read_size("--max-body", max_body)
    template = read_text(chat_template, "--chat-template") if chat_template else None
    folder = Path(cache_dir) if cache_dir else None
    hush(quiet)
    with bind(host, port) as bound:

        def load_model() -> Served:
            engine = load(backend, model, dtype, quiet)
            if template is not None:
                engine.chat_template = template
            served = Served(engine, parsed, prefill, prefill_step, max_batch)
            if budget:
                source = model if model is not None else str(path())
                shelf = Folder(folder, engine, parsed, source) if folder else None
                served.prefixes = Prefixes(served.size, budget, shelf, shelf_budget)
            return served

        metrics = Metrics()
        worker = Worker(load_model, max_waiting, metrics)
        served = worker.start()
        limits = Settings(
            name or model or "bundled", served.engine.context_length, max_tokens, body, api_key
        )
        server = Server(worker, Reader(served.engine), limits, metrics)
        bound.listen()
        if api_key is None and not is_loopback(bound):
            click.echo(f"kvc: whoever reaches {host} may ask; --api-key says who", err=True)
        if not quiet:
            click.echo(
                f"kvc: {limits.name} with {method} on {served.engine.name}, at {address(bound)}/v1",
                err=True,
            )
        run(server.app(), bound, shutdown_timeout, quiet)
