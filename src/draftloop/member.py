"""One answer among others: its prompt, its rounds, its end.

Contract: told what happens by whoever advances all of them (`batch.py`); lets go of what it holds once,
however it ends. Must not know the others.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from draftloop.answers import PromptProgress, RoundDone
from draftloop.learning.recorder import CANCELLED
from draftloop.speculation.stream import PromptReading, check_fits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from draftloop.answers import Answer, Completion, TextPiece
    from draftloop.bookkeeping import Bookkeeping
    from draftloop.errors import OutOfMemory
    from draftloop.speculation.round import Round
    from draftloop.speculation.stream import Pair, Stream

logger = logging.getLogger(__name__)


class Member:
    """One answer among others.

    Attributes:
        answer: as far as it is.
        stream: its caches and its pace.
        over: it was told its end, failed, or left.

    Args:
        pair: the models.
        answer: nothing of it is there yet.
        stream: of its conversation.
        books: told what remains of it.
        answering: entered until it is over.
    """

    def __init__(
        self,
        pair: Pair,
        answer: Answer,
        stream: Stream,
        books: Bookkeeping,
        answering: AbstractContextManager[None],
    ) -> None:
        self.answer = answer
        self.stream = stream
        self.over = False
        self._pair = pair
        self._books = books
        self._reading: PromptReading | None = None
        self._answering = ExitStack()
        self._answering.enter_context(answering)

    @property
    def reads(self) -> bool:
        """Whether there is still something of its prompt to read."""
        return self._reading is None or not self._reading.finished

    @property
    def begun(self) -> bool:
        """Whether it is known how much of its prompt the caches hold already."""
        return self._reading is not None

    @property
    def left_tokens(self) -> int:
        """How many of its prompt's tokens are still to be read; all of them before it has begun."""
        return len(self.answer.request.prompt_tokens) if self._reading is None else self._reading.left_tokens

    def begin(self, draft_reads: Callable[[int], bool]) -> PromptProgress:
        """Take over what the caches, or the texts kept, hold of the prompt.

        Args:
            draft_reads: told how many tokens the draft lacks, says whether it reads along.

        Raises:
            ContextFull: the prompt leaves no room for an answer.
        """
        answer, conversation, started_s = self.answer, self.stream.conversation, time.perf_counter()
        prompt = answer.request.prompt_tokens
        check_fits(len(prompt), conversation.max_tokens)
        self._books.resume(conversation, prompt)
        self._reading = PromptReading(self._pair, conversation, prompt, draft_reads)
        answer.cached_tokens = self._reading.done_tokens
        answer.prompt_s += time.perf_counter() - started_s
        return self._progress(self._reading)

    def read(self, num_tokens: int) -> PromptProgress:
        """Read the next piece of the prompt."""
        if self._reading is None:
            raise ValueError("a prompt is read before it was begun")
        started_s = time.perf_counter()
        self._reading.read(num_tokens)
        self.answer.prompt_s += time.perf_counter() - started_s
        return self._progress(self._reading)

    def make_room(self, error: OutOfMemory) -> bool:
        """Whether what failed may go well now: some memory was kept that nobody needs."""
        return self._books.make_room(error)

    def with_room(self, work: Callable[[], PromptProgress]) -> PromptProgress:
        """What `work` gives, which is tried again where that may help."""
        return self._books.with_room(work)

    def take(self, outcome: Round, seconds: float) -> list[TextPiece | RoundDone]:
        """A round is over; so long is this answer's part of it."""
        started_s = time.perf_counter()
        pieces = list(self.answer.take(outcome))
        # What the reader of the events does with them is not the models' time.
        self.answer.decode_s += seconds + time.perf_counter() - started_s
        logger.debug("round: %s", outcome.summary)
        return [*pieces, RoundDone(outcome)]

    @property
    def said_all(self) -> bool:
        """Whether its last round is over."""
        rounds = self.answer.rounds
        return self.answer.stopped or (bool(rounds) and rounds[-1].finish_reason is not None)

    def finish(self) -> Iterator[TextPiece | Completion]:
        """What was held back, and the end; the answer is stored before that one comes."""
        yield from self.answer.end()
        completion = self.answer.completion()
        self._books.record(self.answer, completion.finish_reason.value)
        self._books.keep(self.stream.conversation)
        self.close()
        yield completion

    def break_off(self, *, whole: bool) -> None:
        """Nobody waits for the rest: store what was said. Nothing happens where it is over.

        Args:
            whole: it is between two events, where the caches hold the text.
        """
        if self.over:
            return
        try:
            self._books.record(self.answer, CANCELLED)
            if whole:
                self._books.keep(self.stream.conversation)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of what an answer holds; once."""
        if self.over:
            return
        self.over = True
        try:
            if self.stream.suffix is not None:
                self.stream.suffix.finish(self.answer.token_ids)
            self._books.count()
        finally:
            self._answering.close()

    def _progress(self, reading: PromptReading) -> PromptProgress:
        prompt = self.answer.request.prompt_tokens
        if self.stream.suffix is not None:
            self.stream.suffix.read(prompt, reading.done_tokens)
        return PromptProgress(reading.done_tokens, len(prompt))
