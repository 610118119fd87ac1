"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "kvc_requests",
            "Answers by their status of HTTP.",
            ["path", "status"],
            registry=registry,
        )
        self.tokens = Counter(
            "kvc_tokens",
            "Tokens of prompts that were processed, that came from a stored cache, and generated.",
            ["kind"],
            registry=registry,
        )
        self.cancelled = Counter("kvc_cancelled", "Jobs whose client went away.", registry=registry)
        self.first_token = Histogram(
            "kvc_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "kvc_job_seconds",
            "From a request's arrival to its last token.",
            buckets=SECONDS,
            registry=registry,
        )

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Shows a value as it is when it is asked for."""
        Gauge(f"kvc_{name}", what, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self.registry)


class Counted:
    """Counts the answers of an application.

    Args:
        app: The application.
        metrics: Where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on and counts its answer."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in PATHS else "other"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)
