"""`kvc lm-eval`: the tasks of lm-evaluation-harness, through a compressed cache."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib import import_module
from typing import Any

import click

from kvc.cli.options import backend_option, dtype_option, model_option
from kvc.cli.prompt import read_settings
from kvc.cli.run import hush, in_units
from kvc.errors import ConfigError, KVCError


@click.command("lm-eval")
@model_option
@click.option("--method", default="gear", show_default=True, help="Presets, joined by +.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter of the method, e.g. gear.bits=4; may be given again.",
)
@click.option("--tasks", metavar="A,B", required=True, help="Names, or YAML files of your own.")
@click.option(
    "--prefill", type=click.Choice(["exact", "stream"]), default="exact", show_default=True
)
@click.option("--prefill-step", type=click.IntRange(16), default=512, show_default=True)
@click.option(
    "--step",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Tokens of an answer that are scored at a time: more are faster, see each other as they "
    "came, and flatter a method.",
)
@backend_option
@dtype_option
@click.option("--quiet", is_flag=True, help="Nothing on stderr but errors.")
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTION OF LM_EVAL...]")
def lm_eval(
    model: str | None,
    method: str,
    settings: tuple[str, ...],
    tasks: str,
    backend: str,
    dtype: str | None,
    quiet: bool,
    rest: tuple[str, ...],
    **scoring: Any,
) -> None:
    """Evaluate tasks of lm-evaluation-harness with a compressed cache.

    Every token of an answer is scored from the compressed cache, the first one too. What stands
    behind -- goes to lm_eval; with --use_cache FILE the same command goes on where it was.

    Example: kvc lm-eval --method gear --tasks gsm8k -- --limit 100 --output_path results
    """
    from kvc.api import best_backend, check_backend
    from kvc.demo import path
    from kvc.methods import parse

    _check_installed()
    given = read_settings(settings)
    parse(method, given)
    hush(quiet)
    name = best_backend() if backend == "auto" else backend
    check_backend(name)
    args: dict[str, Any] = {
        "pretrained": str(path()) if model is None else model,
        "method": method,
        "settings": given,
        "backend": name,
        **({"dtype": dtype} if dtype else {}),
        **scoring,
    }
    try:
        with redirect_stderr(io.StringIO()) if quiet else nullcontext():
            _evaluate(args, tasks, rest)
    except KeyboardInterrupt:
        kept = any(word.startswith(("--use_cache", "-c")) for word in rest)
        goes_on = "goes on where it was" if kept else "would go on with --use_cache FILE behind --"
        click.echo(f"kvc: interrupted; the same command {goes_on}", err=True)
        click.get_current_context().exit(130)
    if not quiet:
        click.echo(_line(), err=True)


def _check_installed() -> None:
    """That there is lm_eval.

    Raises:
        ConfigError: If it does not import.
    """
    try:
        import_module("lm_eval")
    except ImportError as error:
        why = (str(error).splitlines() or ["no reason"])[0]
        raise ConfigError(
            f"lm-eval: lm_eval does not import ({why}); pip install 'kvc[lm-eval]'"
        ) from None


def _evaluate(args: dict[str, Any], tasks: str, rest: Sequence[str]) -> None:
    """Runs the harness's own command with our model.

    Raises:
        ConfigError: If an option is wrong, or a task or its data cannot be had.
        KVCError: If the model or the method cannot be had.
    """
    harness = import_module("lm_eval._cli").HarnessCLI()
    chosen = _parsed(harness, ["run", "--tasks", tasks, *rest])
    for option in ("model", "model_args", "device"):
        if getattr(chosen, option, None) is not None:
            raise ConfigError(f"lm-eval: --{option} behind --: expected it in front, as ours")
    chosen.model, chosen.model_args = "kvc", args
    if not hasattr(chosen, "batch_size"):
        chosen.batch_size = "auto"
    if chosen.use_cache:  # what one method answered is no other one's answer
        digest = hashlib.sha256(json.dumps(args, sort_keys=True).encode()).hexdigest()
        chosen.use_cache = f"{chosen.use_cache}-{digest[:12]}"
    import_module("lm_eval.utils").setup_logging()
    ours = import_module("kvc.measure.lm_eval").CompressedLM
    ours.newest = None
    try:
        harness.execute(chosen)
    except KVCError:
        raise
    except Exception as error:
        if ours.newest is not None and ours.newest.asked:
            raise  # no mistake of the user's any more
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"lm-eval: {first}") from error


def _parsed(harness: Any, arguments: list[str]) -> Any:
    """The harness's options.

    Raises:
        ConfigError: If there are wrong ones.
    """
    said = io.StringIO()
    try:
        with _command_line(["lm-eval", *arguments]), redirect_stderr(said):
            return harness.parse_args()
    except SystemExit as end:
        if not end.code:  # it was asked for help
            raise
    last = (said.getvalue().strip().splitlines() or ["wrong options"])[-1]
    raise ConfigError(f"lm-eval: {last.partition('error: ')[2] or last}")


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    """What the harness takes for the command line."""
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


def _line() -> str:
    """What the caches held."""
    lm = import_module("kvc.measure.lm_eval").CompressedLM.newest
    info = lm.get_model_info()
    return (
        f"{info['method']}, {info['backend']}: {info['caches']} caches hold "
        f"{in_units(info['cache_bytes'])} against {in_units(info['dense_bytes'])} dense, "
        f"ratio {info['ratio']:.2f}"
    )
