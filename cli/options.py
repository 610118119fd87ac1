"""Options that several commands have, and the checks of their values."""

from __future__ import annotations

import tempfile
from decimal import Decimal, InvalidOperation
from pathlib import Path

import click

from kvc.errors import ConfigError

model_option = click.option(
    "--model", help="A folder or a name on the Hugging Face hub.  [default: bundled]"
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "mlx", "cuda", "cpu"]),
    default="auto",
    show_default=True,
    help="What runs the model.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the model.  [default: as saved; float32 on a CPU]",
)

method_option = click.option(
    "--method", default="gear", show_default=True, help="Presets, joined by +."
)
settings_option = click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter of the method, e.g. gear.bits=4; may be given again.",
)
prefill_option = click.option(
    "--prefill",
    type=click.Choice(["exact", "stream"]),
    default="exact",
    show_default=True,
    help="Compress the prompt when it ends, or piece by piece.",
)
prefill_step_option = click.option(
    "--prefill-step",
    type=click.IntRange(16),
    default=512,  # short enough for the progress bar to move on a CPU
    show_default=True,
    help="Tokens of the prompt in one piece.",
)
temp_option = click.option(
    "--temp", type=click.FloatRange(0), default=0.0, show_default=True, help="0: the likeliest."
)
top_p_option = click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True
)
seed_option = click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of the samples.")
chat_template_option = click.option(
    "--chat-template",
    metavar="FILE",
    help="A Jinja template of conversations, in place of the model's own.",
)


def read_share(option: str, text: str, what: str) -> float:
    """A share as a percentage or as a fraction, as a fraction.

    Raises:
        ConfigError: If it is neither, or not between nothing and all.
    """
    try:
        number = Decimal(text.strip().removesuffix("%"))
        share = number / 100 if text.strip().endswith("%") else number
        if 0 < share < 1:  # not of NaN either
            return float(share)
    except InvalidOperation:
        pass
    raise ConfigError(f"{option}: expected a part of {what} such as 25% or 0.25, got {text!r}")


def check_target(option: str, path: str, suffixes: tuple[str, ...], force: bool) -> None:
    """That a file can be written, before work begins.

    Raises:
        ConfigError: If its folder or its name will not do, or it exists and may not be replaced.
    """
    target = Path(path)
    if target.suffix not in suffixes:
        known = " or ".join(suffixes)
        raise ConfigError(f"{option} {path}: expected a name that ends in {known}")
    if target.is_dir() or (target.exists() and not force):
        mend = "take another name" if target.is_dir() else "take another name, or --force"
        raise ConfigError(f"{option} {path}: there is one already; {mend}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot write there: {error.strerror}") from None
