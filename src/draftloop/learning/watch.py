"""Takes an adapter back when live traffic says that it made things worse.

Contract: compares the requests answered with the active adapter with those before its promotion, domain by
domain, so that a change of subject is not taken for a change of the draft. Must not know who answers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from draftloop.speculation.metrics import mean_alpha

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

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

    A difference of stratified means over tested positions against its standard error. Positions of one
    request are alike, so it is the requests that scatter (Cochran 1977, section 6.4: a ratio's variance).
    """
    old, new = _by_kind(before), _by_kind(live)
    shared = [kind for kind in new if min(len(new[kind]), len(old.get(kind, ()))) >= MIN_DOMAIN_REQUESTS]
    tested = sum(float(new[kind][:, 0].sum()) for kind in shared)
    if not tested:
        return None
    fall = variance = 0.0
    for kind in shared:
        weight = float(new[kind][:, 0].sum()) / tested
        (old_alpha, old_variance), (new_alpha, new_variance) = _alpha(old[kind]), _alpha(new[kind])
        fall += weight * (old_alpha - new_alpha)
        variance += weight**2 * (old_variance + new_variance)
    return fall if fall > CERTAINTY * math.sqrt(variance) and fall > 0 else None


def _tested(requests: Sequence[RequestSummary], adapter: str | None) -> list[RequestSummary]:
    """Those that this adapter drafted for, with something to compare."""
    return [one for one in requests if one.adapter == adapter and one.tested_tokens]


def _by_kind(requests: Sequence[RequestSummary]) -> dict[Kind, NDArray[np.float64]]:
    """Tested positions and the sum of their alphas, [requests, 2]."""
    sums: dict[Kind, list[tuple[int, float]]] = {}
    for one in requests:
        if one.tested_tokens:
            depth = round(one.drafted_tokens / (one.rounds - one.suffix_rounds))
            quarters = round(4 * one.suffix_tokens / one.num_answer_tokens)
            kind = (one.domain, one.temperature, depth, quarters, one.vocabulary)
            sums.setdefault(kind, []).append((one.tested_tokens, one.alpha_sum))
    return {kind: np.array(rows, np.float64) for kind, rows in sums.items()}


def _alpha(requests: NDArray[np.float64]) -> tuple[float, float]:
    """Mean alpha over the tested positions, and its variance, of at least two requests."""
    tested, alpha_sums = requests.T
    n, mean = len(requests), mean_alpha(float(alpha_sums.sum()), int(tested.sum())) or 0.0
    scatter = float(np.square(alpha_sums - mean * tested).sum()) / float(tested.sum()) ** 2
    return mean, n / (n - 1) * scatter
