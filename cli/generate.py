"""`kvc generate`: text to stdout, how fast and how small to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from kvc.errors import ConfigError

if TYPE_CHECKING:
    from kvc.backends.base import Engine, Piece

PREFILL_STEP = 512  # tokens; short enough for the progress bar to move on a CPU


@dataclass(slots=True)
class Stats:
    """What a run did. A speed is None where there was too little to measure."""

    backend: str
    method: str
    prompt_tokens: int
    tokens: int = 0
    prefill_tokens_per_s: float | None = None  # up to the first new token
    decode_tokens_per_s: float | None = None  # after it
    cache_bytes: int = 0
    dense_bytes: int = 0
    ratio: float = 1.0
    peak_bytes: int = 0
    interrupted: bool = False

    def lines(self) -> str:
        """For a reader."""
        prefill, decode = (
            f"{speed:.1f} tokens/s" if speed else "-"
            for speed in (self.prefill_tokens_per_s, self.decode_tokens_per_s)
        )
        return (
            f"{self.backend}, {self.method}{', interrupted' if self.interrupted else ''}\n"
            f"prefill  {self.prompt_tokens} tokens, {prefill}\n"
            f"decode   {self.tokens} tokens, {decode}\n"
            f"cache    {in_units(self.cache_bytes)} against {in_units(self.dense_bytes)} dense, "
            f"ratio {self.ratio:.2f}\n"
            f"peak     {in_units(self.peak_bytes)}"
        )


def in_units(n: int) -> str:
    """Bytes as people read them."""
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt: the argument, a file, or standard input where neither is given.

    Raises:
        ConfigError: If there is none or there are two, or it is empty, unreadable or not UTF-8.
    """
    if prompt is None and prompt_file is None and not sys.stdin.isatty():
        prompt_file = "-"
    if (prompt is None) == (prompt_file is None):
        got = "neither" if prompt is None else "both"
        raise ConfigError(f"generate: expected either PROMPT or --prompt-file, got {got}")
    if prompt_file is None:
        text, source = cast("str", prompt), "PROMPT"
        if any("\ud800" <= c <= "\udfff" for c in text):  # bytes that the shell's locale lacks
            raise ConfigError("PROMPT: expected UTF-8, got other bytes; use --prompt-file")
    else:
        source = f"--prompt-file {prompt_file}"
        try:
            data = sys.stdin.buffer.read() if prompt_file == "-" else Path(prompt_file).read_bytes()
            text = data.decode("utf-8-sig")
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ConfigError(
                f"{source}: expected UTF-8, got byte 0x{byte:02x} at {error.start}; convert it, "
                "e.g. with iconv"
            ) from None
    if not text.strip():
        raise ConfigError(f"{source}: expected some text, got an empty prompt")
    return text


def read_settings(settings: tuple[str, ...]) -> dict[str, str]:
    """`key=value` pairs as a dict.

    Raises:
        ConfigError: If one has no `=`, or a key comes twice.
    """
    pairs: dict[str, str] = {}
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not (key and equals and value):
            raise ConfigError(f"--set: expected key=value such as gear.bits=4, got {setting!r}")
        if key in pairs:
            raise ConfigError(f"--set: {key} is given twice, as {pairs[key]} and {value}")
        pairs[key] = value
    return pairs


def encode(engine: Engine, text: str, chat: bool | None) -> list[int]:
    """Token ids; with `chat=None` the model's chat template is used if it has one.

    Raises:
        ConfigError: If there is no chat template, or more tokens than the model's context has.
    """
    try:
        ids = engine.encode(text, chat=chat is not False)
    except ConfigError:
        if chat:
            raise
        ids = engine.encode(text, chat=False)
    limit = engine.context_length
    if not ids:
        raise ConfigError("generate: the tokenizer makes no tokens of this prompt")
    if limit is not None and len(ids) > limit:
        raise ConfigError(
            f"generate: the prompt has {len(ids)} tokens, the model's context {limit}; shorten it"
        )
    return ids


def run(
    engine: Engine,
    ids: list[int],
    cache: Any,
    stats: Stats,
    show: Callable[[str], None],
    quiet: bool,
    **sampling: Any,
) -> None:
    """Generates into `show` and `stats`; Ctrl-C ends it, and `stats` holds what there is."""
    from tqdm import tqdm

    # disable=None: no bar where stderr is no terminal
    bar = tqdm(total=len(ids), desc="prefill", unit="tok", leave=False, disable=quiet or None)

    def on_prefill(done: int, total: int) -> None:
        bar.update(max(0, done - bar.n))

    start = first = last = time.perf_counter()
    try:
        pieces = engine.stream(
            ids, cache, prefill_step=PREFILL_STEP, on_prefill=on_prefill, **sampling
        )
        with closing(cast("Generator[Piece, None, None]", pieces)):
            for piece in pieces:
                last = time.perf_counter()
                if not stats.tokens:
                    first = last
                    bar.close()
                stats.tokens += 1
                show(piece.text)
    except KeyboardInterrupt:
        stats.interrupted = True
    finally:
        bar.close()
    if stats.tokens:
        stats.prefill_tokens_per_s = len(ids) / max(first - start, 1e-9)
    if stats.tokens > 1:
        stats.decode_tokens_per_s = (stats.tokens - 1) / max(last - first, 1e-9)


@click.command()
@click.argument("prompt", required=False)
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a file; - is stdin.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "mlx", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="What runs the model.",
)
@click.option("--model", help="A folder or a name on the Hugging Face hub.  [default: bundled]")
@click.option("--method", default="gear", show_default=True, help="Presets, joined by +.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter of the method, e.g. gear.bits=4; may be given again.",
)
@click.option(
    "--prefill",
    type=click.Choice(["exact", "stream"]),
    default="exact",
    show_default=True,
    help="Compress the prompt when it ends, or piece by piece.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--temp", type=click.FloatRange(0), default=0.0, show_default=True, help="0: the likeliest."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of the samples.")
@click.option(
    "--chat/--raw",
    default=None,
    help="With the model's chat template or without.  [default: with, if it has one]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, text included.")
@click.option("--quiet", is_flag=True, help="No progress and no statistics on stderr.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the model.  [default: as saved; float32 on a CPU]",
)
def generate(
    prompt: str | None,
    prompt_file: str | None,
    backend: str,
    model: str | None,
    method: str,
    settings: tuple[str, ...],
    prefill: str,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int | None,
    chat: bool | None,
    as_json: bool,
    quiet: bool,
    dtype: str | None,
) -> None:
    """Continue PROMPT with a compressed cache.

    Example: kvc generate "It was a dark night" --method gear --set bits=4
    """
    from kvc.api import load_engine
    from kvc.demo import path
    from kvc.methods import parse

    text = read_prompt(prompt, prompt_file)
    parsed = parse(method, read_settings(settings))
    if quiet or not sys.stderr.isatty():  # the libraries' bars know of no terminal
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    engine = load_engine(backend, model if model is not None else str(path()), dtype)
    ids = encode(engine, text, chat)
    limit = engine.context_length
    if limit is not None and len(ids) + max_tokens > limit:
        max_tokens = max(1, limit - len(ids))
        if not quiet:
            click.echo(f"kvc: the context of {limit} has room for {max_tokens} tokens", err=True)
    cache = engine.make_cache(parsed, prefill)
    stats = Stats(engine.name, method, len(ids))
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if not as_json:
            click.echo(piece, nl=False)

    sampling = {"max_tokens": max_tokens, "temp": temp, "top_p": top_p, "seed": seed}
    run(engine, ids, cache, stats, show, quiet, **sampling)
    report = engine.store(cache).report()
    stats.cache_bytes, stats.dense_bytes = report.nbytes, report.dense_bytes
    stats.ratio, stats.peak_bytes = report.ratio, engine.peak_memory()
    if as_json:
        click.echo(json.dumps({"text": "".join(shown), **asdict(stats)}))
    else:
        click.echo()
    if not quiet and not as_json:
        click.echo(stats.lines(), err=True)
    if stats.interrupted:
        click.get_current_context().exit(130)
