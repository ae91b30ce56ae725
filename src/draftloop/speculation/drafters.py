"""Who proposes what: the drafters behind one small interface (design §4).

Contract: each drafter says what it would propose for a stream and what that would bring; the best offer is
taken, and no offer at all asks the target alone. The round does not know which drafter it was. A drafter may
look at the past only. Must not know verification.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, ProposeJob
from draftloop.errors import OutOfMemory
from draftloop.speculation.plans import Prospect
from draftloop.speculation.schedule import HORIZON_TOKENS, Choice
from draftloop.speculation.shortage import in_parts
from draftloop.speculation.stream import PREFILL_CHUNK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.base import Cache, Model
    from draftloop.speculation.stream import Stream
    from draftloop.speculation.suffix import Match
    from draftloop.speculation.together import TogetherPace

READ_EACH_ROUND_TOKENS = 2
"""What a draft that lags by nothing may have to read: its own last guess, and the extra token."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What one drafter would do for one stream.

    Attributes:
        choice: how many tokens it would propose, and the tokens a second to expect; 0 is the target alone.
        by_model: whether a model drafts, which takes time.
        backlog_tokens: what it would have to read first, beyond what it reads in every round.
        tokens: what it would propose, where that is known already.
    """

    choice: Choice
    by_model: bool = True
    backlog_tokens: int = 0
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Drafted:
    """A proposal for one stream and the offer it came from; None where there was none."""

    proposal: Proposal
    offer: Offer | None


class Drafter(Protocol):
    """Somebody who proposes."""

    def offer(self, stream: Stream) -> Offer | None:
        """What it would propose; cheap. None where it has nothing to say."""
        ...

    def prospect(self, stream: Stream) -> Prospect | None:
        """What it could propose, for somebody else to choose how much. None where it has nothing to say."""
        ...

    def propose(self, streams: Sequence[Stream], offers: Sequence[Offer]) -> list[Proposal | OutOfMemory]:
        """Make good the offers that were taken; an error where there is no memory for a stream alone."""
        ...


def propose(
    drafters: Sequence[Drafter], streams: Sequence[Stream], together: TogetherPace | None = None
) -> list[Drafted]:
    """The best offer for each stream, made good; of equals the first drafter's.

    Where there is no memory for one alone, `Stream.failure` tells it.

    Args:
        drafters: who may be asked.
        streams: the batch.
        together: chooses for all streams at once, but for those whose pace stands apart; None: each stream's
            own pace chooses.
    """
    best = [_best_offer(drafters, stream) if _chooses(stream, together) else None for stream in streams]
    if together is not None:
        best = _chosen_together(drafters, streams, best, together)
    drafted = [Drafted(NO_PROPOSAL, None if one is None else one[0]) for one in best]
    for who, drafter in enumerate(drafters):
        asked = [
            (index, one[0])
            for index, one in enumerate(best)
            if one is not None and one[1] == who and one[0].choice.num_draft_tokens
        ]
        if asked:
            proposals = drafter.propose([streams[index] for index, _ in asked], [offer for _, offer in asked])
            for (index, offer), proposal in zip(asked, proposals, strict=True):
                if isinstance(proposal, OutOfMemory):
                    streams[index].shortage = proposal
                else:
                    drafted[index] = Drafted(proposal, offer)
    return drafted


def _chooses(stream: Stream, together: TogetherPace | None) -> bool:
    return together is None or stream.pace.apart


def _best_offer(drafters: Sequence[Drafter], stream: Stream) -> tuple[Offer, int] | None:
    """It, and whose it is."""
    offers = [(drafter.offer(stream), who) for who, drafter in enumerate(drafters)]
    made = [(offer, who) for offer, who in offers if offer is not None]
    return max(made, key=lambda pair: pair[0].choice.tokens_per_s) if made else None


def _chosen_together(
    drafters: Sequence[Drafter],
    streams: Sequence[Stream],
    settled: Sequence[tuple[Offer, int] | None],
    together: TogetherPace,
) -> list[tuple[Offer, int] | None]:
    """What each stream's favourite drafter proposes of it; who stands apart has settled already."""
    prospects: list[Prospect] = []
    whose: list[int | None] = []
    for stream, own in zip(streams, settled, strict=True):
        if stream.pace.apart:
            prospects.append(_settled(drafters, stream, own))
            whose.append(None)
            continue
        found = [(drafter.prospect(stream), who) for who, drafter in enumerate(drafters)]
        made = [(one, who) for one, who in found if one is not None]
        prospect, who = made[together.favourite([one for one, _ in made])] if made else (Prospect(()), None)
        prospects.append(prospect)
        whose.append(who)
    plan = together.choose(prospects)
    best = list(settled)
    for index, (one, who, k) in enumerate(zip(prospects, whose, plan.num_draft_tokens, strict=True)):
        if who is not None:
            choice = Choice(k, plan.tokens_per_s)
            best[index] = Offer(choice, one.by_model, one.backlog_tokens, one.tokens[:k]), who
    return best


def _settled(drafters: Sequence[Drafter], stream: Stream, own: tuple[Offer, int] | None) -> Prospect:
    """What the offer that a stream has taken by itself is to the others: so many rows, and a backlog."""
    prospect = None if own is None else drafters[own[1]].prospect(stream)
    if own is None or prospect is None:
        return Prospect((), by_model=False, settled=True)
    return replace(prospect, chances=prospect.chances[: own[0].choice.num_draft_tokens], settled=True)


class ModelDrafter:
    """The draft model, as often and as far as the stream's pace has it."""

    def __init__(self, draft: Model) -> None:
        self._draft = draft

    def offer(self, stream: Stream) -> Offer | None:
        """See `Drafter`."""
        cache = stream.conversation.draft_cache
        if cache is None:
            return None
        lag = len(stream.conversation.tokens) - cache.position
        backlog = lag if lag > READ_EACH_ROUND_TOKENS else 0
        choice = stream.pace.choose(draft_budget(stream), backlog, stream.remaining_tokens)
        return Offer(choice, backlog_tokens=backlog)

    def prospect(self, stream: Stream) -> Prospect | None:
        """See `Drafter`."""
        cache = stream.conversation.draft_cache
        if cache is None:
            return None
        lag = len(stream.conversation.tokens) - cache.position
        backlog = lag if lag > READ_EACH_ROUND_TOKENS else 0
        return Prospect(
            chances=tuple(stream.pace.chances(draft_budget(stream))),
            backlog_tokens=backlog,
            ahead_tokens=min(stream.remaining_tokens, HORIZON_TOKENS),
        )

    def propose(self, streams: Sequence[Stream], offers: Sequence[Offer]) -> list[Proposal | OutOfMemory]:
        """See `Drafter`. A backlog is read in pieces, the last of them with the first guess."""
        asked = [
            (stream, _draft_cache(stream), offer.choice.num_draft_tokens)
            for stream, offer in zip(streams, offers, strict=True)
        ]
        return in_parts(self._propose, asked, [cache for _, cache, _ in asked])

    def _propose(self, asked: Sequence[tuple[Stream, Cache, int]]) -> list[Proposal]:
        jobs = []
        for stream, cache, k in asked:
            tokens = stream.conversation.tokens
            while len(tokens) - cache.position > PREFILL_CHUNK_TOKENS:
                piece = tokens[cache.position : cache.position + PREFILL_CHUNK_TOKENS]
                self._draft.prefill([PrefillJob(cache, piece)])
            jobs.append(
                ProposeJob(
                    cache=cache,
                    unread=tokens[cache.position :],
                    num_draft_tokens=k,
                    rules=stream.rules,
                    uniforms=stream.uniforms.draft(stream.emitted_tokens, k),
                    text=tokens,
                )
            )
        return self._draft.propose(jobs)


def _draft_cache(stream: Stream) -> Cache:
    cache = stream.conversation.draft_cache
    if cache is None:
        raise ValueError("a stream without a draft cache took the draft model's offer")
    return cache


class SuffixDrafter:
    """What followed the text's end before, in it or in past answers; the tokens cost nothing to find.

    A guess ends before the first token that a grammar forbids. It may propose more than `num_draft_tokens`;
    the draft model reads what was kept when it drafts again.
    """

    def offer(self, stream: Stream) -> Offer | None:
        """See `Drafter`."""
        match = self._match(stream)
        if match is None:
            return None
        choice = stream.pace.choose_free(match.acceptance)
        if not choice.num_draft_tokens:
            return None
        return Offer(choice, by_model=False, tokens=match.tokens[: choice.num_draft_tokens])

    def prospect(self, stream: Stream) -> Prospect | None:
        """See `Drafter`."""
        match = self._match(stream)
        return (
            None if match is None else Prospect(tuple(match.acceptance), by_model=False, tokens=match.tokens)
        )

    def propose(
        self,
        streams: Sequence[Stream],  # noqa: ARG002
        offers: Sequence[Offer],
    ) -> list[Proposal | OutOfMemory]:
        """See `Drafter`. Each q is a point mass."""
        return [Proposal(offer.tokens, None, len(offer.tokens)) for offer in offers]

    def _match(self, stream: Stream) -> Match | None:
        if stream.suffix is None:
            return None
        match = stream.suffix.guess(stream.conversation.tokens, stream.remaining_tokens - 1)
        if match is None or stream.processor is None:
            return match
        allowed = stream.processor.num_allowed(match.tokens)
        cut = replace(match, tokens=match.tokens[:allowed], acceptance=match.acceptance[:allowed])
        return cut if allowed else None


def draft_budget(stream: Stream) -> int:
    """How many tokens this round may propose: never more than the answer or a cache has room for."""
    budget = min(stream.settings.num_draft_tokens, stream.remaining_tokens - 1)
    draft_cache = stream.conversation.draft_cache
    if draft_cache is None:
        return 0
    # The draft reads everything up to its own last guess but one.
    room = draft_cache.max_tokens - len(stream.conversation.tokens) + 1
    return max(0, min(budget, room))
