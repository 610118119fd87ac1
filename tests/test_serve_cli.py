"""`kvc serve` as a process: what it says, how it ends, what it keeps."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvc.cli.serve import read_size
from kvc.errors import ConfigError
from kvc.serve.run import address, bind, is_loopback
from tests.run_cli import both, error_line, kvc_run, need_backend

# A shell that starts tests in the background has them ignore SIGINT.
KVC = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from kvc.cli import main
main()
"""
PATIENCE = 60  # seconds
BODY: dict[str, Any] = {"prompt": "It was a dark night. " * 20, "max_tokens": 4, "temperature": 0}


@contextmanager
def started(backend: str, *args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    need_backend(backend)
    command = [sys.executable, "-W", "ignore", "-c", KVC, "serve", "--port", "0"]
    command += ["--backend", backend, *args]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=os.environ, **pipes) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"at (http://\S+)/v1", line):
                    yield process, found[1]
                    return
            raise AssertionError("".join(lines))
        finally:
            process.kill()


def place(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def cached(url: str) -> int:
    usage = httpx.post(f"{url}/v1/completions", json=BODY, timeout=PATIENCE).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


@both
def test_it_serves_until_it_is_told_to_end_and_keeps_its_caches(
    backend: str, tmp_path: Path
) -> None:
    with started(backend, "--cache-dir", str(tmp_path)) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        assert cached(url) == 0
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, ""), err
    assert '"POST /v1/completions HTTP/1.1" 200' in err
    assert "caches of prompts are kept in files" in err
    assert "Traceback" not in err
    kept = list(tmp_path.rglob("*.kvc"))
    assert len(kept) == 2
    assert kept[0].parent.stat().st_mode & 0o777 == 0o700


def test_a_second_signal_ends_it_at_once() -> None:
    body = b'{"prompt": "a", "max_tokens": 4000, "stream": true}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with started("cpu") as (process, url), socket.create_connection(place(url)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130


@pytest.mark.parametrize(("host", "here"), [("127.0.0.1", True), ("0.0.0.0", False), ("::1", True)])
def test_addresses_of_this_machine_alone_are_known(host: str, here: bool) -> None:
    try:
        bound = bind(host, 0)
    except ConfigError:
        pytest.skip(f"this machine has no {host}")
    with bound:
        assert is_loopback(bound) is here
        assert address(bound).startswith(f"http://{'[::1]' if host == '::1' else host}:")


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1024", 1024), ("2GB", 2 * 10**9), ("1.5 MiB", 3 << 19), ("3kb", 3000)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert read_size("--x", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "2 bytes", "1e9", "nan", "2TB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--x: expected a size such as 2GB"):
        read_size("--x", text)


def test_what_is_wrong_is_one_line_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kvc.api.load_engine", lambda *_: pytest.fail("it was loaded"))
    assert "--max-body" in error_line(kvc_run("serve", "--max-body", "much"))
    assert "bots" in error_line(kvc_run("serve", "--set", "gear.bots=4"))
    assert "cannot read it" in error_line(kvc_run("serve", "--chat-template", str(tmp_path)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "in use" in error_line(kvc_run("serve", "--port", port))
    assert "cannot listen" in error_line(kvc_run("serve", "--host", "256.1.1.1"))
    monkeypatch.setattr(import_module("kvc.cli.serve"), "find_spec", lambda name: None)
    assert "pip install 'kvc[serve]'" in error_line(kvc_run("serve"))


def test_what_is_wrong_with_the_model_is_one_line(tmp_path: Path) -> None:
    need_backend("cpu")
    args = ("serve", "--port", "0", "--backend", "cpu")
    assert "no model" in error_line(kvc_run(*args, "--model", str(tmp_path)))
    other_model = ("--method", "kvsharer", "--set", "kvsharer.map=99:0")
    assert "99" in error_line(kvc_run(*args, *other_model))
    (tmp_path / "file").touch()
    error = error_line(kvc_run(*args, "--cache-dir", str(tmp_path / "file")))
    assert "cannot make it" in error


def test_help_has_an_example() -> None:
    assert "Example: kvc serve --method gear" in kvc_run("serve", "--help").stdout
