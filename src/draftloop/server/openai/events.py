"""Server-sent events: a stream of replies, whatever they are.

Contract: `data: JSON`, an empty line, and `data: [DONE]` at the end. An error before the first event is an
answer of its own with its status; one behind it is an event `{"error": …}`, which ends the stream. Must not
know the kinds of reply.

Source: the HTML standard, "Server-sent events"; the OpenAI API reference, "Streaming".
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.responses import Response

from draftloop.errors import DraftloopError
from draftloop.server.logs import where_raised
from draftloop.server.openai.answering import cancelled_with_client
from draftloop.server.openai.errors import described, error_body
from draftloop.server.openai.replies import to_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pydantic import BaseModel
    from starlette.types import Receive, Scope, Send

    from draftloop.server.tickets import Ticket

EVENT = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "A chunk or an error as JSON, or [DONE] at the end."}
    },
    "required": ["data"],
}
STREAMED = {"text/event-stream": {"schema": EVENT}}
"""How a route documents that its 200 may be a stream."""

logger = logging.getLogger(__name__)


class EventStream(Response):
    """An answer as it grows.

    Args:
        ticket: the answer's; cancelled when the client goes away.
        replies: what is sent, made from the ticket's events.
    """

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, replies: AsyncIterator[BaseModel]) -> None:
        # Proxies that buffer would make it no stream.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._ticket = ticket
        self._replies = replies

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        begun = False
        async with cancelled_with_client(self._ticket, receive):
            try:
                async for reply in self._replies:
                    if not begun:
                        begun = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": self.status_code,
                                "headers": self.raw_headers,
                            }
                        )
                    await _send_event(send, to_json(reply))
                await _send_event(send, "[DONE]")
            except Exception as error:
                if not begun:
                    raise
                if not isinstance(error, DraftloopError):
                    logger.error("a stream broke: %s", where_raised(error))
                told = described(error)
                await _send_event(
                    send, error_body(told.message, status=told.status, param=told.param, code=told.code)
                )
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: str) -> None:
    body = f"data: {data}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
