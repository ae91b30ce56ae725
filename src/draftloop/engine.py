"""A request goes in, a stream of events comes out.

Contract: the engine owns both models and the tokenizer; one thread calls it. A stream may be closed
between any two events (that is how an answer is stopped), and leaves its conversation whole. Must not
know the command line, settings files, or how a backend computes.
"""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

from draftloop.answers import (
    Answer,
    Completion,
    Event,
    Failed,
    PromptProgress,
    PutOff,
    Request,
    RoundDone,
    TextPiece,
)
from draftloop.backends.lora import AdapterForm
from draftloop.batch import Batch
from draftloop.bookkeeping import Bookkeeping
from draftloop.errors import DraftloopError, InputError
from draftloop.member import Member
from draftloop.models.text import TextStream
from draftloop.speculation.experience import Experience
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair
from draftloop.speculation.suffix import SuffixIndex
from draftloop.speculation.together import TogetherPace

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager

    from draftloop.backends.base import Backend
    from draftloop.learning.deployment import ActiveAdapter, Change, Deployed
    from draftloop.learning.recorder import Recorder
    from draftloop.models.tokenizer import Tokenizer
    from draftloop.speculation.prefixes import PrefixCache
    from draftloop.speculation.schedule import Schedule

__all__ = ["Completion", "Engine", "Event", "PromptProgress", "Request", "RoundDone", "TextPiece"]

logger = logging.getLogger(__name__)


class Engine:
    """The pair, its tokenizer, and the answers they give.

    Args:
        backend: where the models live.
        pair: target and draft; without a draft every round is the target's alone.
        tokenizer: the one they share.
        cache_clear_frequency: the backend's spare memory is given back every so many answers.
        recorder: keeps the requests that say where they come from.
        active_adapter: tells which adapter the draft shall wear; looked at before each request.
        prefixes: what is kept of past texts, for those that begin alike; None keeps nothing.
        schedule: chooses K round by round; without one each round drafts as many as the request says.
        suffixes: remembers what was written, for suffix matches; None looks in each text alone.
        answering: is entered while something is answered (`learning.yielding.Answering`).
        most_together: answers that a batch makes at a time, at most: what the memory plan has room for.
    """

    def __init__(
        self,
        backend: Backend,
        pair: Pair,
        tokenizer: Tokenizer,
        *,
        cache_clear_frequency: int,
        recorder: Recorder | None = None,
        active_adapter: ActiveAdapter | None = None,
        prefixes: PrefixCache | None = None,
        schedule: Schedule | None = None,
        suffixes: SuffixIndex | None = None,
        answering: Callable[[], AbstractContextManager[None]] = nullcontext,
        most_together: int = 1,
    ) -> None:
        self.backend = backend
        self.answering = answering
        self.pair = pair
        self.tokenizer = tokenizer
        self.adapter: str | None = None
        self.experience = Experience(schedule, suffixes or SuffixIndex(0))
        self.most_together = most_together
        self._active_adapter = active_adapter
        self._change: Change | None = None
        """To be worn when nobody is being answered."""
        self._books = Bookkeeping(backend, cache_clear_frequency, recorder, prefixes)

    @property
    def prefix_cache_bytes(self) -> int:
        """What is kept of past texts."""
        prefixes = self._books.prefixes
        return 0 if prefixes is None else prefixes.num_bytes

    def open_conversation(self) -> Conversation:
        """Empty caches for a conversation of several turns. OutOfMemory where there is no room for them."""
        return self._books.with_room(lambda: Conversation(self.pair))

    def follow_adapter(self) -> None:
        """Let the draft wear the adapter that is active now. Called before each request; atomic there.

        Raises:
            ModelUnreadable: the adapter's files are damaged, or made for another draft.
        """
        if self._active_adapter is None or self.pair.draft is None:
            return
        change = self._change or self._active_adapter.changed()
        self._change = None
        if change is not None:
            self.wear(change.deployed)

    def wear(self, deployed: Deployed | None) -> None:
        """Swap the draft's adapter; None takes it away. Nobody may be answering."""
        if self.pair.draft is None:
            return
        lora, form = (None, AdapterForm.UNFUSED) if deployed is None else (deployed.lora, deployed.form)
        self.pair.draft.set_adapter(lora, form)
        self.adapter = None if deployed is None else deployed.name
        if self.experience.schedule is not None:
            self.experience.schedule.draft_changed()
        logger.debug("the draft wears %s (%s)", self.adapter or "no adapter", form)

    def stream(
        self,
        request: Request,
        conversation: Conversation | None = None,
        experience: Experience | None = None,
    ) -> Generator[Event, None, None]:
        """Answer one request.

        Args:
            request: what to answer.
            conversation: its caches are reused as far as the prompt begins like its text; None for a
                request that stands alone. Either begins with what is kept of past texts, where that is more.
            experience: what is drafted by, and what learns from this answer; None is the engine's own.

        Yields:
            `PromptProgress` while the prompt is read, the `TextPiece`s of each round and its `RoundDone`,
            and one `Completion` at the end. What was answered is stored before that one comes, and where
            the reader goes away or Ctrl-C is pressed.

        Raises:
            InputError: `max_tokens` below 1, or a bias or penalty out of bounds.
            GrammarFailed: the request's grammar became too complex on the way.
            ContextFull: the prompt leaves no room for an answer.
            OutOfMemory: in spite of the plan.
        """
        with self.batch(1) as batch:
            batch.join(request, conversation, experience)
            while batch.members:
                for _, event in batch.step():
                    if isinstance(event, Failed | PutOff):
                        raise event.error
                    yield event

    def batch(
        self,
        most: int | None = None,
        *,
        whole_prompts: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Batch:
        """Where several requests are answered together; `stream` is the case of one.

        Args:
            most: answers at a time; None is what the memory plan has room for.
            whole_prompts: read every prompt at once, for nobody watches the others' tokens come.
            clock: seconds.
        """
        schedule = self.experience.schedule
        return Batch(
            self.pair,
            self._begin,
            self._adapter_waits,
            together=None if schedule is None else TogetherPace(schedule),
            most=self.most_together if most is None else most,
            whole_prompts=whole_prompts,
            clock=clock,
        )

    def _begin(
        self,
        request: Request,
        conversation: Conversation | None,
        experience: Experience | None,
        alone: bool,
    ) -> Member:
        """Open one answer; where nobody else is being answered, the draft may change its adapter before."""
        if request.max_tokens < 1:
            raise InputError(f"max_tokens is {request.max_tokens}", remedy="Ask for at least 1 token.")
        request.steering.check(self.pair.target.architecture.vocab_size)
        if alone:
            self.follow_adapter()
        conversation = conversation or self.open_conversation()
        if conversation.adapter != self.adapter:
            conversation.forget_draft(self.adapter)
        settings = self._decode_settings(request)
        answer = Answer(request, settings, self.adapter, TextStream(self.tokenizer, request.stop))
        stream = (experience or self.experience).open(
            conversation,
            settings,
            num_suffix_tokens=request.num_suffix_tokens,
            repeatable=request.repeatable and request.seed is not None and not request.sampling.greedy,
        )
        return Member(self.pair, answer, stream, self._books, self.answering())

    def _adapter_waits(self) -> bool:
        """Whether there is another adapter to wear; one that is damaged costs nobody an answer."""
        if self._change is None and self._active_adapter is not None and self.pair.draft is not None:
            try:
                self._change = self._active_adapter.changed()
            except DraftloopError as error:
                logger.warning("the draft goes on with what it wears: %s", error)
        return self._change is not None

    def complete(
        self,
        request: Request,
        conversation: Conversation | None = None,
        experience: Experience | None = None,
    ) -> Completion:
        """Answer one request and return its end; see `stream`."""
        *_, last = self.stream(request, conversation, experience)
        if not isinstance(last, Completion):
            raise TypeError(f"a stream ended with {type(last).__name__}")
        return last

    def _decode_settings(self, request: Request) -> DecodeSettings:
        return DecodeSettings(
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            eos_token_ids=frozenset(self.tokenizer.eos_token_ids),
            num_draft_tokens=request.num_draft_tokens,
            seed=secrets.randbits(32) if request.seed is None else request.seed,
            trace=request.trace or self._books.records(request),
            steering=request.steering,
        )
