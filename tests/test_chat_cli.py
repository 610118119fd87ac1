"""`kvc chat`: from a pipe, and at a terminal with its line editing and Ctrl-C."""

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result

from tests.run_cli import both, error_line, kvc_run, need_backend
from tests.test_cli_interrupts import KVC

FACT = "The code of Anna is 4821. The code of Anna is"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
PATIENCE = 60  # seconds


def chat(backend: str, text: str | bytes, *args: str) -> Result:
    """`kvc chat` with this in its pipe."""
    need_backend(backend)
    return kvc_run("chat", "--backend", backend, "--max-tokens", "6", *args, input=text)


@both
def test_a_line_is_a_turn(backend: str) -> None:
    result = chat(backend, f"{FACT}\n\n  \r\nThe code of Tom is 7777. The code of\\\n Anna is")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r" 4821\..*\n.*\n", result.stdout, re.DOTALL)
    assert ">" not in result.output  # no prompt
    assert "no chat template" in result.stderr
    assert len(result.stderr.splitlines()) == 2


@both
def test_json_says_what_each_turn_read(backend: str, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    args = ("--json", "--quiet", "--chat-template", str(template), "--method", "none")
    turns = f'{FACT}\n"""The code of Tom is 77.\nThe code of Tom is"""\n/method gear bits=4\nWho\n'
    result = chat(backend, turns, *args)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    first, second, third = map(json.loads, result.stdout.splitlines())
    assert first["text"].startswith(" 4821")
    assert second["text"].startswith(" 77")
    assert second["prompt_tokens"] < first["prompt_tokens"]
    assert third["prompt_tokens"] < 4  # the rest was read when the method was changed
    assert third["cache_bytes"] > first["cache_bytes"]
    assert (second["method"], third["method"]) == ("none", "gear")
    for row in (first, second, third):
        assert row["tokens"] == 6
        assert row["cache_bytes"] > 0


@both
def test_commands(backend: str) -> None:
    commands = "/help", "/stats", FACT, "/stats", "/reset", "/stats", "/method kivi bits=4", FACT
    result = chat(backend, "\n".join([*commands, "/stats", "/quit", "never read"]))
    assert result.exit_code == 0, result.output
    assert result.stdout.count(" 4821") == 2
    assert re.findall(r"messages (\d), (\d+) tokens", result.stderr) == [
        ("0", "0"), ("1", "29"), ("0", "0"), ("1", "29"),
    ]  # fmt: skip
    assert re.findall(rf"{backend}, (\w+)\n", result.stderr) == ["gear"] * 3 + ["kivi"]
    assert "dense, ratio" in result.stderr
    assert all(name in result.stderr for name in ("/method NAME", "/quit", "Ctrl-C"))


@both
def test_a_conversation_is_kept_and_gone_on_with(backend: str, tmp_path: Path) -> None:
    other = "mlx" if backend == "cpu" else "cpu"
    need_backend(other)
    template, kept = tmp_path / "template.jinja", tmp_path / "talk.kvc"
    template.write_text(TEMPLATE)
    args = ("--chat-template", str(template), "--method", "kivi", "--json", "--quiet")
    lines = [FACT, "The code of Tom is 7777. The code of", f"/save {kept}", " Tom is"]
    first = chat(backend, "\n".join([*lines, f"/save {kept}"]), *args)
    assert first.exit_code == 0, first.output
    more = [f"/load {kept}", "/stats", "The code of Anna is", "/stats"]
    for each in (backend, other):  # and the file stays as it is
        result = chat(each, "\n".join(more), *args[:-3], "none", *args[-2:])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["text"].startswith(" 4821")
        counts = re.findall(r"messages (\d), (\d+) tokens", result.stderr)
        assert [n for n, _ in counts] == ["3", "4"]
        read = json.loads(result.stdout)["prompt_tokens"]
        assert 0 < int(counts[1][1]) - int(counts[0][1]) - 6 <= read < 12
        assert json.loads(result.stdout)["method"] == "kivi"


def test_a_book_that_was_read_before(tmp_path: Path) -> None:
    need_backend("cpu")
    book, cache = tmp_path / "book.txt", tmp_path / "book.kvc"
    book.write_text("The code of Anna is 4821. It was a dark night.")
    built = kvc_run("cache", "build", "--backend", "cpu", str(book), "-o", str(cache), "--quiet")
    assert built.exit_code == 0, built.output
    lines = f"/load {cache}\n The code of Anna is\n/save {cache}"
    result = chat("cpu", lines, "--quiet")
    assert result.exit_code == 2
    assert result.stdout.startswith(" 4821")
    assert "there is one already" in result.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"/nothing", ["/nothing", "/help"]),
        (b"/stats now", ["/stats", "'now'"]),
        (b"/save", ["/save", "name"]),
        (b"/save talk.txt", ["/save", "talk.txt", ".kvc"]),
        (b"/save talk.kvc", ["talk.kvc", "empty"]),
        (b"/save /nowhere/talk.kvc", ["talk.kvc", "write there"]),
        (b"/save .", ["there is one"]),
        (b"/load", ["/load", "name"]),
        (b"/load talk.kvc", ["talk.kvc", "cannot read"]),
        (b"/method", ["/method", "gear bits=4"]),
        (b"/method geer", ["geer", "gear"]),
        (b"/method gear bits", ["/method", "key=value", "'bits'"]),
        (b"/method gear bits=3", ["bits", "3"]),
        (b"caf\xe9", ["stdin", "UTF-8", "0xe9"]),
        (b"7" * 5000, ["500", "4096", "no room"]),
    ],
)
def test_errors_in_a_pipe_are_one_line(line: bytes, words: list[str]) -> None:
    said = error_line(chat("cpu", line + b"\nnever read", "--quiet"))
    assert all(word in said for word in words), said


@both
def test_a_template_that_refuses_is_told_at_once(backend: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% for m in %}")
    for name, why in (("broken.jinja", "TemplateSyntaxError"), ("none.jinja", "cannot read")):
        line = error_line(chat(backend, "", "--chat-template", str(tmp_path / name)))
        assert why in line


class Terminal:
    """`kvc chat` at a terminal of its own."""

    def __init__(self, *args: str) -> None:
        self.fd, end = pty.openpty()
        termios.tcsetwinsize(end, (24, 200))  # so that no line is folded
        command = [sys.executable, "-c", KVC, "chat", "--quiet", *args]
        env = {**os.environ, "TERM": "xterm", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            command, stdin=end, stdout=end, stderr=end, env=env, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(end)

    def until(self, text: str) -> str:
        """What comes up to and with a text."""
        out, end = b"", time.monotonic() + PATIENCE
        while text.encode() not in out:
            left = end - time.monotonic()
            assert left > 0, out
            if select.select([self.fd], [], [], left)[0]:
                out += os.read(self.fd, 1)
        return out.decode()

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C while a line is edited."""
        time.sleep(0.5)  # Python misses a signal that comes just before it waits for a key
        self.type("\x03")

    def leave(self) -> int:
        """The exit code, when it has left by itself."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    os.read(self.fd, 4096)
                except OSError:  # how Linux says that nobody is there
                    break
        return self.process.wait(PATIENCE)


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes from it


@contextmanager
def terminal(*args: str) -> Iterator[Terminal]:
    opened = Terminal(*args)
    try:
        opened.until("> ")
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.fd)


@both
def test_a_terminal_with_line_editing_and_ctrl_c(backend: str) -> None:
    need_backend(backend)
    with terminal("--backend", backend, "--max-tokens", "3000") as tty:
        tty.type("nobody reads this")
        tty.until("this")
        tty.interrupt()  # drops the line
        tty.until("> ")
        tty.type("The code of Anna is 4821. The code of Ann ia")
        tty.type("\x7f\x7f\x7f")  # takes back " ia"
        tty.type("a is\x01It is night. \x05\n")  # goes to the line's beginning and its end
        tty.until("\n")
        tty.until(" ")  # it writes
        tty.until(" ")
        tty.type("\x03")  # stops it
        tty.until("\r\n> ")
        tty.type("/stats\n")
        stats = tty.until("process" if backend == "cpu" else "MLX")
        assert "messages 1" in stats
        assert "interrupted" in stats
        assert 1 < int(re.search(r"decode   (\d+) tokens", stats)[1]) < 3000  # type: ignore[index]
        tty.until("> ")
        tty.type("\x1b[A\x1b[A\n")  # calls back the message
        assert "It is night. The code of Anna is 4821. The code of Anna is" in tty.until("is\r\n")
        tty.until(" ")
        tty.type("\x03")
        tty.until("\r\n> ")
        tty.type("/method geer\n")
        assert "unknown method" in tty.until("\r\n> ")  # and it goes on
        tty.interrupt()  # at an empty prompt
        assert tty.leave() == 0


def test_a_terminal_with_messages_of_several_lines() -> None:
    need_backend("cpu")
    with terminal("--backend", "cpu", "--max-tokens", "4") as tty:
        tty.type('"""The code of Anna is 4821.\n')
        tty.until("\r\n. ")
        tty.type('The code of Anna is"""\n')
        assert "482" in tty.until("> ").partition("Anna is")[2]
        tty.type('"""dropped\n')
        tty.until("\r\n. ")
        tty.interrupt()
        tty.until("> ")
        tty.type("/stats\n")
        assert "messages 1" in tty.until("> ")
        tty.type("\x04")
        assert tty.leave() == 0
