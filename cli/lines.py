"""Messages as a user types them: with line editing at a terminal, one line each from a pipe.

A line that ends with a backslash goes on in the next one; lines between triple quotes are one
message.
"""

from __future__ import annotations

import sys
from types import ModuleType

import click

from kvc.errors import ConfigError
from kvc.text import decoded

PROMPT, MORE = "> ", ". "
QUOTES = '"""'


class Lines:
    """Where messages come from.

    Lines that were typed can be called back with the arrow keys until the end. They are kept
    nowhere else: a conversation is private, and /save keeps it for who wants it.
    """

    def __init__(self) -> None:
        self.at_terminal = sys.stdin.isatty()
        self._readline = _readline() if self.at_terminal else None

    def message(self) -> str | None:
        """The next message that is not blank; None at the end.

        Ctrl-C drops a message that is begun.

        Raises:
            KeyboardInterrupt: At a prompt where nothing is typed; anywhere in a pipe.
            ConfigError: If it is no UTF-8.
        """
        while True:
            parts: list[str] = []
            try:
                if not self._read(parts):
                    return None
            except KeyboardInterrupt:
                if not self.at_terminal:
                    raise
                click.echo(err=True)  # off the line that is given up
                if not (parts or self._typed()):
                    raise
                continue
            if (text := "\n".join(parts)).strip():
                return text.strip("\n")

    def _read(self, parts: list[str]) -> bool:
        """Adds the lines of one message; whether there was any."""
        line = self._line(PROMPT)
        if line is None:
            return False
        quoted = line.startswith(QUOTES)
        line, end = (line.removeprefix(QUOTES), QUOTES) if quoted else (line, "\\")
        while line is not None:
            parts.append(line.removesuffix(end))
            if line.endswith(end) is quoted:
                break
            line = self._line(MORE)
        return True

    def _line(self, prompt: str) -> str | None:
        """A line without its end; None where there are no more."""
        if not self.at_terminal:
            data = sys.stdin.buffer.readline()
            return decoded(data, "stdin").rstrip("\r\n") if data else None
        if not sys.stdout.isatty():  # what is written there is somebody's text
            click.echo(prompt, nl=False, err=True)
            prompt = ""
        try:
            line = input(prompt)
        except EOFError:
            click.echo(err=True)
            return None
        if any("\ud800" <= c <= "\udfff" for c in line):  # bytes that the locale lacks
            raise ConfigError("chat: expected UTF-8, got other bytes")
        return line

    def _typed(self) -> str:
        """What stands in the line that is being edited."""
        return self._readline.get_line_buffer() if self._readline else ""


def _readline() -> ModuleType | None:
    try:
        import readline  # its import is what makes `input` edit lines
    except ImportError:  # on Windows
        return None
    return readline
