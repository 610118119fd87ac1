"""Ctrl-C and closed pipes: what there is, is printed, and nothing is a traceback."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pytest

from kvc import api
from kvc.backends.sequences import Piece
from kvc.cli.run import held_interrupts
from tests.run_cli import PROMPT, both, generate, kvc_run, need_backend

# A shell that starts tests in the background has them ignore SIGINT.
KVC = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from kvc.cli import main
main()
"""
LOADING = """
from kvc import api
load = api.load_engine
api.load_engine = lambda *args: (print("loading", flush=True), load(*args))[1]
"""
PATIENCE = 60  # seconds


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*args: str, code: str = KVC, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    command = [sys.executable, "-c", code, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=env)


def first_byte(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return os.read(process.stdout.fileno(), 1)


def read_terminal(terminal: int) -> bytes:
    """What came next; nothing at the end, which Linux says as an error, and macOS does not."""
    if not select.select([terminal], [], [], PATIENCE)[0]:
        return b""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


@both
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_there_is(
    backend: str, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = api.load_engine

    def interrupted(*args: Any) -> Any:
        engine: Any = load(*args)
        stream = engine.stream

        def two(*args: Any, **kwargs: Any) -> Iterator[Piece]:
            pieces = stream(*args, **kwargs)
            yield next(pieces)
            signal.raise_signal(signal.SIGINT)
            yield next(pieces)
            raise AssertionError("it went on after Ctrl-C")

        engine.stream = two
        return engine

    monkeypatch.setattr(api, "load_engine", interrupted)
    result = generate(backend, PROMPT, *["--json"] * as_json)
    assert result.exit_code == 130, result.output
    if as_json:
        row = json.loads(result.stdout)
        assert row["interrupted"]
        assert row["tokens"] == len(row["token_ids"]) == 2
    else:
        assert result.stdout.strip()
        assert "2 tokens" in result.stderr


def test_ctrl_c_waits_for_the_end_of_a_step_but_once() -> None:
    with held_interrupts() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_interrupts() as check:
        signal.raise_signal(signal.SIGINT)
        check()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "load_engine", load)
    result = kvc_run("generate", "a")
    assert result.exit_code == 130
    assert result.stderr == "kvc: interrupted\n"


@both
def test_ctrl_c_while_decoding(backend: str) -> None:
    need_backend(backend)
    args = ("--backend", backend, "--temp", "1", "--seed", "5", "--max-tokens", "3000")
    with start("generate", "Once upon a time", *args) as process:
        first = first_byte(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err.decode()
    assert first + out.strip()
    assert "interrupted\nprefill" in err.decode()
    assert "dense, ratio" in err.decode()
    assert "Traceback" not in err.decode()


@both
def test_ctrl_c_while_the_prompt_is_read_and_its_bar_is_up(backend: str) -> None:
    need_backend(backend)
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))  # no bar is as narrow as no columns
    args = ("--backend", backend, "--prefill-step", "16", "--max-tokens", "8")
    with start("generate", "7 " * 1500, *args, stderr=stderr) as process:
        os.close(stderr)
        err, more = b"", b"-"
        while more:
            more = read_terminal(terminal)
            err += more
            if re.search(rb"prefill: +[1-9]", err):
                process.send_signal(signal.SIGINT)
                break
        while more := read_terminal(terminal):
            err += more
        rest, _ = process.communicate(timeout=PATIENCE)
    os.close(terminal)
    assert process.returncode == 130, err.decode()
    assert rest.strip() == b""
    found = re.search(r"prefill  (\d+) of (\d+) tokens, [\d.]+ tokens/s", err.decode())
    assert found, err.decode()
    assert 0 < int(found[1]) < int(found[2])
    assert "decode   0 tokens" in err.decode()
    assert "Traceback" not in err.decode()


@both
def test_ctrl_c_while_loading(backend: str) -> None:
    need_backend(backend)
    with start("generate", PROMPT, "--backend", backend, code=LOADING + KVC) as process:
        assert first_byte(process) == b"l"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err.decode()) == (130, "kvc: interrupted\n")
    assert out.strip() == b"oading"


@both
def test_a_closed_pipe_ends_it_quietly(backend: str) -> None:
    need_backend(backend)
    args = ("--backend", backend, "--max-tokens", "3000", "--temp", "1")
    with start("generate", "Once upon a time", *args) as process:
        first_byte(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE) == 141
