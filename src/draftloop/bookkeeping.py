"""What remains of an answer: its record in the store, its keys and values, and memory given back.

Contract: called by whoever makes answers, between two events of one. Must not know how answers are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from draftloop.errors import OutOfMemory
from draftloop.learning.recorder import Answered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from draftloop.answers import Answer, Request
    from draftloop.backends.base import Backend
    from draftloop.learning.recorder import Recorder
    from draftloop.speculation.prefixes import PrefixCache
    from draftloop.speculation.stream import Conversation


Result = TypeVar("Result")


class Bookkeeping:
    """Of one engine.

    Args:
        backend: whose spare memory is given back.
        cache_clear_frequency: every so many answers.
        recorder: keeps the requests that say where they come from.
        prefixes: what is kept of past texts, for those that begin alike; None keeps nothing.
    """

    def __init__(
        self,
        backend: Backend,
        cache_clear_frequency: int,
        recorder: Recorder | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.prefixes = prefixes
        self._backend = backend
        self._cache_clear_frequency = cache_clear_frequency
        self._recorder = recorder
        self._answers = 0

    def records(self, request: Request) -> bool:
        """Whether its answer is stored, which takes its traces."""
        return self._recorder is not None and request.provenance is not None

    def resume(self, conversation: Conversation, prompt: Sequence[int]) -> None:
        """Let a conversation begin with what is kept of past texts."""
        if self.prefixes is not None:
            self.prefixes.resume(conversation, prompt)

    def keep(self, conversation: Conversation) -> None:
        """Keep what its caches hold, which must be whole, for texts that begin alike."""
        if self.prefixes is not None:
            self.prefixes.keep(conversation)

    def make_room(self, error: OutOfMemory) -> bool:
        """Give up what is kept of past texts; whether that may help where memory ran out."""
        given_up = self.prefixes is not None and self.prefixes.give_up(error)
        if given_up:
            self._backend.clear_cache()
        return given_up

    def with_room(self, work: Callable[[], Result]) -> Result:
        """What `work` gives; where memory runs out it is done once more, if `make_room` says so."""
        try:
            return work()
        except OutOfMemory as error:
            if not self.make_room(error):
                raise
        return work()

    def record(self, answer: Answer, finish_reason: str) -> None:
        """Store the answer, once, where the request wants it and there is something to store."""
        provenance = answer.request.provenance
        if self._recorder is None or provenance is None or answer.recorded or not answer.rounds:
            return
        answer.recorded = True
        self._recorder.record(
            Answered(
                provenance=provenance,
                prompt_tokens=answer.request.prompt_tokens,
                settings=answer.settings,
                rounds=answer.rounds,
                finish_reason=finish_reason,
                adapter=answer.adapter,
                prompt_s=answer.prompt_s,
                decode_s=answer.decode_s,
            )
        )

    def count(self) -> None:
        """An answer is over, however it ended."""
        self._answers += 1
        if self._answers % self._cache_clear_frequency == 0:
            self._backend.clear_cache()
