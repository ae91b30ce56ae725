"""Every shape of round once, before anybody waits: where a backend records its rounds, the first takes long.

Contract: on scratch caches, through the models' seam. Requests with other sampling than the settings' still
pay for their own first rounds, as do drafts after an adapter was swapped. Must not know settings or requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from draftloop.backends.base import NO_PROPOSAL, PrefillJob
from draftloop.speculation.drafters import READ_EACH_ROUND_TOKENS
from draftloop.speculation.stream import PREFILL_CHUNK_TOKENS
from draftloop.speculation.timing import caches_beside, filled_cache, proposal_step, verification_step
from draftloop.types import Rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftloop.backends.base import Cache, Model, Proposal
    from draftloop.speculation.calibration import ServedRounds
    from draftloop.speculation.stream import Pair


def rehearse(pair: Pair, rounds: ServedRounds, most_together: int = 1) -> None:
    """Run each number of drafted tokens, and each verification that may follow, once.

    Args:
        pair: without a draft, suffix matches alone are verified.
        rounds: what is served.
        most_together: sequences that may share a round. Of 2, 4, 8 and so on together the usual rounds are
            run; backends round what lies between up to these.
    """
    for model in (pair.target, *(() if pair.draft is None else (pair.draft,))):
        _rehearse_reading(model)
    drafted = NO_PROPOSAL if pair.draft is None else _rehearse_drafts(pair.draft, rounds, most_together)
    cache = filled_cache(pair.target, rounds.widest)
    room, rules = cache.max_tokens - cache.position - 1, Rules(rounds.sampling)
    for source, most in ((drafted, drafted.num_tokens), (NO_PROPOSAL, rounds.num_suffix_tokens)):
        for k in range(min(most, room) + 1):
            verification_step(pair.target, [cache], k, rules, drafted=source, trace=rounds.trace)()
    for caches in _companies(pair.target, cache, most_together):
        for k in range(min(drafted.num_tokens, room) + 1):
            verification_step(pair.target, caches, k, rules, drafted=drafted, trace=rounds.trace)()


def _rehearse_reading(model: Model) -> None:
    """Read pieces of a prompt of 1, 2, 4 and so many tokens; backends round what lies between up to these."""
    cache, count = model.new_cache(), 1
    while count <= min(PREFILL_CHUNK_TOKENS, cache.max_tokens):
        model.prefill([PrefillJob(cache, [1] * count)])
        cache.trim(count)
        count *= 2


def _rehearse_drafts(draft: Model, rounds: ServedRounds, most_together: int) -> Proposal:
    """Run each number of drafted tokens behind each number of unread ones that follow a round; the longest.

    Behind a suffix match more is unread: that is caught up with once, whatever is drafted then.
    """
    widest = READ_EACH_ROUND_TOKENS + rounds.num_suffix_tokens
    cache, rules = filled_cache(draft, rounds.num_draft_tokens + widest), Rules(rounds.sampling)
    longest, free = NO_PROPOSAL, cache.max_tokens - cache.position
    for unread in range(1, widest + 1):
        most = rounds.num_draft_tokens if unread <= READ_EACH_ROUND_TOKENS else 1
        for k in range(1, min(most, free - unread + 1) + 1):
            proposal = proposal_step(draft, [cache], k, rules, unread)()
            longest = max(longest, proposal, key=lambda one: one.num_tokens)
    for caches in _companies(draft, cache, most_together):
        for unread in range(1, READ_EACH_ROUND_TOKENS + 1):
            if unread < free:
                proposal_step(draft, caches, min(rounds.num_draft_tokens, free - unread + 1), rules, unread)()
    return longest


def _companies(model: Model, cache: Cache, most_together: int) -> Iterator[list[Cache]]:
    """It with copies of it: 2, 4, 8 and so on, up to the first number that is no less than the most."""
    count = 1
    while count < most_together:
        count *= 2
        caches = caches_beside(model, cache, min(count, most_together))
        if caches:
            yield caches
