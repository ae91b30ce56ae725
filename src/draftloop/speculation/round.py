"""One round over a batch of streams: propose, verify, accept / recover / bonus, trim (design §4).

Contract: the only place where the two models meet. What the round emits is distributed exactly as the
target's own tokens, whoever drafted. Must not know text, requests or settings files.

Source: Leviathan et al. 2023, Algorithm 1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from draftloop.backends.base import VerifyJob
from draftloop.errors import OutOfMemory
from draftloop.speculation.drafters import ModelDrafter, SuffixDrafter, propose
from draftloop.speculation.schedule import Timed
from draftloop.speculation.shortage import in_parts
from draftloop.types import FinishReason, TokenKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from draftloop.backends.base import Model
    from draftloop.speculation.drafters import Drafted, Drafter
    from draftloop.speculation.stream import Pair, Stream
    from draftloop.speculation.together import TogetherPace
    from draftloop.types import Trace, Verdict


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did to one stream.

    A round drafts by the model or from a suffix match; what the match proposed counts apart, for it says
    nothing about the draft.

    Attributes:
        tokens: emitted, in order; the last one may be EOS.
        kinds: how each came to be.
        drafted_tokens: proposed by the draft model and not cut off by the end of the answer.
        accepted_tokens: how many of those were kept.
        alphas: Σ_x min(p(x), q(x)) at each position of the draft model's that was tested.
        finish_reason: set in the answer's last round.
        trace: the target's top tokens at each emitted position, where asked for.
        suffix_drafted_tokens, suffix_accepted_tokens: the same of a suffix match.
        seconds: what it took; None where other streams shared it.
    """

    tokens: tuple[int, ...]
    kinds: tuple[TokenKind, ...]
    drafted_tokens: int
    accepted_tokens: int
    alphas: tuple[float, ...]
    finish_reason: FinishReason | None
    trace: Trace | None
    suffix_drafted_tokens: int = 0
    suffix_accepted_tokens: int = 0
    seconds: float | None = field(default=None, compare=False)

    @property
    def from_suffix(self) -> bool:
        """Whether a suffix match proposed."""
        return self.suffix_drafted_tokens > 0

    @property
    def summary(self) -> str:
        """One line for the log."""
        if self.from_suffix:
            return f"{self.suffix_accepted_tokens} of {self.suffix_drafted_tokens} of a suffix match kept"
        return f"{self.accepted_tokens} of {self.drafted_tokens} drafts kept"

    def cut(self, num_tokens: int) -> Round:
        """This round as if the text ended behind its first `num_tokens` tokens.

        Guesses behind the end of the text were right or wrong about nothing, so they count as not drafted.
        """
        if num_tokens >= len(self.tokens):
            return self
        by_model, by_suffix = (0, num_tokens) if self.from_suffix else (num_tokens, 0)
        return replace(
            self,
            tokens=self.tokens[:num_tokens],
            kinds=self.kinds[:num_tokens],
            drafted_tokens=by_model,
            accepted_tokens=by_model,
            alphas=self.alphas[:num_tokens],
            finish_reason=FinishReason.STOP,
            trace=self.trace.head(num_tokens) if self.trace else None,
            suffix_drafted_tokens=by_suffix,
            suffix_accepted_tokens=by_suffix,
        )


def run_round(
    pair: Pair,
    streams: Sequence[Stream],
    clock: Callable[[], float] = time.perf_counter,
    together: TogetherPace | None = None,
) -> list[Round]:
    """Run one round for each stream, and tell its pace. Each must have `remaining_tokens` >= 1.

    Args:
        pair: the models.
        streams: the batch, at least one.
        clock: seconds; what a round took is told where it was one stream's alone.
        together: chooses K for several streams at once; None: each one's own pace does.
    """
    started_s, together = clock(), together if len(streams) > 1 else None
    drafters: list[Drafter] = [] if pair.draft is None else [ModelDrafter(pair.draft)]
    drafted = propose([*drafters, SuffixDrafter()], streams, together)
    settled = zip(streams, drafted, _verified(pair.target, streams, drafted), strict=True)
    outcomes = [_settle(stream, one, verdict) for stream, one, verdict in settled]
    took_s = clock() - started_s
    # What a processor takes is no price of the models', nor is a round that somebody had no memory for.
    priced = not any(stream.processor or stream.failure for stream in streams)
    if together is not None:
        together.observe(took_s if priced else None)
    seconds = took_s if len(streams) == 1 else None
    for stream, one, outcome in zip(streams, drafted, outcomes, strict=True):
        shared = together is not None and not stream.pace.apart
        stream.pace.observe(_timed(one, outcome, seconds if priced else None, together=shared))
    return [replace(outcome, seconds=seconds) for outcome in outcomes]


def _verified(target: Model, streams: Sequence[Stream], drafted: Sequence[Drafted]) -> list[Verdict | None]:
    """The target's word on each proposal; None where the stream has failed, or does so for want of memory."""
    going = [index for index, stream in enumerate(streams) if stream.failure is None]
    jobs = []
    for index in going:
        stream, proposal = streams[index], drafted[index].proposal
        start, k = stream.emitted_tokens, proposal.num_tokens
        jobs.append(
            VerifyJob(
                cache=stream.conversation.target_cache,
                last=stream.conversation.tokens[-1],
                proposal=proposal,
                rules=stream.rules,
                accept_uniforms=stream.uniforms.accept(start, k),
                extra_uniforms=stream.uniforms.extra(start, k + 1),
                trace=stream.settings.trace,
            )
        )
    verdicts: list[Verdict | None] = [None] * len(streams)
    found = in_parts(target.verify, jobs, [job.cache for job in jobs])
    for index, verdict in zip(going, found, strict=True):
        if isinstance(verdict, OutOfMemory):
            streams[index].shortage = verdict
        else:
            verdicts[index] = verdict
    return verdicts


def decode(pair: Pair, stream: Stream, clock: Callable[[], float] = time.perf_counter) -> Iterator[Round]:
    """Run rounds until the answer ends. The conversation must hold the prompt (`read_prompt`).

    Raises:
        GrammarFailed: the answer's grammar cannot be followed any further.
        OutOfMemory: the conversation holds what was emitted.
    """
    finished = stream.remaining_tokens < 1
    while not finished:
        outcome = run_round(pair, [stream], clock)[0]
        if stream.failure is not None:
            raise stream.failure
        finished = outcome.finish_reason is not None
        yield outcome


def _timed(drafted: Drafted, outcome: Round, seconds: float | None, *, together: bool) -> Timed:
    k, offer = drafted.proposal.num_tokens, drafted.offer
    return Timed(
        num_draft_tokens=k,
        by_model=k > 0 and offer is not None and offer.by_model,
        backlog_tokens=offer.backlog_tokens if k and offer else 0,
        alphas=outcome.alphas,
        seconds=seconds,
        together=together,
    )


def _settle(stream: Stream, drafted: Drafted, verdict: Verdict | None) -> Round:
    """Append what was emitted, cut at the answer's end, and trim both caches to it.

    Where the stream has failed, nothing is emitted: `Stream.failure` tells why.
    """
    end = None if verdict is None else _end(stream, verdict.tokens)
    if verdict is None or stream.failure is not None:
        stream.conversation.settle(len(stream.conversation.tokens))
        return _NOTHING
    outcome = Round(
        tokens=verdict.tokens,
        kinds=verdict.kinds,
        drafted_tokens=len(verdict.drafted_tokens),
        accepted_tokens=verdict.accepted_tokens,
        alphas=verdict.alphas,
        finish_reason=None if end is None else FinishReason.STOP,
        trace=verdict.trace,
    )
    if drafted.offer is not None and not drafted.offer.by_model:
        outcome = _counted_apart(outcome)
    if end is not None:
        outcome = outcome.cut(end)
    stream.conversation.tokens.extend(outcome.tokens)
    stream.emitted_tokens += len(outcome.tokens)
    stream.conversation.settle(len(stream.conversation.tokens))
    if outcome.finish_reason is None and stream.remaining_tokens < 1:
        return replace(outcome, finish_reason=FinishReason.LENGTH)
    return outcome


def _end(stream: Stream, tokens: tuple[int, ...]) -> int | None:
    """How many of these tokens the answer has up to its end; None where it goes on.

    It ends with EOS, or as soon as its grammar lets nothing else follow.
    """
    ends = [i + 1 for i, token in enumerate(tokens) if token in stream.settings.eos_token_ids]
    end = ends[0] if ends else None
    if stream.processor is None:
        return end
    kept = stream.processor.advance(tokens[:end])
    return kept if stream.processor.ended else end


_NOTHING = Round((), (), 0, 0, (), None, None)


def _counted_apart(outcome: Round) -> Round:
    """The same round, its drafts a suffix match's and not the draft model's."""
    kinds = (TokenKind.SUFFIX if kind is TokenKind.ACCEPTED else kind for kind in outcome.kinds)
    return replace(
        outcome,
        kinds=tuple(kinds),
        drafted_tokens=0,
        accepted_tokens=0,
        alphas=(),
        trace=outcome.trace.without_draft() if outcome.trace else None,
        suffix_drafted_tokens=outcome.drafted_tokens,
        suffix_accepted_tokens=outcome.accepted_tokens,
    )
