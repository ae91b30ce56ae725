"""Signals to a server that is answering: what is finished, what is sent away, what is stored."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING

import pytest
from servers import WAIT_S, Running, running
from traffic import Target, read_reply, read_status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

TOKENS = 1200
"""Answers this long take toys seconds: time enough to send signals in between."""
SETTINGS = {
    "backend": "numpy",
    "speculative.schedule": "fixed",
    "generation.max_tokens": TOKENS,
    "generation.min_tokens": TOKENS,
    "memory.answers_at_once": 1,
    "storage.directory": "data",
}


@pytest.fixture
def server(
    toy_pair: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    target, draft = toy_pair()
    values = {**SETTINGS, "models.target.name": target, "models.draft.name": draft}
    options = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    with running(options, tmp_path) as one:
        yield one


@asynccontextmanager
async def asking(server: Running) -> AsyncIterator[asyncio.StreamReader]:
    """What comes back for one long answer, as a stream."""
    target = Target(server.port, server.model, TOKENS, ("Hello",))
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(target.post(target.chat(random.Random(0), stream=True, max_tokens=TOKENS)))
    yield reader
    writer.close()


async def until(server: Running, **wanted: int) -> None:
    figures = await server.figures()
    while any(figures[key] != value for key, value in wanted.items()):
        figures = await server.figures()


async def until_refused(server: Running) -> None:
    with suppress(ConnectionError):
        while True:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.close()


def stored(folder: Path) -> list[tuple[str, int]]:
    """How each stored request ended, and its rounds; the database that a server left behind is whole."""
    with closing(sqlite3.connect(folder / "data" / "draftloop.sqlite")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return list(connection.execute("SELECT finish_reason, rounds FROM requests ORDER BY id"))


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_what_streams_is_finished_and_who_waits_is_sent_away(
    server: Running, tmp_path: Path, sign: signal.Signals
) -> None:
    async def ask() -> tuple[bytes, int, bytes]:
        async with asking(server) as streams:
            assert await read_status(streams) == 200
            async with asking(server) as waits:
                await until(server, requests_active=1, requests_queued=1)
                server.process.send_signal(sign)
                status, body = await read_reply(waits)
            await until_refused(server)
            return await streams.read(), status, body

    text, status, body = asyncio.run(ask())
    assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
    assert b"data: [DONE]" in text
    assert server.process.wait(WAIT_S) == 0
    assert [reason for reason, _ in stored(tmp_path)] == ["length"]
    assert "Traceback" not in "".join(server.said)


def test_the_second_signal_ends_at_once_and_stores_what_was_said(server: Running, tmp_path: Path) -> None:
    async def ask() -> bytes:
        async with asking(server) as streams:
            assert await read_status(streams) == 200
            while (await server.figures())["tokens_total completion"] == 0:
                pass
            server.process.send_signal(signal.SIGINT)
            while not any("stopping" in line for line in server.said):
                await asyncio.sleep(0)
            server.process.send_signal(signal.SIGINT)
            with suppress(ConnectionResetError):
                return await streams.read()
        return b""

    assert b"[DONE]" not in asyncio.run(ask())
    assert server.process.wait(WAIT_S) == 130
    ((reason, rounds),) = stored(tmp_path)
    assert reason == "cancelled"
    assert 0 < rounds < TOKENS
    assert "Traceback" not in "".join(server.said)
