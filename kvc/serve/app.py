"""The routes of the server, and the answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvc.serve.answers import ChatForm, Form, TextForm, usage
from kvc.serve.errors import APIError, refused
from kvc.serve.jobs import Job
from kvc.serve.limits import Guard, read_body
from kvc.serve.metrics import Counted, Metrics
from kvc.serve.openapi import describe
from kvc.serve.prompts import Reader
from kvc.serve.protocol import ChatRequest, CompletionRequest, Model, ModelList, Sampling
from kvc.serve.sse import SILENCE, EventStream, Mailbox, event, gone
from kvc.serve.worker import Worker

R = TypeVar("R", bound=BaseModel)
# Below these a library's sampler would leave its numbers, or leave no token: the likeliest is all
# that there is to be drawn.
LEAST_TEMP, LEAST_TOP_P = 1e-3, 1e-4
CLOSED = 499  # nobody reads it; the log and the metrics show that the client went away


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a server.

    Attributes:
        name: What requests call the model.
        context: Tokens of a prompt and its answer together, at most; None where nobody knows.
        max_tokens: Of an answer, where the request does not say.
        max_body: Bytes of a request.
        api_key: What clients must show; None asks for nothing.
    """

    name: str
    context: int | None
    max_tokens: int
    max_body: int
    api_key: str | None = None


class Server:
    """Answers requests by a worker that has loaded its model."""

    def __init__(
        self, worker: Worker, reader: Reader, settings: Settings, metrics: Metrics
    ) -> None:
        self.worker, self.reader, self.settings, self.metrics = worker, reader, settings, metrics
        self.created = int(time.time())
        # Long texts take seconds, and tokenizers are not made for several threads.
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        metrics.watch("jobs_running", "Jobs in the batch.", lambda: worker.running)
        metrics.watch("jobs_waiting", "Jobs that wait for their turn.", lambda: worker.waiting)
        if (stored := worker.prefixes) is not None:
            metrics.watch("prefixes", "Stored caches of prompts.", lambda: len(stored))
            metrics.watch("prefix_bytes", "Their bytes in memory.", lambda: stored.nbytes)
            metrics.watch("prefix_file_bytes", "Their bytes in files.", lambda: stored.file_bytes)

    def app(self) -> Starlette:
        """The application of ASGI."""
        routes = [
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]
        return Starlette(
            routes=routes,
            lifespan=self._life,
            middleware=[
                Middleware(Counted, metrics=self.metrics),
                Middleware(Guard, key=self.settings.api_key),
            ],
            exception_handlers={
                APIError: _api_error,
                HTTPException: _http_error,
                ClientDisconnect: _closed,
                Exception: _bug,
            },
        )

    @asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        """Ends the worker when all connections are closed, which may write files."""
        yield
        await asyncio.to_thread(self.worker.close)
        self._tokenizing.shutdown()

    async def _completion(self, request: Request) -> Response:
        asked = await self._read(request, CompletionRequest)
        prompt = asked.prompt
        read = self.reader.text if isinstance(prompt, str) else self.reader.tokens
        ids = await self._in_thread(read, prompt)
        form = TextForm(f"cmpl-{uuid.uuid4().hex}", self.settings.name)
        return await self._answer(request, asked, ids, (), asked.max_tokens or 16, form)

    async def _chat(self, request: Request) -> Response:
        asked = await self._read(request, ChatRequest)
        messages = [message.plain() for message in asked.messages]
        ids, cut = await self._in_thread(self.reader.chat, messages)
        form = ChatForm(f"chatcmpl-{uuid.uuid4().hex}", self.settings.name)
        most = asked.max_completion_tokens or asked.max_tokens or self.settings.max_tokens
        return await self._answer(request, asked, ids, (cut,), most, form)

    async def _read(self, request: Request, kind: type[R]) -> R:
        body = await read_body(request, self.settings.max_body)
        try:
            asked = kind.model_validate_json(body)
        except ValidationError as error:
            raise refused(error) from None
        name = getattr(asked, "model", None)
        if name is not None:
            self._check_name(name)
        return asked

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, partial(work, *args))

    async def _answer(
        self,
        request: Request,
        asked: Sampling,
        ids: list[int],
        cuts: tuple[int, ...],
        max_tokens: int,
        form: Form,
    ) -> Response:
        mailbox = Mailbox()
        temp = 1.0 if asked.temperature is None else asked.temperature
        top_p = 1.0 if asked.top_p is None else asked.top_p
        job = Job(
            ids=ids,
            cuts=cuts,
            max_tokens=self._room(len(ids), max_tokens),
            temp=temp if temp > LEAST_TEMP else 0.0,
            top_p=max(top_p, LEAST_TOP_P),
            seed=None if asked.seed is None else asked.seed % 2**63,
            stop=asked.texts_that_stop,
            deliver=mailbox.deliver,
        )
        self.worker.submit(job)
        if asked.stream:
            events = _events(mailbox, form, asked.wants_usage)
            return EventStream(events, lambda: self.worker.cancel(job))
        answer = asyncio.ensure_future(mailbox.whole())
        left = asyncio.ensure_future(gone(request))
        try:
            await asyncio.wait([answer, left], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.worker.cancel(job)
            left.cancel()
            answer.cancel()
        if not answer.done():
            return Response(status_code=CLOSED)
        update = answer.result()
        if update.error:
            raise update.error
        return JSONResponse(form.whole(update))

    def _room(self, n: int, max_tokens: int) -> int:
        """How many tokens may be generated behind a prompt of `n`."""
        context = self.settings.context
        if context is None:
            return max_tokens
        if n >= context:
            raise APIError(
                400,
                f"the prompt has {n} tokens, the model's context {context}; shorten it",
                code="context_length_exceeded",
            )
        return min(max_tokens, context - n)

    def _check_name(self, name: str) -> None:
        if name != self.settings.name:
            raise APIError(
                404,
                f"model: expected {self.settings.name}, got {name[:100]!r}",
                param="model",
                code="model_not_found",
            )

    def _listed(self) -> Model:
        return Model(id=self.settings.name, created=self.created, owned_by="kvc")

    async def _models(self, request: Request) -> Response:
        return JSONResponse(ModelList(data=[self._listed()]).model_dump())

    async def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._listed().model_dump())

    async def _health(self, request: Request) -> Response:
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "ended"}, 200 if alive else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(describe(self.settings.api_key is not None))


async def _events(mailbox: Mailbox, form: Form, wants_usage: bool) -> AsyncIterator[bytes]:
    """A job's updates as OpenAI's events."""
    more = {"usage": None} if wants_usage else {}
    if first := form.first():
        yield event(first | more)
    while True:
        try:
            async with asyncio.timeout(SILENCE):
                update = await mailbox.get()
        except TimeoutError:
            yield b": it goes on\n\n"
            continue
        if update.text:
            yield event(form.piece(update.text) | more)
        if update.error:
            yield event(update.error.body())
            return
        if update.finish:
            yield event(form.piece("", update.finish) | more)
            if wants_usage:
                yield event(
                    form.piece("") | {"choices": [], "usage": usage(update.counts).model_dump()}
                )
            yield event("[DONE]")
            return


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return APIError(error.status_code, message, code=code, headers=error.headers).response()


async def _bug(request: Request, error: Exception) -> Response:
    """What is not foreseen; starlette raises it again, and it is logged."""
    return APIError(500, "the server failed; see its log", code="failed").response()


async def _closed(request: Request, error: Exception) -> Response:
    return Response(status_code=CLOSED)
