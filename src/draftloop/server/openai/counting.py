"""Requests that are refused before anybody answers them, counted.

Contract: a request whose fields are wrong or cannot act counts once, as refused; the worker counts those that
reach it. Must not know what fields there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from draftloop.server.figures import Outcome
from draftloop.server.openai.errors import ApiError
from draftloop.server.service import get_service

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.requests import Request
    from starlette.responses import Response


class CountedRoute(APIRoute):
    """A route whose refusals are counted."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's, watched."""
        handle = super().get_route_handler()

        async def counted(request: Request) -> Response:
            try:
                return await handle(request)
            except (ApiError, HTTPException, RequestValidationError):
                get_service(request).worker.figures.ended(Outcome.REFUSED)
                raise

        return counted
