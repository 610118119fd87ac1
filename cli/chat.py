"""`kvc chat`: a conversation with a compressed cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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
from kvc.cli.run import Stats, hush, load, run
from kvc.errors import ConfigError, KernelUnavailable, KVCError

if TYPE_CHECKING:
    from kvc.chat import Conversation

COMMANDS = """\
/stats                      tokens, bytes against the dense cache's, speeds
/method NAME [KEY=VALUE ..] another method: it reads all again with the next message
/reset                      begin anew
/help                       this
/quit                       leave, as Ctrl-D and Ctrl-C at an empty prompt do
Ctrl-C stops an answer and keeps what is written. A line that ends with \\ goes on in the next,
lines between two \"\"\" are one message. To begin a message with /, put a space in front."""
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


@dataclass(slots=True)
class Talk:
    """Messages in, answers out."""

    conversation: Conversation
    options: dict[str, Any]  # of the engine's `stream`
    seed: int | None
    as_json: bool
    quiet: bool
    last: Stats | None = None

    def note(self, line: str) -> None:
        """A line for the user that is no answer."""
        if not self.quiet:
            click.echo(f"kvc: {line}", err=True)

    def hold(self, lines: Lines) -> int:
        """Answers until the end; returns the exit code.

        At a terminal errors are told and the conversation goes on.

        Raises:
            KVCError: From a pipe.
        """
        for line in self._lines(lines):
            try:
                if line.startswith("/"):
                    if not self.command(line):
                        break
                elif not self.answer(line) and not lines.at_terminal:
                    return 130
            except KeyboardInterrupt:  # not while the model writes: that is `run`'s
                if not lines.at_terminal:
                    raise
                click.echo(err=True)
            except (KVCError, KernelUnavailable, RuntimeError, MemoryError) as error:
                if not lines.at_terminal:
                    raise
                first = (str(error).splitlines() or [type(error).__name__])[0]
                click.echo(f"kvc: {first.removeprefix('kvc: ')}", err=True)
        return 0

    def _lines(self, lines: Lines) -> Iterator[str]:
        while True:
            try:
                line = lines.message()
            except KeyboardInterrupt:
                if lines.at_terminal:
                    return
                raise
            if line is None:
                return
            yield line

    def answer(self, text: str) -> bool:
        """Shows the model's answer; whether it was not stopped by Ctrl-C."""
        talk = self.conversation
        ids = talk.ask(text)
        self.last = stats = Stats(talk.engine.name, talk.method.name, len(ids))
        shown: list[str] = []

        def show(piece: str) -> None:
            shown.append(piece)
            if not self.as_json:
                click.echo(piece, nl=False)

        run(talk, ids, talk.cache, stats, show, self.quiet, seed=self.seed, **self.options)
        self.seed = None  # of the whole conversation: answers are not to begin alike
        stats.measure(talk.engine, talk.cache)
        if self.as_json:
            click.echo(json.dumps({"text": "".join(shown), **asdict(stats)}))
        else:
            click.echo()
        if talk.room == 0:
            self.note(
                "the model's context is full: /save keeps the conversation, /reset begins anew"
            )
        elif talk.engine.can_chat and not (talk.ended or stats.interrupted):
            self.note(f"cut at --max-tokens {stats.tokens}")
        return not stats.interrupted

    def command(self, line: str) -> bool:
        """Does what a line that begins with a slash says; whether the conversation goes on.

        Raises:
            KVCError: If it cannot be done; nothing is changed then.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        talk = self.conversation
        if name in ("/stats", "/reset", "/help", "/quit") and rest:
            raise ConfigError(f"{name}: expected nothing behind it, got {rest!r}")
        if name == "/stats":
            click.echo(self.stats(), err=True)
        elif name == "/reset":
            talk.reset()
        elif name == "/help":
            click.echo(COMMANDS, err=True)
        elif name == "/method":
            self._method(rest)
        elif name != "/quit":
            raise ConfigError(f"chat: there is no command {name}; /help lists all")
        return name != "/quit"

    def _method(self, text: str) -> None:
        from kvc.methods import parse

        if not text:
            raise ConfigError("/method: expected a name and settings, such as gear bits=4")
        name, *settings = text.split()
        self.conversation.forget(parse(name, read_settings(settings, "/method")))
        n = len(self.conversation.tokens)
        self.note(f"{text}: the next message reads {n} tokens again")

    def stats(self) -> str:
        """The conversation as it stands, and the last answer's speeds."""
        talk = self.conversation
        n = sum(message["role"] == "user" for message in talk.messages)
        lines = f"messages {n}, {len(talk.tokens)} tokens, {talk.held} of them in the cache"
        if talk.room is not None:
            lines += f", room for {talk.room}"
        if self.last is None:
            return lines
        self.last.measure(talk.engine, talk.cache)
        return f"{lines}\n{self.last.lines()}"
