"""The face of a conversation: messages in, answers out, and what a slash begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvc.cli.lines import Lines
from kvc.cli.options import check_target
from kvc.cli.prompt import read_settings
from kvc.cli.run import Stats, in_units, run
from kvc.errors import ConfigError, KernelUnavailable, KVCError

if TYPE_CHECKING:
    from kvc.chat import Conversation

COMMANDS = """\
/save FILE.kvc              keep the conversation with its compressed cache
/load FILE.kvc              go on with one that was kept, or behind a text of `kvc cache build`
/stats                      tokens, bytes against the dense cache's, speeds
/method NAME [KEY=VALUE ..] read the conversation again with another method
/reset                      begin anew
/help                       this
/quit                       leave, as Ctrl-D and Ctrl-C at an empty prompt do
Ctrl-C stops an answer and keeps what is written. A line that ends with \\ goes on in the next,
lines between two \"\"\" are one message. To begin a message with /, put a space in front."""


@dataclass(slots=True)
class Talk:
    """Messages in, answers out."""

    conversation: Conversation
    options: dict[str, Any]  # of the engine's `stream`
    seed: int | None
    as_json: bool
    quiet: bool
    last: Stats | None = None
    kept: Path | None = None  # the file of this conversation, which may be replaced

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
        if name in ("/save", "/load") and not rest:
            raise ConfigError(f"{name}: expected the name of a file")
        if name == "/stats":
            click.echo(self.stats(), err=True)
        elif name == "/save":
            self._save(rest)
        elif name == "/load":
            self._load(rest)
        elif name == "/method":
            self._method(rest)
        elif name == "/reset":
            talk.reset()
            self.last, self.kept = None, None
        elif name == "/help":
            click.echo(COMMANDS, err=True)
        elif name != "/quit":
            raise ConfigError(f"chat: there is no command {name}; /help lists all")
        return name != "/quit"

    def _save(self, file: str) -> None:
        path = Path(file).expanduser()
        if path.exists() and path != self.kept:
            raise ConfigError(f"/save {file}: there is one already; take another name")
        check_target("/save", str(path), (".kvc",), force=True)
        self.conversation.save(path)
        self.kept = path
        self.note(f"{file}: {in_units(path.stat().st_size)}")

    def _load(self, file: str) -> None:
        path, talk = Path(file).expanduser(), self.conversation
        talk.load(path)
        # the text of `kvc cache build` is not to be replaced by a conversation about it
        self.kept = path if talk.messages else None
        self.last = None
        self.note(f"{file}: {len(talk.tokens)} tokens with {talk.method.name}")

    def _method(self, text: str) -> None:
        from kvc.cli.cache import read
        from kvc.methods import parse

        if not text:
            raise ConfigError("/method: expected a name and settings, such as gear bits=4")
        name, *settings = text.split()
        talk = self.conversation
        talk.forget(parse(name, read_settings(settings, "/method")))
        self.last = None
        if talk.tokens:
            read(talk.engine, talk.cache, talk.tokens, self.options["prefill_step"], self.quiet)
        self.note(f"{text}: {len(talk.tokens)} tokens read again")

    def stats(self) -> str:
        """The conversation as it stands, and the last answer's speeds."""
        talk = self.conversation
        n = sum(message["role"] == "user" for message in talk.messages)
        lines = f"messages {n}, {len(talk.tokens)} tokens, {talk.held} of them in the cache"
        if talk.room is not None:
            lines += f", room for {talk.room}"
        if self.last is not None:
            self.last.measure(talk.engine, talk.cache)
            return f"{lines}\n{self.last.lines()}"
        found = talk.engine.store(talk.cache).report()
        return (
            f"{lines}\n{talk.engine.name}, {talk.method.name}\n"
            f"cache    {in_units(found.nbytes)} against {in_units(found.dense_bytes)} dense, "
            f"ratio {found.ratio:.2f}"
        )
