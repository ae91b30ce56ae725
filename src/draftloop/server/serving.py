"""Sockets and signals: the application served until it is told to stop.

Contract: SIGTERM or the first Ctrl-C: nothing new is taken, who waits is sent away, what streams goes on for
`shutdown_timeout_s` at the most. The second one ends at once. A client that reads nothing for
`stall_timeout_s` is cut off. Must not know routes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from draftloop.errors import InputError
from draftloop.server.logs import WithoutWords

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp

    from draftloop.config.schema import ServerSettings
    from draftloop.server.worker import Worker

SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A socket of one's own, before anything slow is done; nobody is heard before `serve`.

    Raises:
        InputError: the port is in use, or the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(
            f"server.host = {host} cannot be found: {error.strerror}",
            remedy="Name an address of this machine.",
        ) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"port {port} of {host} cannot be used: {(error.strerror or str(error)).lower()}",
            remedy="Choose another one with --port; 0 takes a free one.",
        ) from None
    return bound


def url_of(host: str, bound: socket.socket) -> str:
    """Where clients find it: the name asked for, the port that was given."""
    port = bound.getsockname()[1]
    everywhere = host in ("0.0.0.0", "::")  # noqa: S104  # it is compared, not bound
    name = socket.gethostname() if everywhere else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def serve(
    app: ASGIApp, worker: Worker, settings: ServerSettings, bound: socket.socket, started: Callable[[], None]
) -> bool:
    """Serve until told to stop.

    Args:
        app: the application.
        worker: its models' thread.
        settings: the time-outs.
        bound: of `bind`.
        started: called once clients are heard.

    Returns:
        Whether what was being answered came to its end; false after a second signal.
    """
    server = make_server(app, worker, settings, started)
    server.run(sockets=[bound])
    return not server.force_exit


def make_server(
    app: ASGIApp, worker: Worker, server: ServerSettings, started: Callable[[], None]
) -> uvicorn.Server:
    """What `serve` runs. In another thread than the main one it hears no signals."""
    config = uvicorn.Config(
        app,
        http=_connections(server.stall_timeout_s),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(server.shutdown_timeout_s),
    )
    if not server.log_prompts:
        logging.getLogger("uvicorn.error").addFilter(WithoutWords())
    return _Server(config, worker, server.shutdown_timeout_s, started)


class _Server(uvicorn.Server):
    """uvicorn's, with signals as the contract has them."""

    def __init__(
        self, config: uvicorn.Config, worker: Worker, shutdown_timeout_s: float, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._worker = worker
        self._shutdown_timeout_s = shutdown_timeout_s
        self._tell_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._tell_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening and wait; the application's life is ended in any case."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear signals while serving; uvicorn's own way would raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def heard(*_: object) -> None:
            if self.force_exit:
                # Even the end takes too long for whoever asks a third time.
                raise KeyboardInterrupt
            loop.call_soon_threadsafe(self._stop)

        before = {one: signal.signal(one, heard) for one in SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _stop(self) -> None:
        """One more signal."""
        if self.should_exit:
            self.force_exit = True
            self._worker.stop(0)
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            return
        self.should_exit = True
        self._worker.drain()
        active = self._worker.snapshot().active
        if active:
            logger.info(
                "stopping: what is being answered may take another %g s; Ctrl-C again ends at once",
                self._shutdown_timeout_s,
            )


def _connections(stall_timeout_s: float) -> type[H11Protocol]:
    """Connections whose clients have so much time to read; uvicorn makes them from a class."""

    class Connection(Impatient):
        stall_s = stall_timeout_s

    return Connection


class Impatient(H11Protocol):
    """A connection that is cut where nothing of what waits to be sent is read for `stall_s`.

    The route hears that its client went away. A plain time-out around `send` would not do: asyncio's `close`
    waits for the very reader that does not read.
    """

    stall_s: ClassVar[float] = 60.0
    _check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Whatever the system's own buffer does not take counts as not read."""
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)

    def pause_writing(self) -> None:
        """The client does not keep up."""
        super().pause_writing()
        self._look_again(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._forget_check()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._forget_check()
        super().connection_lost(exc)

    def _look_again(self, unread_bytes: int) -> None:
        self._check = self.loop.call_later(self.stall_s, self._cut_if_stalled, unread_bytes)

    def _cut_if_stalled(self, unread_bytes: int) -> None:
        now_bytes = self.transport.get_write_buffer_size()
        if now_bytes < unread_bytes:
            self._look_again(now_bytes)
            return
        logger.debug("a client that reads nothing is cut off")
        self.transport.abort()

    def _forget_check(self) -> None:
        if self._check is not None:
            self._check.cancel()
            self._check = None
