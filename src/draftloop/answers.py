"""What is asked of the engine, the events that answer it, and the answer while it is made.

Contract: plain data, and the text that grows out of rounds. Must not know the models or how a round works.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from draftloop.speculation.metrics import Tally, tokens_per_second
from draftloop.speculation.processors import Steering
from draftloop.types import FinishReason, TokenKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from draftloop.errors import OutOfMemory
    from draftloop.learning.recorder import Provenance
    from draftloop.models.grammar import Grammar
    from draftloop.models.text import TextStream
    from draftloop.speculation.round import Round
    from draftloop.speculation.stream import DecodeSettings
    from draftloop.types import Sampling, Trace


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
        logit_bias: added to these tokens' logits, -100 to 100; for p and q alike.
        presence_penalty: taken off the logits of what the answer has said, -2 to 2.
        frequency_penalty: taken off once for each time that it said it, -2 to 2.
        grammar: what the answer must look like. It decides alone when the answer may end: `min_tokens` holds
            nothing back then.
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
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    grammar: Grammar | None = None

    @property
    def steering(self) -> Steering:
        """What it changes about the target's distribution."""
        return Steering(self.logit_bias, self.presence_penalty, self.frequency_penalty, self.grammar)


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
        decode_s: seconds spent on the rounds; of a round that others shared, an equal part.
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
    """A round is over, also one that showed no text. A stream may be stopped here.

    Attributes:
        outcome: the round as it was decoded, its trace included where the request asks for one. Where a stop
            string ends the answer, the last of them has tokens that the completion has not.
    """

    outcome: Round


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of an answer of a batch that could not be made."""

    error: Exception


@dataclass(frozen=True, slots=True)
class PutOff:
    """There was no memory for an answer of a batch beside the others, before anything of it was said.

    It is no member any more. Its request may join anew when the batch has places, as if it never had.

    Attributes:
        error: what ran out.
    """

    error: OutOfMemory


Event = PromptProgress | TextPiece | RoundDone | Completion


class Answer:
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
