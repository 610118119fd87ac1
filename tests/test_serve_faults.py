"""The server against full queues, clients that leave or stop to read, bodies, keys and its end."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request

from kvc.serve import limits, sse, worker
from kvc.serve.errors import APIError
from kvc.serve.limits import read_body
from kvc.serve.prefixes import Prefixes
from tests.serve_fake import PATIENCE, FakeModel, Running, answer, serving, until

BODY = {"prompt": "hello", "max_tokens": 9}


@contextmanager
def held(limit: int = 2, **settings: Any) -> Iterator[Running]:
    """A server whose model takes no step until its gate opens."""
    model = FakeModel(limit)
    model.gate.clear()
    with serving(model, **settings) as server:
        yield server


class Client(threading.Thread):
    """A request whose answer is read elsewhere."""

    def __init__(self, server: Running, **body: Any) -> None:
        super().__init__()
        self.url, self.body = f"{server.url}/v1/completions", {**BODY, **body}
        self.response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.response = httpx.post(self.url, json=self.body, timeout=PATIENCE)

    def answer(self) -> httpx.Response:
        self.join(PATIENCE)
        assert self.response is not None
        return self.response


def connect(server: Running, receive_buffer: int | None = None, **body: Any) -> socket.socket:
    """A request on a bare socket, so that the client can leave or not read."""
    request = httpx.Request("POST", f"{server.url}/v1/completions", json={**BODY, **body})
    head = "".join(f"{k}: {v}\r\n" for k, v in request.headers.items())
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    host, port = server.url.removeprefix("http://").split(":")
    client.connect((host, int(port)))
    client.settimeout(PATIENCE)
    client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.read())
    return client


def test_more_than_the_queue_holds_are_sent_away() -> None:
    with held(limit=2, max_waiting=3) as server:
        clients = [Client(server, prompt=f"{i}") for i in range(5)]
        until(lambda: server.worker.waiting + server.worker.running == 5)
        refused = server.post(**BODY)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        openai_ = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with openai_, pytest.raises(openai.RateLimitError):
            openai_.completions.create(model="fake", prompt="a")
        server.model.gate.set()
        for client in clients:
            assert client.answer().json()["choices"][0]["text"] == answer("0", 9)
        assert server.post(**BODY).is_success


def test_who_has_nothing_to_do_gives_memory_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "IDLE", 0.02)
    with serving(FakeModel()) as server:
        until(lambda: server.model.rests == 1)
        assert server.post(**BODY).is_success
        until(lambda: server.model.rests == 2)
        time.sleep(0.1)
        assert server.model.rests == 2
        assert server.model.closed_in is None


def test_what_libraries_keep_for_the_thread_ends_in_it() -> None:
    with serving(FakeModel()) as server:
        thread = server.worker._thread.ident
    assert server.model.closed_in == thread


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_the_queue_makes_room(stream: bool) -> None:
    with held(limit=1, max_waiting=1) as server:
        first = Client(server)
        until(lambda: server.worker.running == 1)
        with connect(server, stream=stream):
            until(lambda: server.worker.waiting == 1)
        until(lambda: server.worker.waiting == 0)
        second = Client(server)
        until(lambda: server.worker.waiting == 1)
        server.model.gate.set()
        assert first.answer().is_success
        assert second.answer().is_success
        assert len(server.model.batches[0].added) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_the_model_writes_ends_it(stream: bool) -> None:
    with held(limit=1) as server:
        with connect(server, stream=stream, max_tokens=900):
            until(lambda: server.worker.running == 1)
        waits = Client(server)
        until(lambda: server.worker.waiting == 1)
        server.model.gate.set()
        assert waits.answer().is_success
        assert server.model.batches[0].removed == [0]
        assert server.worker.running == 0
        assert b"kvc_cancelled_total 1.0" in server.http.get("/metrics").content


def test_who_does_not_read_stops_nobody_and_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PATIENCE", 0.3)
    with serving(FakeModel(limit=4)) as server:
        server.model.batches[0].wide = 100_000
        with connect(server, receive_buffer=4096, stream=True, max_tokens=200) as slow:
            until(lambda: server.worker.running == 0 and bool(server.model.batches[0].added))
            server.model.batches[0].wide = 1
            for _ in range(5):
                assert server.post(**BODY).is_success
            time.sleep(0.8)  # longer than the server waits
            received = bytearray()
            while piece := slow.recv(1 << 20):
                received += piece
        assert b"[DONE]" not in received
        assert server.post(**BODY).is_success


def test_a_slow_reader_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(FakeModel()) as server:
        server.model.batches[0].wide = 30_000
        with connect(server, receive_buffer=4096, stream=True, max_tokens=100) as slow:
            received = slow.recv(1000)
            until(lambda: server.worker.running == 0)
            while not received.endswith(b"0\r\n\r\n"):
                received += slow.recv(1 << 20)
        assert b"[DONE]" in received
        assert len(received) > 30_000 * 100


KEYS = ("Bearer wrong", "Bearer", "right", "Basic right", "Bearer rïght", "Bearer right right", "")


def test_only_the_key_opens() -> None:
    with serving(FakeModel(), api_key="right") as server:
        for header in ("Bearer right", "bearer right"):
            headers = {"Authorization": header}
            assert server.http.post("/v1/completions", json=BODY, headers=headers).is_success
        for header in KEYS:
            given = {"Authorization": header.encode()} if header else {}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/other"):
                assert server.http.get(path, headers=given).status_code == 401
            response = server.http.post("/v1/completions", json=BODY, headers=given)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"
        assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_prompt_of_ten_megabytes_is_refused(chunked: bool) -> None:
    content = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    pieces = (content[i : i + 65536] for i in range(0, len(content), 65536))
    with serving(FakeModel(), max_body=2_000_000) as server:
        response = server.http.post(
            "/v1/completions",
            content=pieces if chunked else content,
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "too_large"
        assert server.post(**BODY).is_success


def bodies(pieces: AsyncIterator[bytes]) -> Request:
    async def receive() -> Any:
        piece = await anext(pieces, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    return Request({"type": "http", "headers": []}, receive)


def test_a_body_that_is_too_long_is_never_held() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"a" * 100_000

    tracemalloc.start()
    with pytest.raises(APIError, match="at most 1000000 bytes"):
        asyncio.run(read_body(bodies(endless()), 1_000_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_600_000


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b" "

    with pytest.raises(APIError) as caught:
        asyncio.run(read_body(bodies(slow()), 1_000_000))
    assert caught.value.status == 408


def reachable(server: Running) -> bool:
    try:
        return httpx.get(f"{server.url}/health").is_success
    except httpx.TransportError:
        return False


class Folder:
    """Files of caches that are lists of tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> list[tuple[list[int], Path]]:
        return [(list(path.read_bytes()), path) for path in sorted(self.folder.iterdir())]

    def write(self, ids: Sequence[int], cache: Any) -> Path:
        path = self.folder / f"{len(list(self.folder.iterdir()))}"
        path.write_bytes(bytes(ids))
        return path

    def read(self, path: Path) -> list[int]:
        return list(path.read_bytes())


def test_the_end_waits_for_answers_and_keeps_caches(tmp_path: Path) -> None:
    model = FakeModel(prefixes=Prefixes(len, 10_000, Folder(tmp_path), 10_000))
    model.gate.clear()
    with serving(model) as server:
        client = Client(server, prompt="a" * 50)
        until(lambda: server.worker.running == 1)
        server.stop()
        until(lambda: not reachable(server))
        model.gate.set()
        assert client.answer().json()["choices"][0]["text"] == answer("a" * 50, 9)
    lengths = sorted(path.stat().st_size for path in tmp_path.iterdir())
    assert lengths == [47, 59]
    again = Prefixes(len, 10_000, Folder(tmp_path), 10_000)
    found = again.find([97] * 48)
    assert found is not None
    assert (found.n, found.cache) == (47, [97] * 47)


def test_the_end_does_not_wait_for_ever() -> None:
    with held() as server:
        server.server.config.timeout_graceful_shutdown = 1
        client = connect(server, max_tokens=900)
        until(lambda: server.worker.running == 1)
        start = time.monotonic()
        server.stop()
        until(lambda: server.worker.alive is False)
        assert time.monotonic() - start < 10
    client.close()
