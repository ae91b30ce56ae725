"""The dashboard's addresses: the page, its files, the JSON below `/api`.

Contract: everything comes from this machine and nothing else may be loaded (Content-Security-Policy). The
JSON is for the page alone: no other site's page reads or changes anything, not even one that may use the API.
Must not know what is shown.
"""

from __future__ import annotations

import asyncio
import logging
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from draftloop.errors import DraftloopError, InputError, RecordLost
from draftloop.server.dashboard import changes, content
from draftloop.server.openai.errors import error_response
from draftloop.server.service import Service, get_service
from draftloop.server.tickets import ShuttingDown

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.resources.abc import Traversable

logger = logging.getLogger(__name__)

MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def only_the_page(request: Request) -> None:
    """Refuse other sites' pages: a browser says whose page asks, and none sends JSON elsewhere unasked.

    Raises:
        HTTPException: 403 for another site's page, 415 for a change that is not JSON.
    """
    headers = request.headers
    origin = headers.get("origin")
    own = origin is None or urlsplit(origin).netloc == headers.get("host")
    if not own or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "Only the dashboard's own page may ask here")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind != "application/json":
        raise HTTPException(415, "The content type must be application/json")


# The page's own addresses change with it: they are no part of the API that others script against.
router = APIRouter(include_in_schema=False)
api = APIRouter(prefix="/api", dependencies=[Depends(only_the_page)])
The = Annotated[Service, Depends(get_service)]


@router.get("/")
def page() -> Response:
    """The page."""
    return Response(_static("index.html").read_bytes(), media_type="text/html", headers=HEADERS)


@router.get("/dashboard/{name}")
def asset(name: str) -> Response:
    """One of the page's files; the look is the report's."""
    found = _assets().get(name)
    if found is None:
        return _refusal(404, f"there is no file {name}")
    return Response(found.read_bytes(), media_type=MEDIA_TYPES[name.rpartition(".")[2]], headers=HEADERS)


@api.get("/state")
def state(service: The) -> Response:
    """How things stand."""
    return _told(lambda: content.state_of(service))


@api.get("/history")
def history(service: The) -> Response:
    """Figures over requests."""
    return _told(lambda: content.history_of(service))


@api.get("/conversations")
def conversations(service: The, before: Annotated[int | None, Query(ge=1)] = None) -> Response:
    """A page of stored requests."""
    return _told(lambda: content.conversations_of(service, before))


@api.get("/conversations/{identity}")
def conversation(service: The, identity: int) -> Response:
    """One stored request."""
    return _told(lambda: content.conversation_of(service, identity))


@api.get("/adapters")
def adapters(service: The) -> Response:
    """The pair's adapters."""
    return _told(lambda: content.adapters_of(service))


@api.get("/training")
def training(service: The) -> Response:
    """What training waits for, and its runs."""
    return _told(lambda: content.training_of(service))


@api.post("/adapters/{name}/promote")
async def promote(service: The, name: str) -> Response:
    """Make an adapter the active one."""
    return await _changed(service, lambda: changes.promote(service, name))


@api.post("/revert")
async def revert(service: The) -> Response:
    """Take the active adapter back."""
    return await _changed(service, lambda: changes.revert(service))


router.include_router(api)


async def _changed(service: Service, change: Callable[[], str]) -> Response:
    """Do it; the draft follows when nobody is being answered."""
    response = await run_in_threadpool(_told, lambda: {"message": change()})
    if response.status_code == 200:
        _follow(service)
    return response


def _follow(service: Service) -> None:
    """Let the draft wear it, so that the page shows it; every request looks by itself, too.

    Who is being answered may be so for minutes: nobody waits for that.
    """
    try:
        following = asyncio.ensure_future(service.worker.call(lambda engine: engine.follow_adapter()))
        following.add_done_callback(_say_failure)
    except ShuttingDown as error:
        logger.info("the dashboard: %s", error)


def _say_failure(following: asyncio.Future[None]) -> None:
    error = None if following.cancelled() else following.exception()
    if error is not None:
        logger.warning("the draft goes on with what it wears: %s", error)


def _told(what: Callable[[], dict[str, Any]]) -> Response:
    try:
        return JSONResponse(what(), headers=HEADERS)
    except RecordLost as error:
        return _refusal(404, str(error))
    except InputError as error:
        return _refusal(400, str(error))
    except DraftloopError as error:
        logger.warning("the dashboard: %s", error)
        return _refusal(500, str(error))


def _refusal(status: int, message: str) -> Response:
    return error_response(status, message, headers=HEADERS)


def _assets() -> dict[str, Traversable]:
    """The files that the page loads, by name."""
    own = {one.name: one for one in _static("").iterdir() if one.name.rpartition(".")[2] in MEDIA_TYPES}
    return {**own, "report.css": files("draftloop.reporting") / "templates" / "report.css"}


def _static(name: str) -> Traversable:
    return files("draftloop.server.dashboard") / "static" / name
