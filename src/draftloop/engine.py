"""A request goes in, a stream of events comes out.

Contract: the engine owns both models and the tokenizer; one thread calls it. A stream may be closed
between any two events (that is how an answer is stopped), and leaves its conversation whole. Must not
know the command line, settings files, or how a backend computes.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from draftloop.backends.lora import AdapterForm
from draftloop.errors import InputError
from draftloop.learning.recorder import CANCELLED, Answered
from draftloop.models.text import TextStream
from draftloop.speculation.experience import Experience
from draftloop.speculation.metrics import Tally, tokens_per_second
from draftloop.speculation.round import decode
from draftloop.speculation.stream import (
    Conversation,
    DecodeSettings,
    Pair,
    check_fits,
    read_prompt,
)
from draftloop.speculation.suffix import SuffixIndex
from draftloop.types import FinishReason, Sampling, TokenKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from draftloop.backends.base import Backend
    from draftloop.learning.deployment import ActiveAdapter, Deployed
    from draftloop.learning.recorder import Provenance, Recorder
    from draftloop.models.tokenizer import Tokenizer
    from draftloop.speculation.prefixes import PrefixCache
    from draftloop.speculation.round import Round
    from draftloop.speculation.schedule import Schedule
    from draftloop.speculation.stream import Stream
    from draftloop.types import Trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that somebody wants.

    Attributes:
        prompt_tokens: the whole text so far, chat template applied.
        sampling: temperature and the rest; for p and q alike.
        max_tokens: the answer's longest length, EOS included; at least 1.
        min_tokens: its shortest, EOS included; 1 means no minimum.
        num_draft_tokens: K, the most that the draft proposes in a round; 0 asks it never.
        num_suffix_tokens: the most that a suffix match proposes in a round; 0 looks for none.
        stop: the answer ends before any of these strings.
        seed: fixes every random choice; None draws one, which the completion reports.
        repeatable: whether what is sampled from a given seed is the same text whatever was answered before.
            Then past answers do not help to choose K, so that it is slower than it would be without a seed.
        trace: whether the completion carries the target's top tokens of each round.
        provenance: what is stored beside the answer; None stores nothing.
    """

    prompt_tokens: Sequence[int]
    sampling: Sampling
    max_tokens: int
    num_draft_tokens: int
    num_suffix_tokens: int = 0
    min_tokens: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    repeatable: bool = True
    trace: bool = False
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """The prompt is being read: `done_tokens` of `total_tokens` are in the target's cache."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TextPiece:
    """New text of the answer, and how the token that completed it came to be."""

    text: str
    kind: TokenKind


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of an answer.

    Attributes:
        text: all of it.
        token_ids: as emitted, EOS included, cut behind the token that completed a stop string.
        finish_reason: `stop` or `length`.
        prompt_tokens: length of the prompt.
        cached_tokens: how many of them the target's cache held, of this conversation or of a past text.
        tally: rounds, drafted and accepted tokens, alpha and tau.
        prompt_s: seconds spent on reading the prompt.
        decode_s: seconds spent on the rounds.
        seed: the one used.
        adapter: the draft's adapter; None is the bare draft.
        traces: one for each round where the request asked for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    tally: Tally
    prompt_s: float
    decode_s: float
    seed: int
    adapter: str | None = None
    traces: tuple[Trace, ...] = ()

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of the answer over the time of its rounds; reading the prompt is not counted."""
        return tokens_per_second(len(self.token_ids), self.decode_s)


@dataclass(frozen=True, slots=True)
class RoundDone:
    """A round is over, also one that showed no text. A stream may be stopped here."""


Event = PromptProgress | TextPiece | RoundDone | Completion


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
    ) -> None:
        self.backend = backend
        self.pair = pair
        self.tokenizer = tokenizer
        self.adapter: str | None = None
        self._recorder = recorder
        self._active_adapter = active_adapter
        self._prefixes = prefixes
        self.experience = Experience(schedule, suffixes or SuffixIndex(0))
        self._cache_clear_frequency = cache_clear_frequency
        self._answers = 0

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
    ) -> Iterator[Event]:
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
        self.follow_adapter()
        conversation = conversation or self.open_conversation()
        if conversation.adapter != self.adapter:
            conversation.forget_draft(self.adapter)
        settings = self._decode_settings(request)
        answer = _Answer(request, settings, self.adapter, TextStream(self.tokenizer, request.stop))
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

    def _read(self, answer: _Answer, stream: Stream) -> Iterator[Event]:
        prompt = answer.request.prompt_tokens
        started_s, total, cached = time.perf_counter(), len(prompt), None

        def draft_reads(backlog_tokens: int) -> bool:
            return stream.pace.reads_along(backlog_tokens, answer.settings.max_tokens)

        if self._prefixes is not None:
            check_fits(total, stream.conversation.max_tokens)
            self._prefixes.resume(stream.conversation, prompt)
        for done in read_prompt(self.pair, stream.conversation, prompt, draft_reads):
            cached = done if cached is None else cached
            yield PromptProgress(done, total)
        answer.cached_tokens = cached or 0
        answer.prompt_s = time.perf_counter() - started_s

    def _rounds(self, answer: _Answer, stream: Stream) -> Iterator[Event]:
        resumed_s = time.perf_counter()
        for outcome in decode(self.pair, stream):
            pieces = list(answer.take(outcome))
            # What the reader of the events does with them is not the models' time.
            answer.decode_s += time.perf_counter() - resumed_s
            logger.debug("round: %s", outcome.summary)
            yield from pieces
            yield RoundDone()
            if answer.stopped:
                break
            resumed_s = time.perf_counter()
        yield from answer.end()

    def _keep(self, conversation: Conversation) -> None:
        if self._prefixes is not None:
            self._prefixes.keep(conversation)

    def _record(self, answer: _Answer, finish_reason: str) -> None:
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


class _Answer:
    """The answer so far, as rounds and as text, and what it took."""

    def __init__(
        self, request: Request, settings: DecodeSettings, adapter: str | None, stream: TextStream
    ) -> None:
        self.request = request
        self.settings = settings
        self.adapter = adapter
        self.text = ""
        self.rounds: list[Round] = []
        self.stopped = False
        self.recorded = False
        self.cached_tokens = 0
        self.prompt_s = 0.0
        self.decode_s = 0.0
        self._stream = stream
        self._last_kind = TokenKind.TARGET

    @property
    def token_ids(self) -> tuple[int, ...]:
        """As emitted."""
        return tuple(token for outcome in self.rounds for token in outcome.tokens)

    def take(self, outcome: Round) -> Iterator[TextPiece]:
        """Add one round; yields the text that can be shown."""
        self.rounds.append(outcome)
        for token, kind in zip(outcome.tokens, outcome.kinds, strict=True):
            self._last_kind = kind
            yield from self._show(self._stream.push([token]))
            if self._stream.stopped:
                self.stopped = True
                return

    def end(self) -> Iterator[TextPiece]:
        """Show the text that was held back, and cut the rounds behind a stop string.

        Where characters are spread over tokens, a stop string is noticed a token late, or only here.
        """
        yield from self._show(self._stream.finish())
        if not self._stream.stopped:
            return
        kept, room = [], self._stream.tokens_used
        for outcome in self.rounds:
            if room > 0:
                kept.append(outcome.cut(room))
                room -= len(outcome.tokens)
        self.rounds = [*kept[:-1], replace(kept[-1], finish_reason=FinishReason.STOP)]

    def completion(self) -> Completion:
        """The end of the answer, from its rounds and what was measured around them."""
        tally = Tally()
        for outcome in self.rounds:
            tally.add(outcome)
        traces = [outcome.trace for outcome in self.rounds if outcome.trace is not None]
        return Completion(
            text=self.text,
            token_ids=self.token_ids,
            finish_reason=self.rounds[-1].finish_reason or FinishReason.LENGTH,
            prompt_tokens=len(self.request.prompt_tokens),
            cached_tokens=self.cached_tokens,
            tally=tally,
            prompt_s=self.prompt_s,
            decode_s=self.decode_s,
            seed=self.settings.seed,
            adapter=self.adapter,
            traces=tuple(traces) if self.request.trace else (),
        )

    def _show(self, text: str) -> Iterator[TextPiece]:
        if text:
            self.text += text
            yield TextPiece(text, self._last_kind)
