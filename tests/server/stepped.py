"""An engine that goes one event further when it is told to."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from draftloop.answers import RoundDone
from draftloop.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Generator

    from draftloop.answers import Event, Request


class SteppedEngine(Engine):
    """Gives each event when `step` allows it; `free` lets everything through.

    Attributes:
        begun: prompts' texts in the order in which they were begun.
        threads: that have called it.
        rounds: how many each of them has finished.
        raises: thrown in place of the next event, once.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.begun: list[str] = []
        self.threads: set[int] = set()
        self.rounds: list[int] = []
        self.raises: Exception | None = None
        self._steps = threading.Semaphore(0)
        self._free = False

    def free(self) -> None:
        self._free = True
        self._steps.release()

    def step(self, events: int = 1) -> None:
        self._steps.release(events)

    def stream(self, request: Request, *arguments: Any, **named: Any) -> Generator[Event, None, None]:
        self.threads.add(threading.get_ident())
        index = len(self.begun)
        self.rounds.append(0)
        self.begun.append(self.tokenizer.decode(request.prompt_tokens))
        for event in super().stream(request, *arguments, **named):
            if not self._free:
                self._steps.acquire()
            if self.raises is not None:
                error, self.raises = self.raises, None
                raise error
            self.rounds[index] += isinstance(event, RoundDone)
            yield event
