"""An engine that goes one event further when it is told to."""

from __future__ import annotations

import threading
from itertools import count
from typing import TYPE_CHECKING, Any

from draftloop.answers import RoundDone
from draftloop.batch import Batch
from draftloop.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftloop.answers import Event, Failed, PutOff
    from draftloop.member import Member


class SteppedEngine(Engine):
    """Gives each event when `step` allows it; `free` lets everything through.

    Its batches have a clock of their own, for prompts are read in pieces that depend on seconds.

    Attributes:
        begun: prompts' texts in the order in which they were begun.
        threads: that have called it.
        rounds: how many each of them has finished.
        batches: that were opened.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.begun: list[str] = []
        self.threads: set[int] = set()
        self.rounds: list[int] = []
        self.batches: list[Batch] = []
        self._steps = threading.Semaphore(0)
        self._waits = threading.Event()
        self._free = False

    def free(self) -> None:
        self._free = True
        self._steps.release()

    def step(self) -> None:
        """Let one event through, if one waits."""
        if self._waits.is_set():
            self._waits.clear()
            self._steps.release()

    def wait(self) -> None:
        if not self._free:
            self._waits.set()
            self._steps.acquire()

    def batch(self, *arguments: Any, **named: Any) -> Batch:
        named = {"clock": count().__next__, **named}
        self.batches.append(SteppedBatch(self, super().batch(*arguments, **named)))
        return self.batches[-1]


class SteppedBatch(Batch):
    def __init__(self, engine: SteppedEngine, batch: Batch) -> None:
        vars(self).update(vars(batch))
        self._engine = engine
        self._numbers: dict[Member, int] = {}

    def join(self, *arguments: Any, **named: Any) -> Member:
        member = super().join(*arguments, **named)
        self._engine.threads.add(threading.get_ident())
        self._numbers[member] = len(self._engine.begun)
        self._engine.rounds.append(0)
        tokens = member.answer.request.prompt_tokens
        self._engine.begun.append(self._engine.tokenizer.decode(tokens))
        return member

    def step(self) -> Iterator[tuple[Member, Event | Failed | PutOff]]:
        for member, event in super().step():
            self._engine.wait()
            self._engine.rounds[self._numbers[member]] += isinstance(event, RoundDone)
            yield member, event
