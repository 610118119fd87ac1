"""Who may ask, and how much a request may be."""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from kvc.serve.errors import APIError

BODY_SECONDS = 60.0  # for all of a body to arrive
DRAIN = 8  # a body that is too long is read up to this many times the limit, to be answered


class Guard:
    """Lets requests with the key through, and all to /health.

    Args:
        app: What is guarded.
        key: The API key; None lets everyone through.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 401."""
        if scope["type"] == "http" and self.key is not None and scope["path"] != "/health":
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self.key.encode())
            if scheme.lower() != "bearer" or not same:
                error = APIError(
                    401,
                    "expected the header Authorization: Bearer with this server's API key",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request, read in pieces.

    What is too long is read on for a while, and thrown away: most clients hear an answer only when
    they have sent all.

    Raises:
        APIError: 408, 413 or 415, where it is slow, longer than `limit` bytes, or no JSON.
    """
    # Browsers send other kinds to a server on this machine from any page, without asking it.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= limit:
                    pieces.append(piece)
                else:
                    pieces.clear()
                if size > DRAIN * limit:
                    break
    except TimeoutError:
        raise APIError(
            408,
            f"body: it did not arrive in {BODY_SECONDS:.0f} seconds",
            code="timeout",
            headers={"Connection": "close"},
        ) from None
    if size > limit:
        raise APIError(
            413,
            f"body: expected at most {limit} bytes; send less",
            code="too_large",
            headers={"Connection": "close"},
        )
    if kind != "application/json":
        raise APIError(
            415, f"Content-Type: expected application/json, got {kind!r}", code="content_type"
        )
    return b"".join(pieces)
