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
from typing import TYPE_CHECKING, Any

from draftloop.errors import InputError
from draftloop.models.text import TextStream
from draftloop.speculation.metrics import Tally, tokens_per_second
from draftloop.speculation.round import decode
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import FinishReason, Sampling, TokenKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from draftloop.backends.base import Backend
    from draftloop.models.tokenizer import Tokenizer
    from draftloop.speculation.round import Round
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
        num_draft_tokens: K; 0 asks the target alone.
        stop: the answer ends before any of these strings.
        seed: fixes every random choice; None draws one, which the completion reports.
        trace: whether the completion carries the target's top tokens of each round.
    """

    prompt_tokens: Sequence[int]
    sampling: Sampling
    max_tokens: int
    num_draft_tokens: int
    min_tokens: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    trace: bool = False


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
        cached_tokens: how many of them the conversation's cache already held.
        tally: rounds, drafted and accepted tokens, alpha and tau.
        prompt_s: seconds spent on reading the prompt.
        decode_s: seconds spent on the rounds.
        seed: the one used.
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
    """

    def __init__(
        self, backend: Backend, pair: Pair, tokenizer: Tokenizer, *, cache_clear_frequency: int
    ) -> None:
        self.backend = backend
        self.pair = pair
        self.tokenizer = tokenizer
        self._cache_clear_frequency = cache_clear_frequency
        self._answers = 0

    def open_conversation(self) -> Conversation:
        """Empty caches for a conversation of several turns."""
        return Conversation(self.pair)

    def stream(self, request: Request, conversation: Conversation | None = None) -> Iterator[Event]:
        """Answer one request.

        Args:
            request: what to answer.
            conversation: its caches are reused as far as the prompt begins like its text; None for a
                request that stands alone.

        Yields:
            `PromptProgress` while the prompt is read, the `TextPiece`s of each round and its `RoundDone`,
            and one `Completion` at the end.

        Raises:
            InputError: `max_tokens` below 1.
            ContextFull: the prompt leaves no room for an answer.
        """
        if request.max_tokens < 1:
            raise InputError(f"max_tokens is {request.max_tokens}", remedy="Ask for at least 1 token.")
        conversation = conversation or self.open_conversation()
        started_s = time.perf_counter()
        total, cached = len(request.prompt_tokens), None
        try:
            for done in read_prompt(self.pair, conversation, request.prompt_tokens):
                cached = done if cached is None else cached
                yield PromptProgress(done, total)
            prompt_s = time.perf_counter() - started_s
            answer = _Answer(TextStream(self.tokenizer, request.stop))
            settings = self._decode_settings(request)
            decode_s, resumed_s = 0.0, time.perf_counter()
            for outcome in decode(self.pair, Stream(conversation, settings)):
                pieces = list(answer.take(outcome))
                # What the reader of the events does with them is not the models' time.
                decode_s += time.perf_counter() - resumed_s
                logger.debug("round: %d of %d drafts kept", outcome.accepted_tokens, outcome.drafted_tokens)
                yield from pieces
                yield RoundDone()
                if answer.stopped:
                    break
                resumed_s = time.perf_counter()
            yield from answer.end()
            yield answer.completion(
                settings.seed,
                prompt_tokens=total,
                cached_tokens=cached or 0,
                prompt_s=prompt_s,
                decode_s=decode_s,
            )
        finally:
            self._count_answer()

    def complete(self, request: Request, conversation: Conversation | None = None) -> Completion:
        """Answer one request and return its end."""
        *_, last = self.stream(request, conversation)
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
            trace=request.trace,
        )

    def _count_answer(self) -> None:
        self._answers += 1
        if self._answers % self._cache_clear_frequency == 0:
            self.backend.clear_cache()


class _Answer:
    """The answer so far, as rounds and as text."""

    def __init__(self, stream: TextStream) -> None:
        self.text = ""
        self.rounds: list[Round] = []
        self.stopped = False
        self._stream = stream
        self._last_kind = TokenKind.TARGET

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

    def completion(self, seed: int, **measured: Any) -> Completion:
        """The end of the answer, from its rounds and what was measured around them."""
        tally = Tally()
        for outcome in self.rounds:
            tally.add(outcome)
        return Completion(
            text=self.text,
            token_ids=tuple(token for outcome in self.rounds for token in outcome.tokens),
            finish_reason=self.rounds[-1].finish_reason or FinishReason.LENGTH,
            tally=tally,
            seed=seed,
            traces=tuple(outcome.trace for outcome in self.rounds if outcome.trace is not None),
            **measured,
        )

    def _show(self, text: str) -> Iterator[TextPiece]:
        if text:
            self.text += text
            yield TextPiece(text, self._last_kind)
