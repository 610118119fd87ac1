"""`kvc chat`: a conversation with a compressed cache."""

from __future__ import annotations

import click

from kvc.cli.lines import Lines
from kvc.cli.options import (
    backend_option,
    chat_template_option,
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
from kvc.cli.prompt import read_settings
from kvc.cli.run import hush, load
from kvc.cli.talk import Talk

# Of one answer. A model that only continues texts never ends one.
LONGEST, LONGEST_PLAIN = 1024, 64


@click.command()
@backend_option
@model_option
@method_option
@settings_option
@prefill_option
@prefill_step_option
@click.option("--system", metavar="TEXT", help="What the model is told before all else.")
@chat_template_option
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help=f"Of an answer.  [default: {LONGEST}; {LONGEST_PLAIN} without a chat template]",
)
@temp_option
@top_p_option
@seed_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each answer.")
@click.option("--quiet", is_flag=True, help="No progress and no notes on stderr.")
@dtype_option
def chat(
    backend: str,
    model: str | None,
    method: str,
    settings: tuple[str, ...],
    prefill: str,
    prefill_step: int,
    system: str | None,
    chat_template: str | None,
    max_tokens: int | None,
    temp: float,
    top_p: float,
    seed: int | None,
    as_json: bool,
    quiet: bool,
    dtype: str | None,
) -> None:
    """Talk with a model whose cache of the conversation stays compressed.

    Each turn reads only what is new. At a terminal lines can be edited, and /help lists commands;
    from a pipe each line is a message. A model without a chat template continues what it is told.

    Example: kvc chat --model Qwen/Qwen3-0.6B --method gear --system "Answer in one sentence."
    """
    from kvc.chat import Conversation
    from kvc.methods import parse
    from kvc.text import read_text

    parsed = parse(method, read_settings(settings))
    template = read_text(chat_template, "--chat-template") if chat_template else None
    hush(quiet)
    engine = load(backend, model, dtype, quiet)
    engine.chat_template = template
    conversation = Conversation(engine, parsed, prefill, system)
    conversation.render([{"role": "user", "content": "Hello"}])  # what is wrong with it, now
    longest = max_tokens or (LONGEST if engine.can_chat else LONGEST_PLAIN)
    options = {"max_tokens": longest, "temp": temp, "top_p": top_p, "prefill_step": prefill_step}
    lines = Lines()
    talk = Talk(conversation, options, seed, as_json, quiet)
    talk.note(f"{method} on {engine.name}" + "; /help lists commands" * lines.at_terminal)
    if not engine.can_chat:
        talk.note("this model has no chat template: it continues what you write")
    click.get_current_context().exit(talk.hold(lines))
