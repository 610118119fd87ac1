"""Updates of a job as server-sent events, to readers of any speed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kvc.serve.jobs import Update

SILENCE = 15.0  # seconds after which a comment keeps proxies from closing a connection
PATIENCE = 60.0  # seconds that a reader may leave a piece unread


class Mailbox:
    """Updates from the engine's thread, for one coroutine.

    What is not read yet is joined, so that a slow reader costs no more than the text of its answer
    and stops nobody.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._texts: list[str] = []
        self._last: Update | None = None

    def deliver(self, update: Update) -> None:
        """Takes an update; from any thread."""
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._put, update)

    def _put(self, update: Update) -> None:
        self._texts.append(update.text)
        if update.finish or update.error:
            self._last = update
        self._news.set()

    async def get(self) -> Update:
        """All the text that came, with the end if that came too; waits for something."""
        await self._news.wait()
        self._news.clear()
        text = "".join(self._texts)
        self._texts.clear()
        last = self._last or Update()
        return Update(text, last.finish, last.counts, last.error)

    async def whole(self) -> Update:
        """The end, with all the text before it."""
        texts = []
        while True:
            update = await self.get()
            texts.append(update.text)
            if update.finish or update.error:
                return Update("".join(texts), update.finish, update.counts, update.error)


async def gone(request: Request) -> None:
    """Waits until the client goes away. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(data: Any) -> bytes:
    """One event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class EventStream(Response):
    """Sends events as they come, until they end or the client goes away or reads no more.

    `close` is called then, even if no event was asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Races the events against the client's leaving."""
        tasks = [
            asyncio.ensure_future(self._send(send)),
            asyncio.ensure_future(gone(Request(scope, receive))),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()
        if not tasks[0].cancelled():
            tasks[0].result()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._patiently(send, start)
        async for piece in self.events:
            body = {"type": "http.response.body", "body": piece, "more_body": True}
            if not await self._patiently(send, body):
                return
        await self._patiently(send, {"type": "http.response.body", "body": b""})

    async def _patiently(self, send: Send, message: Message) -> bool:
        """Sends; False where the reader took too long."""
        try:
            async with asyncio.timeout(PATIENCE):
                await send(message)
        except TimeoutError:
            return False
        return True
