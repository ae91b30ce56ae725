"""A worker that answers what it is told to, event by event."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from draftloop.answers import Completion, PromptProgress, RoundDone, TextPiece
from draftloop.server.figures import Figures
from draftloop.server.tickets import Cancelled
from draftloop.speculation.metrics import Tally
from draftloop.speculation.round import Round
from draftloop.types import FinishReason, TokenKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from draftloop.answers import Event
    from draftloop.server.tickets import Job


def saying(*pieces: str, finish: FinishReason = FinishReason.STOP) -> list[Event]:
    """The events of an answer, a round for each piece."""
    events: list[Event] = [PromptProgress(1, 1)]
    for piece in pieces:
        outcome = Round((7,), (TokenKind.TARGET,), 0, 0, (), None, None)
        events += [TextPiece(piece, TokenKind.TARGET), RoundDone(outcome)]
    tally = Tally(rounds=len(pieces), completion_tokens=len(pieces))
    ids = tuple(7 for _ in pieces)
    return [*events, Completion("".join(pieces), ids, finish, 5, 2, tally, 0.1, 0.2, 11)]


class ScriptedTicket:
    """Says its events, and then either ends or waits until it is cancelled."""

    def __init__(self, script: Sequence[Event | Exception]) -> None:
        self._script = script
        self._gone = asyncio.Event()
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self._gone.set()
        self.cancelled.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        for event in self._script:
            if isinstance(event, Exception):
                raise event
            yield event
        if not isinstance(self._script[-1], Completion):
            await self._gone.wait()
            raise Cancelled


class ScriptedWorker:
    """`Worker`, as far as the API knows it."""

    def __init__(self) -> None:
        self.script: Sequence[Event | Exception] = saying("Hello")
        self.figures = Figures()
        self.refusal: Exception | None = None
        self.jobs: list[Job] = []
        self.tickets: list[ScriptedTicket] = []
        self.submitted = threading.Event()

    def submit(self, job: Job) -> ScriptedTicket:
        if self.refusal is not None:
            raise self.refusal
        self.jobs.append(job)
        self.tickets.append(ScriptedTicket(self.script))
        self.submitted.set()
        return self.tickets[-1]
