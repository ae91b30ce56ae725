"""Errors in the OpenAI API's shape, whoever raises them.

Contract: `{"error": {"message", "type", "param", "code"}}` for every status above 399. Must not know any
route. Messages carry no prompt text.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from draftloop.errors import ContextFull, DraftloopError, GrammarFailed, InputError
from draftloop.server.openai.wording import reason_of, unknown
from draftloop.server.tickets import Cancelled, QueueFull, ShuttingDown, TimedOut

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fastapi import FastAPI
    from starlette.requests import Request

INVALID, SERVER, RATE = "invalid_request_error", "server_error", "rate_limit_error"
CONTRADICTION = "contradiction"
"""Type of validation's errors about fields that do not go together; they have a `param` and a `reason`."""

CLIENT_GONE = 499
"""Nobody reads it; a log does, in which it is nobody's failure."""

_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: RATE,
}


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field that is wrong, as in `messages[0].content`."""
    code: str | None


class ErrorReply(BaseModel):
    """The answer to a request that failed."""

    error: ErrorBody


_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "A web page, or a name for this machine, that may not ask here.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "As many requests wait as may; `Retry-After` says when to come back.",
    500: "Something failed here; the log tells what.",
    503: "The server is shutting down.",
    504: "The answer was not there in time.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: what it may answer beside 200."""
    replies: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": _MEANINGS[status]} for status in statuses
    }
    if 429 in replies:
        seconds = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
        replies[429]["headers"] = {"Retry-After": seconds}
    return replies


class ApiError(Exception):
    """A request that cannot be served.

    Args:
        message: what is wrong and what would be right, whole sentences.
        param: the field.
        code: a word for programs.
        status: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = HTTPStatus.BAD_REQUEST,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


def error_body(message: str, *, status: int, param: str | None = None, code: str | None = None) -> str:
    """The error as JSON, in ASCII: a field's name that no encoding knows must not break it."""
    kind = _TYPES.get(status, INVALID if status < HTTPStatus.INTERNAL_SERVER_ERROR else SERVER)
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer that says what went wrong."""
    body = error_body(message, status=status, param=param, code=code)
    return Response(body, status, headers, media_type="application/json")


def described(error: Exception) -> ApiError:
    """Status, field and words of whatever ended an answer."""
    match error:
        case ApiError():
            return error
        case ContextFull():
            return ApiError(str(error), code="context_length_exceeded")
        case InputError():
            return ApiError(str(error))
        case GrammarFailed():
            return ApiError(str(error), code="grammar_failed")
        case QueueFull():
            status, code = int(HTTPStatus.TOO_MANY_REQUESTS), "rate_limit_exceeded"
        case ShuttingDown():
            status, code = HTTPStatus.SERVICE_UNAVAILABLE, "shutting_down"
        case TimedOut():
            status, code = HTTPStatus.GATEWAY_TIMEOUT, "timeout"
        case Cancelled():
            status, code = CLIENT_GONE, "cancelled"
        case DraftloopError():
            status, code = HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error"
        case _:
            unexpected = f"Unexpected {type(error).__name__}. The server's log tells where."
            return ApiError(unexpected, code="internal_error", status=HTTPStatus.INTERNAL_SERVER_ERROR)
    return ApiError(str(error), code=code, status=status)


def response_to(error: Exception) -> Response:
    """The answer to a request that `error` ended."""
    told = described(error)
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, QueueFull) else None
    return error_response(told.status, told.message, param=told.param, code=told.code, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Every error of the application's routes comes out in this shape."""

    async def of_ours(_: Request, error: Exception) -> Response:
        return response_to(error)

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(
            error.status_code,
            _sentence(error, request.app.openapi()["paths"]),
            code=_HTTP_CODES.get(error.status_code),
            headers=error.headers,
        )

    async def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        if isinstance(error.body, bytes):
            # Any page may have a browser send a body of another type, unasked: such are not read.
            given = request.headers.get("content-type")
            sent = f"is declared as {given}" if given else "has no content type"
            return error_response(
                HTTPStatus.BAD_REQUEST,
                f"The body {sent}. Send the header Content-Type: application/json.",
                code="invalid_content_type",
            )
        taken = getattr(request.scope.get("route"), "body_field", None)
        model = None if taken is None else taken.field_info.annotation
        return response_to(refusal_of(error.errors(), error.body, model))

    for kind in (ApiError, DraftloopError, Exception):
        app.add_exception_handler(kind, of_ours)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)


_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}


def _sentence(error: HTTPException, paths: Iterable[str]) -> str:
    if error.status_code == HTTPStatus.NOT_FOUND:
        known = ", ".join(path for path in paths if path.startswith("/v1/"))
        return f"There is nothing at this address. The API's addresses are {known}."
    return f"{error.detail}."


def refusal_of(errors: Sequence[Mapping[str, Any]], body: object, model: object) -> ApiError:
    """What validation has to say, about the field that it knows most about.

    Args:
        errors: pydantic's.
        body: what was sent.
        model: pydantic's of what may be sent; None where nothing may.
    """
    if not isinstance(body, dict) and any(one["loc"][0] == "body" for one in errors):
        return ApiError(_no_object(errors[0], body), code="invalid_json")
    located = [(field_of(one, body), one) for one in errors]
    param, first = max(located, key=_told_by)
    kind, context = first["type"], first.get("ctx", {})
    if kind == CONTRADICTION:
        param, reason = context["param"], context["reason"]
        return ApiError(f"{param}: {reason}.", param=param, code="invalid_value")
    if kind == "extra_forbidden":
        return ApiError(unknown(param, model), param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(f"{param} is missing.", param=param, code="missing_required_parameter")
    reason = reason_of(param, [first, *(one for where, one in located if where == param)])
    named = f"{param}: {reason}." if param else f"{reason}."
    return ApiError(named, param=param or None, code="invalid_value")


def _no_object(error: Mapping[str, Any], body: object) -> str:
    """What is wrong with a body that is no object."""
    if error["type"] == "json_invalid" and isinstance(body, str):
        before = body[: error["loc"][1]]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        return f"The body is no JSON, from line {line}, column {column} on: {error['ctx']['error']}."
    if error["type"] == "missing" or body is None:
        return "The body is empty, or null. Send a JSON object."
    return "The body is not a JSON object."


def _told_by(located: tuple[str, Mapping[str, Any]]) -> tuple[bool, int, bool]:
    """How much an error tells: of the kinds that a field may have, the one that was meant got furthest.

    What is missing may be there under another name, and that tells more.
    """
    param, error = located
    return (
        not str(error["type"]).endswith("_type"),
        param.count(".") + param.count("["),
        error["type"] != "missing",
    )


def field_of(error: Mapping[str, Any], body: object) -> str:
    """Where an error is, in the words of who sent the body: `messages[0].content`.

    Pydantic's path also names the kinds that it tried, which are no part of the body.
    """
    path: list[str | int] = []
    value = body
    where, *steps = error["loc"]
    if where != "body":
        # A part of the address has its name alone.
        return _written(steps)
    for index, step in enumerate(steps):
        if isinstance(value, dict) and (
            step in value or (index == len(steps) - 1 and error["type"] == "missing")
        ):
            path.append(step)
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            path.append(step)
            value = value[step]
    if error["type"].startswith("union_tag"):
        path.append(str(error["ctx"]["discriminator"]).strip("'"))
    return _written(path)


def _written(path: Iterable[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text
