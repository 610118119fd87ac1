"""The server as a process: its socket, its signals, its log."""

from __future__ import annotations

import copy
import ipaddress
import os
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.config import LOGGING_CONFIG

from kvc.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """A socket that the server will listen on, so that a port in use is known at once.

    Raises:
        ConfigError: If the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once only where a socket says that it is of TCP.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"serve: cannot listen on {host}, port {port}: {why}") from None
    return bound


def address(bound: socket.socket) -> str:
    """Where clients find the server."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def run(app: Starlette, bound: socket.socket, patience: int, quiet: bool) -> None:
    """Serves until SIGTERM or SIGINT; then what runs has `patience` seconds to end.

    A second signal ends the process at once.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=_log_config(),
        log_level="warning" if quiet else "info",
        access_log=not quiet,
        timeout_graceful_shutdown=patience,
    )
    _Server(config).run(sockets=[bound])


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends with what runs, the first time."""
        if self.should_exit:
            # Nothing is half-written by that: files appear whole.
            os._exit(128 + sig)
        self.should_exit = True


def _log_config() -> dict[str, Any]:
    """The settings of uvicorn's log, with all lines on standard error."""
    config = copy.deepcopy(LOGGING_CONFIG)
    for handler in config["handlers"].values():
        handler["stream"] = "ext://sys.stderr"
    return config
