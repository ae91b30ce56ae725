"""Clients of every kind, at random: patient ones, ones that leave, stall, or send rubbish.

Contract: plain sockets, so that a client can be as rude as HTTP allows. The same seed gives the same clients.
Nothing is asserted: `Tally` says what came back, `wrong` what should not have.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CHAT = "/v1/chat/completions"
KINDS = {"whole": 3, "stream": 4, "leave": 4, "stall": 2, "rubbish": 3}
"""How often each kind of request comes, relative to the others."""
MAX_STALLED = 4
"""A client that stalls holds its connection until so many younger ones do."""


@dataclass(slots=True)
class Tally:
    """What came back.

    Attributes:
        kinds: requests by kind.
        statuses: of answers, by kind and status.
        first_token_s: from asking to the first piece of text, of streams that were read.
        wrong: what should not have happened, in words.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    first_token_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """All of them."""
        return self.kinds.total()

    @property
    def server_errors(self) -> int:
        """Answers with a status of 500 and above."""
        return sum(count for (_, status), count in self.statuses.items() if status >= 500)


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked, and where.

    Attributes:
        port: on this machine.
        model: the one that is served.
        max_tokens: the longest answer.
        prompts: one of them is asked each time.
        too_many_words: a prompt of so many fits into no cache.
        api_key: sent where there is one.
    """

    port: int
    model: str
    max_tokens: int
    prompts: tuple[str, ...]
    too_many_words: int = 6000
    api_key: str | None = None

    def chat(self, chance: random.Random, **fields: Any) -> dict[str, Any]:
        """A request that can be answered."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": chance.choice(self.prompts)}],
            "max_tokens": chance.randint(1, self.max_tokens),
            "temperature": chance.choice([0, 0.7, 1]),
            **fields,
        }

    def head(self, path: str, length: int | None, method: str = "POST") -> bytes:
        """A request's head, which announces `length` bytes."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", "Connection: close"]
        lines += ["Content-Type: application/json"]
        lines += [] if length is None else [f"Content-Length: {length}"]
        lines += [] if self.api_key is None else [f"Authorization: Bearer {self.api_key}"]
        return "\r\n".join([*lines, "", ""]).encode()

    def post(self, body: dict[str, Any] | bytes, path: str = CHAT) -> bytes:
        """A whole request."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.head(path, len(content)) + content


class Crowd:
    """Clients that ask until `more` says no.

    Args:
        target: whom.
        clients: how many at a time.
        seed: of every choice.
    """

    def __init__(self, target: Target, *, clients: int = 8, seed: int = 0) -> None:
        self.tally = Tally()
        self._target = target
        self._clients = clients
        self._seed = seed
        self._stalled: list[asyncio.StreamWriter] = []

    async def ask(self, more: Callable[[], bool]) -> None:
        """Ask; at the end whoever stalls leaves too."""
        chances = [random.Random(f"{self._seed} {number}") for number in range(self._clients)]
        await asyncio.gather(*(self._client(chance, more) for chance in chances))
        while self._stalled:
            self._stalled.pop().transport.abort()

    async def _client(self, chance: random.Random, more: Callable[[], bool]) -> None:
        kinds = {
            "whole": self._whole,
            "stream": self._stream,
            "leave": self._leave,
            "stall": self._stall,
            "rubbish": self._rubbish,
        }
        while more():
            kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
            self.tally.kinds[kind] += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", self._target.port)
            try:
                await kinds[kind](chance, reader, writer)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                self.tally.wrong.append(f"{kind}: {type(error).__name__}: {error}")
            finally:
                if writer not in self._stalled:
                    writer.transport.abort()

    async def _whole(
        self, chance: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(self._target.post(self._target.chat(chance)))
        status, body = await read_reply(reader)
        self.tally.statuses["whole", status] += 1
        if status != 200 or not json.loads(body)["choices"][0]["finish_reason"]:
            self.tally.wrong.append(f"whole: {status} {body[:200]!r}")

    async def _stream(
        self, chance: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        began_s = time.perf_counter()
        writer.write(self._target.post(self._target.chat(chance, stream=True)))
        status = await read_status(reader)
        self.tally.statuses["stream", status] += 1
        text = b""
        while piece := await reader.read(65536):
            if b'"content":"' in piece and b'"content":"' not in text:
                self.tally.first_token_s.append(time.perf_counter() - began_s)
            text += piece
        if status != 200 or b"data: [DONE]" not in text or b'"error"' in text:
            self.tally.wrong.append(f"stream: {status} ended with {text[-200:]!r}")

    async def _leave(
        self, chance: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Go away at some moment: before a byte, after the head, in the middle of the answer."""
        stream = chance.random() < 0.7
        writer.write(self._target.post(self._target.chat(chance, stream=stream)))
        await writer.drain()
        if chance.random() < 0.3:
            return
        status = await read_status(reader)
        self.tally.statuses["leave", status] += 1
        for _ in range(chance.randint(0, 3)):
            await reader.read(chance.randint(1, 400))

    async def _stall(
        self, chance: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Read nothing, or stop in the middle of a request, and stay."""
        request = self._target.post(
            self._target.chat(chance, stream=True, max_tokens=self._target.max_tokens)
        )
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request if chance.random() < 0.6 else request[: chance.randint(1, len(request) - 1)])
        await writer.drain()
        self._stalled.append(writer)
        if len(self._stalled) > MAX_STALLED:
            self._stalled.pop(0).transport.abort()

    async def _rubbish(
        self, chance: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        good, endless = self._target.chat(chance), "long " * self._target.too_many_words
        writer.write(
            chance.choice(
                [
                    bytes(chance.randrange(256) for _ in range(60)) + b"\r\n\r\n",
                    self._target.post(b"{"),
                    self._target.post(b"\xff\xfe\x00"),
                    self._target.post(b"[]"),
                    self._target.post({**good, "temprature": 1}),
                    self._target.post({**good, "messages": []}),
                    self._target.post({**good, "max_tokens": -1}),
                    self._target.post({**good, "model": "another"}),
                    self._target.post({**good, "messages": [{"role": "user", "content": endless}]}),
                    self._target.post(good, path="/v1/nothing"),
                    self._target.head(CHAT, None, "DELETE"),
                    self._target.head(CHAT, 10**12) + b"a",
                ]
            )
        )
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        try:
            status, body = await read_reply(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            # Bytes that are no HTTP may be answered by hanging up.
            return
        self.tally.statuses["rubbish", status] += 1
        if not 400 <= status < 500:
            self.tally.wrong.append(f"rubbish: {status} {body[:200]!r}")


async def read_status(reader: asyncio.StreamReader) -> int:
    """The status of an answer; its head is read."""
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1])


async def read_reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The status and the rest of an answer that ends with its connection; as it was sent, chunked or not."""
    status = await read_status(reader)
    return status, await reader.read()


async def get(port: int, path: str) -> tuple[int, bytes]:
    """One plain question."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
    try:
        return await read_reply(reader)
    finally:
        writer.close()
