"""What is asked of the worker, and the answer on its way: made by the models' thread, read on the event loop.

Contract: a ticket is iterated once, on the loop that made it; it ends with a `Completion` or an error,
always. Its reader may be as slow as it likes: nobody waits for it. Must not know models, or HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.answers import Completion, Event
from draftloop.errors import DraftloopError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from draftloop.answers import Request


class QueueFull(DraftloopError):
    """As many requests wait as may.

    Args:
        queued: how many; 0 where none may.
        retry_after_s: when a place will likely be free; at least 1.
    """

    def __init__(self, queued: int, retry_after_s: int) -> None:
        if queued:
            waiting = "1 request waits" if queued == 1 else f"{queued} requests wait"
            what = f"{waiting} already (server.max_queued_requests)"
        else:
            what = "others are being answered, and none may wait (server.max_queued_requests = 0)"
        super().__init__(
            what,
            remedy=f"Try again in {retry_after_s} s.",
        )
        self.retry_after_s = retry_after_s


class ShuttingDown(DraftloopError):
    """The server takes nothing any more."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down", remedy="Try again when it is back.")


class TimedOut(DraftloopError):
    """An answer was not there in time, its wait in the queue counted."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"the answer took longer than server.request_timeout_s = {timeout_s:g} s",
            remedy="Ask for fewer tokens, try again when less is asked, or raise it.",
        )


class Cancelled(DraftloopError):
    """Whoever asked has gone."""

    def __init__(self) -> None:
        super().__init__("the request was cancelled", remedy="Ask again.")


class AnswerFailed(DraftloopError):
    """Something unforeseen ended an answer; the server goes on."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"unexpected {type(error).__name__} while answering", remedy="The server's log tells where."
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A request and who asks.

    Attributes:
        request: what the engine answers.
        client: clients take turns, whoever asks more.
    """

    request: Request
    client: str


class Ticket:
    """One answer on its way.

    Args:
        job: what was asked.
        arrived_s: when, by the worker's clock.
        deadline_s: when it is too late, by the same clock.
    """

    def __init__(self, job: Job, arrived_s: float, deadline_s: float) -> None:
        self.job = job
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Event | DraftloopError] = asyncio.Queue()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Nobody wants it any more. Its place is free within a round. From any thread, repeatedly."""
        self._cancelled.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """`PromptProgress`, `TextPiece`, `RoundDone` and one `Completion`, in order.

        A reader that stops in between cancels it.

        Raises:
            TimedOut, ShuttingDown, Cancelled, AnswerFailed: as they say.
            DraftloopError: as the engine raised it.
        """
        try:
            while True:
                item = await self._items.get()
                if isinstance(item, DraftloopError):
                    raise item
                yield item
                if isinstance(item, Completion):
                    return
        finally:
            self.cancel()

    def deliver(self, item: Event | DraftloopError) -> None:
        """Hand one event, or the error that ends the answer, to the reader. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            # The loop is closed, and the reader with it.
            self._cancelled.set()
