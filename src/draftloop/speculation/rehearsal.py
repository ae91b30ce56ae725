"""Every shape of round once, before anybody waits: where a backend records its rounds, the first takes long.

Contract: on scratch caches, through the models' seam. Requests with other sampling than the settings' still
pay for their own first rounds, as do drafts after an adapter was swapped. Must not know settings or requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from draftloop.backends.base import NO_PROPOSAL
from draftloop.speculation.drafters import READ_EACH_ROUND_TOKENS
from draftloop.speculation.timing import filled_cache, proposal_step, verification_step
from draftloop.types import Rules

if TYPE_CHECKING:
    from draftloop.backends.base import Model, Proposal
    from draftloop.speculation.calibration import ServedRounds
    from draftloop.speculation.stream import Pair


def rehearse(pair: Pair, rounds: ServedRounds) -> None:
    """Run each number of drafted tokens, and each verification that may follow, once.

    Args:
        pair: without a draft, suffix matches alone are verified.
        rounds: what is served.
    """
    drafted = NO_PROPOSAL if pair.draft is None else _rehearse_drafts(pair.draft, rounds)
    cache = filled_cache(pair.target, rounds.widest)
    room, rules = cache.max_tokens - cache.position - 1, Rules(rounds.sampling)
    for source, most in ((drafted, drafted.num_tokens), (NO_PROPOSAL, rounds.num_suffix_tokens)):
        for k in range(min(most, room) + 1):
            verification_step(pair.target, [cache], k, rules, drafted=source, trace=rounds.trace)()


def _rehearse_drafts(draft: Model, rounds: ServedRounds) -> Proposal:
    """Run each number of drafted tokens behind each number of unread ones that follow a round; the longest.

    Behind a suffix match more is unread: that is caught up with once, whatever is drafted then.
    """
    widest = READ_EACH_ROUND_TOKENS + rounds.num_suffix_tokens
    cache, rules = filled_cache(draft, rounds.num_draft_tokens + widest), Rules(rounds.sampling)
    longest = NO_PROPOSAL
    for unread in range(1, widest + 1):
        room = cache.max_tokens - cache.position - unread + 1
        most = rounds.num_draft_tokens if unread <= READ_EACH_ROUND_TOKENS else 1
        for k in range(1, min(most, room) + 1):
            proposal = proposal_step(draft, [cache], k, rules, unread)()
            longest = max(longest, proposal, key=lambda one: one.num_tokens)
    return longest
