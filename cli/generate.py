"""`kvc generate`: text from a model with a compressed cache."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from kvc.errors import ConfigError, KVCError


class _Fault(click.ClickException):
    """A user's error: one line on stderr, exit code 2."""

    exit_code = 2


@click.command(epilog='Example: kvc generate --method gear --set gear.bits=4 "Once upon a time"')
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@click.option("--backend", default="auto", show_default=True, help="mlx, cuda, cpu or auto.")
@click.option("--model", help="A folder or a name on the hub.  [default: the bundled model]")
@click.option("--method", default="gear", show_default=True, help="Such as kivi or kvsharer+gear.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter.")
@click.option("--prefill", default="exact", show_default=True, help="exact or stream.")
@click.option("--prefill-step", default=2048, show_default=True, help="Prompt tokens at a time.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--temp", default=0.0, show_default=True, type=click.FloatRange(0))
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: the model's]")
@click.option("--chat/--raw", default=False, show_default=True, help="Use the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--quiet", is_flag=True, help="No progress and no statistics.")
def generate(prompt: str | None, prompt_file: Path | None, settings: tuple[str, ...],
             as_json: bool, quiet: bool, **options: Any) -> None:  # fmt: skip
    """Write text that continues PROMPT, a file or standard input."""
    try:
        text = _prompt(prompt, prompt_file)
        _run(text, dict(_pair(entry) for entry in settings), as_json, quiet, **options)
    except KVCError as error:
        raise _Fault(str(error)) from None


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ConfigError("expected a prompt or --prompt-file, got both; leave one out")
    try:
        text = prompt if prompt is not None else file.read_text("utf-8") if file else None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}: expected UTF-8 text, got another byte at {error.start}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    text = sys.stdin.read() if text is None else text
    if not text.strip():
        raise ConfigError("expected a prompt, got an empty one; give it as an argument or a file")
    return text


def _pair(entry: str) -> tuple[str, str]:
    key, equals, value = entry.partition("=")
    if not equals:
        raise ConfigError(f"--set: expected key=value, got {entry!r}")
    return key, value


def _run(text: str, settings: dict[str, str], as_json: bool, quiet: bool, *, backend: str,
         model: str | None, method: str, prefill: str, prefill_step: int, max_tokens: int,
         temp: float, top_p: float, seed: int, dtype: str | None, chat: bool) -> None:  # fmt: skip
    from tqdm import tqdm  # here, so that --help is quick

    import kvc
    import kvc.demo

    chosen = kvc.parse(method, settings)
    engine = kvc.load_engine(backend, model or str(kvc.demo.path()), dtype)
    ids = engine.encode(text, chat)
    if engine.context_length and len(ids) + max_tokens > engine.context_length:
        raise ConfigError(
            f"the model's context is {engine.context_length} tokens, the prompt has {len(ids)} and "
            f"--max-tokens is {max_tokens}; shorten either"
        )
    cache = engine.make_cache(chosen, prefill)
    bar = tqdm(total=len(ids), desc="prompt", unit="tok", leave=False, disable=quiet or None)
    start = time.perf_counter()
    tokens: list[int] = []
    words: list[str] = []
    first = start
    interrupted = False

    def heard(done: int, total: int) -> None:
        bar.update(done - bar.n)

    try:
        for piece in engine.stream(
            ids, cache, max_tokens=max_tokens, temp=temp, top_p=top_p, seed=seed,
            prefill_step=prefill_step, on_prefill=heard,
        ):  # fmt: skip
            if not tokens:
                first = time.perf_counter()
                bar.close()
            tokens.append(piece.token)
            words.append(piece.text)
            if not as_json:
                click.echo(piece.text, nl=False)
    except KeyboardInterrupt:
        interrupted = True
    bar.close()
    end = time.perf_counter()
    held = engine.store(cache).report()
    figures = {
        "backend": engine.name,
        "method": chosen.name,
        "prompt_tokens": len(ids),
        "tokens": len(tokens),
        "prefill_tokens_per_second": len(ids) / max(first - start, 1e-9),
        "decode_tokens_per_second": max(len(tokens) - 1, 0) / max(end - first, 1e-9),
        "cache_bytes": held.nbytes,
        "dense_bytes": held.dense_bytes,
        "ratio": held.ratio,
        "parts": held.parts,
        "peak_memory": engine.peak_memory(),
    }
    if as_json:
        click.echo(json.dumps({"text": "".join(words), "token_ids": tokens, **figures}))
    else:
        click.echo()
        if not quiet:
            click.echo(_summary(figures), err=True)
    if interrupted:
        sys.exit(130)


def _summary(figures: dict[str, Any]) -> str:
    return (
        "{backend} {method}: prompt {prompt_tokens} tokens at {prefill_tokens_per_second:.0f}/s, "
        "then {tokens} at {decode_tokens_per_second:.1f}/s; cache {cache_bytes:,} bytes of "
        "{dense_bytes:,} dense ({ratio:.2f}x smaller); peak memory {peak_memory:,} bytes"
    ).format(**figures)
