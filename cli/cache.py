"""`kvc cache`: texts that are read once and kept as compressed caches in files."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from kvc.cli.options import (
    backend_option,
    check_target,
    dtype_option,
    method_option,
    model_option,
    prefill_option,
    prefill_step_option,
    settings_option,
)
from kvc.cli.prompt import read_settings
from kvc.cli.run import held_interrupts, hush, in_units, load
from kvc.errors import ConfigError
from kvc.text import decoded, read_text

if TYPE_CHECKING:
    from kvc.backends.base import Engine

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def cache() -> None:
    """Keep compressed caches of texts in files.

    Example: kvc cache build --method gear book.txt -o book.kvc
    """


@cache.command()
@click.argument("text_file", metavar="TEXT")
@click.option("-o", "--out", metavar="FILE.kvc", required=True, help="The file to write.")
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
@click.option("--deflate", is_flag=True, help="Entropy-code the codes: smaller, slower to load.")
@model_option
@method_option
@settings_option
@prefill_option
@prefill_step_option
@backend_option
@dtype_option
@click.option("--quiet", is_flag=True, help="No progress and no statistics on stderr.")
def build(
    text_file: str,
    out: str,
    force: bool,
    deflate: bool,
    model: str | None,
    method: str,
    settings: tuple[str, ...],
    prefill: str,
    prefill_step: int,
    backend: str,
    dtype: str | None,
    quiet: bool,
) -> None:
    """Read the file TEXT, or stdin for -, and keep its compressed cache in a file.

    Any backend goes on from it, with the same model in the same dtype.

    Example: kvc cache build --method gear book.txt -o book.kvc
    """
    from kvc.api import save_cache
    from kvc.methods import parse

    check_target("--out", out, (".kvc",), force)
    stdin = text_file == "-"
    text = decoded(sys.stdin.buffer.read(), "TEXT") if stdin else read_text(text_file, "TEXT")
    if not text.strip():
        raise ConfigError(f"TEXT {text_file}: expected some text, got none")
    hush(quiet)
    parsed = parse(method, read_settings(settings))
    engine = load(backend, model, dtype, quiet)
    ids, limit = engine.encode(text), engine.context_length
    if limit is not None and len(ids) >= limit:
        raise ConfigError(
            f"{text_file}: expected fewer tokens than the model's context of {limit}, got "
            f"{len(ids)}; shorten it"
        )
    filled = engine.make_cache(parsed, prefill, free=True)
    read(engine, filled, ids, prefill_step, quiet)
    save_cache(filled, out, ids, model=engine.model, deflate=deflate)
    if not quiet:
        report = engine.store(filled).report()
        click.echo(
            f"{out}: {len(ids)} tokens, {method}, {in_units(report.nbytes)} against "
            f"{in_units(report.dense_bytes)} dense, ratio {report.ratio:.2f}",
            err=True,
        )


def read(engine: Engine, filled: Any, ids: list[int], step: int, quiet: bool) -> None:
    """Reads tokens into an empty cache and compresses them.

    Raises:
        KeyboardInterrupt: Between two pieces.
    """
    import numpy as np
    from tqdm import tqdm

    from kvc.backends.base import chunk_size, ops_of

    size, store = chunk_size(len(ids), step), engine.store(filled)
    # disable=None: no bar where stderr is no terminal
    with (
        held_interrupts() as check,
        tqdm(total=len(ids), desc="read", unit="tok", leave=False, disable=quiet or None) as bar,
    ):
        for start in range(0, len(ids), size):
            piece = np.array([ids[start : start + size]])
            try:
                found = engine.hidden(piece, filled)
            except ConfigError:  # a model that is one with its head
                found = engine.logits(piece, filled)
            ops_of(found).to_numpy(found[:, -1, :1])  # lazy libraries compute it now
            bar.update(piece.size)
            check()
        store.trim(0)  # the prompt has ended
        store.settle()


@cache.command()
@click.argument("file")
@json_option
def info(file: str, as_json: bool) -> None:
    """Say what a cache file holds, after checking it.

    Example: kvc cache info book.kvc
    """
    from kvc.saving import facts

    hush()
    show(facts(file), as_json)


def show(found: dict[str, Any], as_json: bool) -> None:
    """The facts of a cache file, for a reader or as one JSON object."""
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    settings = " ".join(f"{key}={value}" for key, value in found["settings"].items())
    of_rows = f" in each of {found['rows']} rows" if found["rows"] > 1 else ""
    per_token = found["bytes"] / found["tokens"] / found["rows"]
    rows = {
        "cache": found["file"],
        "model": found["model"],
        "tokens": f"{found['tokens']}{of_rows}",
        "method": f"{found['name']} ({settings})" if settings else found["name"],
        "numbers": found["dtype"],
        "bytes": f"{in_units(found['bytes'])}, {per_token:.0f} a token"
        + (", codes deflated" if found["deflated"] else ""),
        "written": f"by kvc {found['version']} with {found['library']}",
    }
    for key, line in rows.items():
        click.echo(f"{key:<12}{line}")


@cache.command()
@click.argument("file")
@click.option("--model", help="Load it for this model too: a folder or a name on the hub.")
@backend_option
@dtype_option
def verify(file: str, model: str | None, backend: str, dtype: str | None) -> None:
    """Check that a cache file is whole: its format, its checksum, its method.

    Example: kvc cache verify book.kvc
    """
    from kvc.api import load_cache
    from kvc.saving import facts

    hush()
    found = facts(file)
    if model is not None:
        engine = load(backend, model, dtype or found["dtype"])
        load_cache(engine.model, file)
    checked = f", and is a cache of {model}" if model is not None else ""
    click.echo(f"{file}: whole, {found['tokens']} tokens, checksum {found['checksum']}{checked}")
