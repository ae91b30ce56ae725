"""Takes an adapter back when live traffic says that it made things worse.

Contract: compares the requests answered with the active adapter with those before its promotion, domain by
domain, so that a change of subject is not taken for a change of the draft. Must not know who answers.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from draftloop.speculation.metrics import mean_alpha

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.storage.records import PairKey, RequestSummary
    from draftloop.storage.store import Store

BEFORE_REQUESTS = 200
"""How many requests before the promotion are looked at."""
MIN_DOMAIN_REQUESTS = 3
"""A domain with fewer requests on one side cannot be compared."""
CERTAINTY = 2.576
"""Standard errors (one-sided 99.5 %): the comparison is made again and again as requests come in. Simulated
with ten looks, one adapter in fifty that is as good as the one before is taken back."""

Kind = tuple[str, float, int, int, str | None]
"""What requests must share to be compared: domain, temperature, drafts a round, rounded (a round's later
drafts are the harder ones, and a schedule makes more of them for a better draft), how many quarters of the
answer suffix matches wrote (they take the easy positions, more of them as more answers are remembered), and
what the draft's head was cut to, since no adapter brings back a token that was cut off."""


def revert_if_falling(store: Store, pair: PairKey, *, after_requests: int) -> str | None:
    """Revert the active adapter where alpha has fallen below its level before the promotion.

    Looks each time another `after_requests` requests were answered with it. The level before is that of the
    draft that it took the place of.

    Returns:
        One sentence that says so; None where nothing was done.
    """
    active = store.adapters.active(pair)
    if active is None:
        return None
    *earlier, promotion = store.adapters.history(pair)
    live = _tested(store.requests.list(pair, since_id=promotion.request_id), active.name)
    if not live or len(live) % after_requests:
        return None
    replaced = earlier[-1].adapter if earlier else None
    before = [one for one in store.requests.list(pair) if one.id <= promotion.request_id]
    fall = alpha_fall(_tested(before, replaced)[-BEFORE_REQUESTS:], live)
    if fall is None:
        return None
    reason = (
        f"{active.name} was reverted: over its {len(live)} requests alpha is {fall:.3f} below what it was "
        "before, in the same domains"
    )
    store.adapters.revert(pair, reason)
    return reason


def alpha_fall(before: Sequence[RequestSummary], live: Sequence[RequestSummary]) -> float | None:
    """How far alpha fell, in the mix of domains of `live`; None where it did not fall for certain.

    A difference of stratified means against its standard error, each request counting once.
    """
    old, new = _by_kind(before), _by_kind(live)
    shared = [kind for kind in new if min(len(new[kind]), len(old.get(kind, ()))) >= MIN_DOMAIN_REQUESTS]
    count = sum(len(new[kind]) for kind in shared)
    if not count:
        return None
    fall = variance = 0.0
    for kind in shared:
        weight = len(new[kind]) / count
        fall += weight * (statistics.fmean(old[kind]) - statistics.fmean(new[kind]))
        variance += weight**2 * (_variance_of_mean(old[kind]) + _variance_of_mean(new[kind]))
    return fall if fall > CERTAINTY * math.sqrt(variance) and fall > 0 else None


def _tested(requests: Sequence[RequestSummary], adapter: str | None) -> list[RequestSummary]:
    """Those that this adapter drafted for, with something to compare."""
    return [one for one in requests if one.adapter == adapter and one.tested_tokens]


def _by_kind(requests: Sequence[RequestSummary]) -> dict[Kind, list[float]]:
    """Alpha of each request."""
    alphas: dict[Kind, list[float]] = {}
    for one in requests:
        alpha = mean_alpha(one.alpha_sum, one.tested_tokens)
        if alpha is not None:
            depth = round(one.drafted_tokens / (one.rounds - one.suffix_rounds))
            quarters = round(4 * one.suffix_tokens / one.num_answer_tokens)
            kind = (one.domain, one.temperature, depth, quarters, one.vocabulary)
            alphas.setdefault(kind, []).append(alpha)
    return alphas


def _variance_of_mean(values: Sequence[float]) -> float:
    return statistics.variance(values) / len(values)
