"""What stands before every route: who may ask, from where, and how much.

Contract: plain ASGI, nothing of a body is read before the caller is known. What is refused gets an error in
the API's shape. Must not know any route but those that need no key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from draftloop.server.openai.errors import error_response

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from draftloop.config.schema import ServerSettings

KEYLESS_PATHS = ("/", "/health", "/ready")
KEYLESS_FOLDER = "/dashboard/"
"""The dashboard's page and its files hold nothing; what the page shows it asks for with the key."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
MEGABYTE = 1_000_000
REFUSALS = (401, 403, 408, 413)
"""The statuses of what is refused here. Of the routes only the dashboard's give one of them, 403, to another
site's page; that is counted likewise."""


def add_guards(app: FastAPI, server: ServerSettings, refused: Callable[[int], None]) -> None:
    """Put every guard before the application's routes, the last one outermost.

    Args:
        app: whose.
        server: the settings.
        refused: told the status of each request that a guard refuses.
    """
    app.add_middleware(
        BodyGuard,
        max_bytes=server.max_body_megabytes * MEGABYTE,
        stall_timeout_s=server.stall_timeout_s,
    )
    if server.api_key is not None:
        app.add_middleware(KeyGuard, api_key=server.api_key)
    if server.cors_origins:
        # A browser asks whether it may before it sends the key, so this stands before that.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(OriginGuard, origins=server.cors_origins)
    if is_loopback(server.host):
        app.add_middleware(HostGuard)
    app.add_middleware(RefusalCounter, refused=refused)


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached, or meant, by that name."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RefusalCounter:
    """Stands before the guards and tells of what they refuse."""

    def __init__(self, app: ASGIApp, refused: Callable[[int], None]) -> None:
        self._app = app
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in REFUSALS:
                self._refused(message["status"])
            await send(message)

        await self._app(scope, receive, told)


class HostGuard:
    """Takes requests that name this machine only: against DNS rebinding.

    A web page whose own name was made to point here sends that name in `Host`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if host is not None and not is_loopback(_name_of(host)):
            refusal = error_response(
                403,
                "The Host header names another machine. Ask at localhost, or let server.host name the "
                "address that clients use.",
                code="host_not_allowed",
            )
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


class OriginGuard:
    """Takes what changes or costs something from no web page but its own and those allowed.

    A browser lets any page send a simple POST anywhere; that it could not read the answer helps little.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS and not self._allowed(scope):
            refusal = error_response(
                403,
                "Web pages of this origin may not ask here. Add it to server.cors_origins if they shall.",
                code="origin_not_allowed",
            )
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return True
        return origin.partition("://")[2] == headers.get("host")


class KeyGuard:
    """Takes requests that carry the key as `Authorization: Bearer …`; compared in constant time."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = api_key.encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] != "http" or _needs_no_key(scope["path"]) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        refusal = error_response(
            401,
            "The API key is missing or wrong. Send it as: Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._expected)


class BodyGuard:
    """Bounds a request's body, whatever length it announces, and the patience with who sends it."""

    def __init__(self, app: ASGIApp, max_bytes: int, stall_timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._stall_timeout_s = stall_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await self._refuse(413, scope, receive, send)
            return
        body = _Body(self, receive, send)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            # What unwound a route whose body is refused is that refusal, however the route wrapped it.
            if body.refused is None:
                raise
        if body.refused is not None and not body.answered:
            await self._refuse(body.refused, scope, receive, send)

    async def read(self, receive: Receive) -> Message | None:
        """The next piece of a body; None where none came in time."""
        try:
            return await asyncio.wait_for(receive(), self._stall_timeout_s)
        except TimeoutError:
            return None

    @property
    def max_bytes(self) -> int:
        """The longest body."""
        return self._max_bytes

    async def _refuse(self, status: int, scope: Scope, receive: Receive, send: Send) -> None:
        messages = {
            408: ("The body did not come in time.", "request_timeout"),
            413: (
                f"The body has more than {self._max_bytes} bytes (server.max_body_megabytes).",
                "body_too_large",
            ),
        }
        message, code = messages[status]
        # The rest of the body is not read, so that nothing can follow it.
        refusal = error_response(status, message, code=code, headers={"Connection": "close"})
        await refusal(scope, receive, send)


class _BodyRefused(Exception):
    """Unwinds the route that reads a body; nobody else sees it."""


class _Body:
    """One request's `receive` and `send`, watched.

    Attributes:
        refused: the status to answer with, once something is wrong.
        answered: whether the route has begun to answer.
    """

    def __init__(self, guard: BodyGuard, receive: Receive, send: Send) -> None:
        self.refused: int | None = None
        self.answered = False
        self._guard = guard
        self._receive = receive
        self._send = send
        self._bytes = 0
        self._complete = False

    async def receive(self) -> Message:
        """The next message; raises where the body is refused."""
        if self._complete:
            return await self._receive()
        message = await self._guard.read(self._receive)
        if message is None:
            self.refused = 408
            raise _BodyRefused
        self._bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._bytes > self._guard.max_bytes:
            self.refused = 413
            raise _BodyRefused
        return message

    async def send(self, message: Message) -> None:
        """Pass an answer on, unless it is one about a body that is refused."""
        if self.refused is None or self.answered:
            self.answered = True
            await self._send(message)


def _needs_no_key(path: str) -> bool:
    return path in KEYLESS_PATHS or path.startswith(KEYLESS_FOLDER)


def _name_of(host: str) -> str:
    """The name in a Host header, without its port; "" where it makes no sense."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
