"""Plain HTTP for what the `openai` package hides: bytes, headers, connections that end too early."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, whose shape is checked."""
        (error,) = self.json.values()
        assert list(self.json) == ["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return dict(error)

    @property
    def events(self) -> list[Any]:
        """The data of each event; `[DONE]` as it is."""
        *events, rest = self.body.decode().split("\n\n")
        assert rest == ""
        data = [event.removeprefix("data: ") for event in events]
        return [one if one == "[DONE]" else json.loads(one) for one in data]


def ask(address: str, path: str, body: object = None, *, method: str | None = None, **headers: str) -> Reply:
    """One request; a body is sent as JSON unless it is bytes."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kinds = {} if body is None else {"Content-Type": "application/json"}
    try:
        connection.request(
            method or ("GET" if body is None else "POST"),
            path,
            sent,
            kinds | {name.replace("_", "-"): value for name, value in headers.items()},
        )
        response = connection.getresponse()
        return Reply(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def chat_body(text: str = "Hello", **fields: object) -> dict[str, object]:
    """A chat request."""
    return {"model": "draftloop", "messages": [{"role": "user", "content": text}], **fields}
