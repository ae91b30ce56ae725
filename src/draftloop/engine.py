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

from draftloop.answers import Answer, Completion, Event, PromptProgress, Request, RoundDone, TextPiece
from draftloop.backends.lora import AdapterForm
from draftloop.errors import InputError
from draftloop.learning.recorder import CANCELLED, Answered
from draftloop.models.text import TextStream
from draftloop.speculation.experience import Experience
from draftloop.speculation.round import decode
from draftloop.speculation.stream import (
    Conversation,
    DecodeSettings,
    Pair,
    check_fits,
    read_prompt,
)
from draftloop.speculation.suffix import SuffixIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextlib import AbstractContextManager

    from draftloop.backends.base import Backend
    from draftloop.learning.deployment import ActiveAdapter, Deployed
    from draftloop.learning.recorder import Recorder
    from draftloop.models.tokenizer import Tokenizer
    from draftloop.speculation.prefixes import PrefixCache
    from draftloop.speculation.schedule import Schedule
    from draftloop.speculation.stream import Stream

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
    ) -> None:
        self.backend = backend
        self.answering = answering
        self.pair = pair
        self.tokenizer = tokenizer
        self.adapter: str | None = None
        self._recorder = recorder
        self._active_adapter = active_adapter
        self._prefixes = prefixes
        self.experience = Experience(schedule, suffixes or SuffixIndex(0))
        self._cache_clear_frequency = cache_clear_frequency
        self._answers = 0

    @property
    def prefix_cache_bytes(self) -> int:
        """What is kept of past texts."""
        return 0 if self._prefixes is None else self._prefixes.num_bytes

    def open_conversation(self) -> Conversation:
        """Empty caches for a conversation of several turns."""
        return Conversation(self.pair)

    def follow_adapter(self) -> None:
        """Let the draft wear the adapter that is active now. Called before each request; atomic there.

        Raises:
            ModelUnreadable: the adapter's files are damaged, or made for another draft.
        """
        if self._active_adapter is None or self.pair.draft is None:
            return
        change = self._active_adapter.changed()
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
            InputError: `max_tokens` below 1.
            ContextFull: the prompt leaves no room for an answer.
        """
        if request.max_tokens < 1:
            raise InputError(f"max_tokens is {request.max_tokens}", remedy="Ask for at least 1 token.")
        with self.answering():
            yield from self._answered(request, conversation or self.open_conversation(), experience)

    def _answered(
        self, request: Request, conversation: Conversation, experience: Experience | None
    ) -> Iterator[Event]:
        self.follow_adapter()
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
        try:
            yield from self._read(answer, stream)
            yield from self._rounds(answer, stream)
            completion = answer.completion()
            self._record(answer, completion.finish_reason.value)
            self._keep(conversation)
            yield completion
        except (GeneratorExit, KeyboardInterrupt) as gone:
            self._record(answer, CANCELLED)
            if isinstance(gone, GeneratorExit):
                # It comes between two events, where the caches are whole; Ctrl-C comes anywhere.
                self._keep(conversation)
            raise
        finally:
            if stream.suffix is not None:
                stream.suffix.finish(answer.token_ids)
            self._count_answer()

    def _read(self, answer: Answer, stream: Stream) -> Iterator[Event]:
        prompt = answer.request.prompt_tokens
        started_s, total, cached = time.perf_counter(), len(prompt), None

        def draft_reads(backlog_tokens: int) -> bool:
            return stream.pace.reads_along(backlog_tokens, answer.settings.max_tokens)

        if self._prefixes is not None:
            check_fits(total, stream.conversation.max_tokens)
            self._prefixes.resume(stream.conversation, prompt)
        for done in read_prompt(self.pair, stream.conversation, prompt, draft_reads):
            cached = done if cached is None else cached
            if stream.suffix is not None:
                stream.suffix.read(prompt, done)
            yield PromptProgress(done, total)
        answer.cached_tokens = cached or 0
        answer.prompt_s = time.perf_counter() - started_s

    def _rounds(self, answer: Answer, stream: Stream) -> Iterator[Event]:
        resumed_s = time.perf_counter()
        for outcome in decode(self.pair, stream):
            pieces = list(answer.take(outcome))
            # What the reader of the events does with them is not the models' time.
            answer.decode_s += time.perf_counter() - resumed_s
            logger.debug("round: %s", outcome.summary)
            yield from pieces
            yield RoundDone(outcome)
            if answer.stopped:
                break
            resumed_s = time.perf_counter()
        yield from answer.end()

    def _keep(self, conversation: Conversation) -> None:
        if self._prefixes is not None:
            self._prefixes.keep(conversation)

    def _record(self, answer: Answer, finish_reason: str) -> None:
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
            trace=request.trace or (self._recorder is not None and request.provenance is not None),
        )

    def _count_answer(self) -> None:
        self._answers += 1
        if self._answers % self._cache_clear_frequency == 0:
            self.backend.clear_cache()
