"""What stands before the routes: keys, hosts, origins, bodies."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from draftloop.config.schema import ServerSettings
from draftloop.server.guards import add_guards, is_loopback

if TYPE_CHECKING:
    from collections.abc import Iterator

MEGABYTE = 1_000_000


def guarded(**settings: Any) -> TestClient:
    """An application that answers everything with what it was sent, behind the guards."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def echo(path: str, request: Request) -> dict[str, object]:
        return {"path": path, "bytes": len(await request.body())}

    add_guards(app, ServerSettings(**settings), lambda _: None)
    return TestClient(app, base_url="http://localhost:8080")


def error_of(response: Any) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_demanded_everywhere_but_where_nothing_is_told() -> None:
    client = guarded(api_key="let-me-in")
    for path in ("/v1/models", "/metrics", "/api/state", "/healthy", "/v1/chat/completions"):
        assert error_of(client.get(path)) == (401, "invalid_api_key")
        assert client.get(path, headers=bearer("let-me-in")).status_code == 200
    for path in ("/", "/health", "/ready", "/dashboard/dashboard.js"):
        assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    "header", ["let-me-in", "Bearer", "Bearer let-me-i", "Bearer let-me-in2", "Basic let-me-in"]
)
def test_what_is_not_the_key_is_refused(header: str) -> None:
    response = guarded(api_key="let-me-in").get("/v1/models", headers={"Authorization": header})
    assert error_of(response) == (401, "invalid_api_key")
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_key_may_be_any_text_and_the_word_bearer_in_any_case() -> None:
    client = guarded(api_key="schlüssel")
    headers = {b"authorization": b"bearer " + "schlüssel".encode()}
    assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "a.localhost"])
def test_names_of_this_machine_are_taken(host: str) -> None:
    assert guarded().get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "192.168.0.9", "[", "localhost.evil.example"]
)
def test_a_page_whose_name_was_made_to_point_here_is_refused(host: str) -> None:
    assert error_of(guarded().get("/v1/models", headers={"Host": host})) == (403, "host_not_allowed")


def test_beyond_loopback_any_name_may_be_ours() -> None:
    client = guarded(host="0.0.0.0", api_key="key")
    assert client.get("/v1/models", headers={"Host": "box.lan", **bearer("key")}).status_code == 200


def test_other_sites_pages_may_not_post() -> None:
    client = guarded()
    for origin in ("https://evil.example", "null", "http://localhost:3000"):
        response = client.post("/v1/models", headers={"Origin": origin})
        assert error_of(response) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in response.headers
    assert client.post("/v1/models", headers={"Origin": "http://localhost:8080"}).status_code == 200
    assert client.post("/v1/models").status_code == 200


def test_origins_that_are_named_may_and_are_asked_for_no_key_before() -> None:
    origin = "http://localhost:3000"
    client = guarded(cors_origins=[origin], api_key="key")
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = client.options("/v1/chat/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    assert client.post("/v1/x", headers={"Origin": origin, **bearer("key")}).status_code == 200
    refused = client.post("/v1/x", headers={"Origin": origin})
    assert error_of(refused) == (401, "invalid_api_key")
    assert refused.headers["access-control-allow-origin"] == origin
    assert (
        "access-control-allow-origin"
        not in client.get("/health", headers={"Origin": "https://evil.example"}).headers
    )


def test_a_body_is_bounded_by_what_it_announces() -> None:
    client = guarded(max_body_megabytes=1)
    assert client.post("/x", content=b"a" * MEGABYTE).json()["bytes"] == MEGABYTE
    assert error_of(client.post("/x", content=b"a" * (MEGABYTE + 1))) == (413, "body_too_large")


def test_a_body_that_announces_nothing_is_bounded_too() -> None:
    client = guarded(max_body_megabytes=1)
    taken: list[int] = []

    def pieces(count: int) -> Iterator[bytes]:
        for index in range(count):
            taken.append(index)
            yield b"a" * 100_000

    assert client.post("/x", content=pieces(10)).json()["bytes"] == MEGABYTE
    assert error_of(client.post("/x", content=pieces(11))) == (413, "body_too_large")


def test_a_body_that_never_comes_is_given_up() -> None:
    app = FastAPI()

    @app.post("/")
    async def echo(request: Request) -> int:
        return len(await request.body())

    add_guards(app, ServerSettings(stall_timeout_s=0.01), lambda _: None)
    sent: list[Any] = []

    async def ask() -> None:
        pieces = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive() -> Any:
            for piece in pieces:
                return piece
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
        await app(scope, receive, send)

    asyncio.run(ask())
    assert [message["status"] for message in sent if "status" in message] == [408]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "box.lan", "", "127.0.0.1.example"])
def test_beyond_loopback(host: str) -> None:
    assert not is_loopback(host)
