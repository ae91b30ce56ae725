"""Real sockets: a reader that stalls, ports, and what uvicorn's log may say."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from draftloop.config.schema import ServerSettings
from draftloop.errors import InputError
from draftloop.server.logs import WithoutWords
from draftloop.server.serving import bind, make_server, url_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send

    from draftloop.server.worker import Worker

WAIT_S = 20


@contextmanager
def serving(app: ASGIApp, worker: Worker, **settings: float) -> Iterator[int]:
    """Serve in a thread; gives the port."""
    bound, started = bind("127.0.0.1", 0), threading.Event()
    server = make_server(app, worker, ServerSettings(**settings), started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    assert started.wait(WAIT_S)
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


async def answer_lifespan(receive: Receive, send: Send) -> None:
    for word in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{word}.complete"})


def test_a_reader_that_takes_nothing_is_cut_off(make_worker: Callable[..., Worker]) -> None:
    """The route hears of it, and the connection is gone although nobody ever read its last bytes."""
    gone = threading.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        hears = asyncio.create_task(receive())
        while not hears.done():
            await send({"type": "http.response.body", "body": b"a" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        if hears.result()["type"] == "http.disconnect":
            gone.set()

    with serving(endless, make_worker(), stall_timeout_s=0.1) as port, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert gone.wait(WAIT_S)


def test_a_slow_reader_that_takes_something_gets_everything(make_worker: Callable[..., Worker]) -> None:
    size = 8_000_000

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a" * size})

    with serving(whole, make_worker(), stall_timeout_s=2.0) as port, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        total = 0
        while piece := client.recv(50_000):
            total += len(piece)
    assert total > size


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 cannot be used.*in use"):
            bind("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be used"):
        bind("192.0.2.1", 0)
    with pytest.raises(InputError, match="cannot be found"):
        bind("no.such.name.invalid", 0)


def test_where_clients_find_it() -> None:
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert url_of("127.0.0.1", bound) == f"http://127.0.0.1:{port}"
        assert url_of("::1", bound) == f"http://[::1]:{port}"
        assert url_of("0.0.0.0", bound) == f"http://{socket.gethostname()}:{port}"


def test_tracebacks_of_other_libraries_lose_their_words(caplog: pytest.LogCaptureFixture) -> None:
    words = "what somebody asked"

    def fail() -> None:
        try:
            raise KeyError(words)
        except KeyError as error:
            raise ValueError(words) from error

    logger = logging.getLogger("somebody.else")
    logger.addFilter(WithoutWords())
    with caplog.at_level(logging.ERROR, "somebody.else"):
        try:
            fail()
        except ValueError as error:
            logger.error("Exception in ASGI application\n", exc_info=error)
    assert words not in caplog.text
    assert "ValueError" in caplog.text
    assert "KeyError" in caplog.text
    assert "in fail" in caplog.text
