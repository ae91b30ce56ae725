"""Who proposes what: the drafters behind one small interface (design §4).

Contract: each drafter says what it would propose for a stream and what that would bring; the best offer is
taken, and no offer at all asks the target alone. The round does not know which drafter it was. A drafter may
look at the past only. Must not know verification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, ProposeJob
from draftloop.speculation.stream import PREFILL_CHUNK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.base import Model
    from draftloop.speculation.schedule import Choice
    from draftloop.speculation.stream import Stream

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

    def propose(self, streams: Sequence[Stream], offers: Sequence[Offer]) -> list[Proposal]:
        """Make good the offers that were taken."""
        ...


def propose(drafters: Sequence[Drafter], streams: Sequence[Stream]) -> list[Drafted]:
    """The best offer for each stream, made good; of equals the first drafter's."""
    drafted = [Drafted(NO_PROPOSAL, None)] * len(streams)
    taken: list[list[tuple[int, Offer]]] = [[] for _ in drafters]
    for index, stream in enumerate(streams):
        offers = [(drafter.offer(stream), who) for who, drafter in enumerate(drafters)]
        made = [(offer, who) for offer, who in offers if offer is not None]
        if made:
            offer, who = max(made, key=lambda pair: pair[0].choice.tokens_per_s)
            taken[who].append((index, offer))
    for drafter, chosen in zip(drafters, taken, strict=True):
        asked = [(index, offer) for index, offer in chosen if offer.choice.num_draft_tokens]
        for index, offer in chosen:
            drafted[index] = Drafted(NO_PROPOSAL, offer)
        if asked:
            proposals = drafter.propose([streams[index] for index, _ in asked], [offer for _, offer in asked])
            for (index, offer), proposal in zip(asked, proposals, strict=True):
                drafted[index] = Drafted(proposal, offer)
    return drafted


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

    def propose(self, streams: Sequence[Stream], offers: Sequence[Offer]) -> list[Proposal]:
        """See `Drafter`. A backlog is read in pieces, the last of them with the first guess."""
        jobs = []
        for stream, offer in zip(streams, offers, strict=True):
            conversation, k = stream.conversation, offer.choice.num_draft_tokens
            cache = conversation.draft_cache
            if cache is None:
                raise ValueError("a stream without a draft cache took the draft model's offer")
            while len(conversation.tokens) - cache.position > PREFILL_CHUNK_TOKENS:
                start = cache.position
                piece = conversation.tokens[start : start + PREFILL_CHUNK_TOKENS]
                self._draft.prefill([PrefillJob(cache, piece)])
            jobs.append(
                ProposeJob(
                    cache=cache,
                    unread=conversation.tokens[cache.position :],
                    num_draft_tokens=k,
                    rules=stream.rules,
                    uniforms=stream.uniforms.draft(stream.emitted_tokens, k),
                    text=conversation.tokens,
                )
            )
        return self._draft.propose(jobs)


class SuffixDrafter:
    """What followed the text's end before, in it or in past answers; the tokens cost nothing to find.

    It may propose more than `num_draft_tokens`; the draft model reads what was kept when it drafts again.
    """

    def offer(self, stream: Stream) -> Offer | None:
        """See `Drafter`."""
        if stream.suffix is None:
            return None
        match = stream.suffix.guess(stream.conversation.tokens, stream.remaining_tokens - 1)
        if match is None:
            return None
        choice = stream.pace.choose_free(match.acceptance)
        if not choice.num_draft_tokens:
            return None
        return Offer(choice, by_model=False, tokens=match.tokens[: choice.num_draft_tokens])

    def propose(self, streams: Sequence[Stream], offers: Sequence[Offer]) -> list[Proposal]:  # noqa: ARG002
        """See `Drafter`. Each q is a point mass."""
        return [Proposal(offer.tokens, None, len(offer.tokens)) for offer in offers]


def draft_budget(stream: Stream) -> int:
    """How many tokens this round may propose: never more than the answer or a cache has room for."""
    budget = min(stream.settings.num_draft_tokens, stream.remaining_tokens - 1)
    draft_cache = stream.conversation.draft_cache
    if draft_cache is None:
        return 0
    # The draft reads everything up to its own last guess but one.
    room = draft_cache.max_tokens - len(stream.conversation.tokens) + 1
    return max(0, min(budget, room))
