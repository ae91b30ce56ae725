"""Which requests are failures, which are replay, and which are kept out of training.

Contract: pure functions of summaries. Must not know the store or what becomes of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from draftloop.speculation.metrics import acceptance_rate, constant_acceptance_rate, mean_alpha
from draftloop.speculation.schedule import PROBE_ROUNDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.storage.records import RequestSummary

RECENT_REQUESTS = 200
WORST_PERCENT = 30
VALIDATION_EVERY = 4
LEAST_TESTED_TOKENS = PROBE_ROUNDS
"""Where suffix matches write most of an answer, a round or two may be left to the draft, which say nothing
about it. One probe tests so many tokens at least: a draft so bad that it is asked in probes alone must still
be learnt from."""


@dataclass(frozen=True, slots=True)
class Split:
    """The requests of one pair by what they are good for, oldest first in each part; no request is in two.

    Attributes:
        failures: below the threshold, and no promoted adapter has learnt from them yet.
        replay: the others that may be trained on: good ones, learnt ones, and those with few or no drafts.
        validation: held out, to choose a checkpoint by.
        gate: held out, to decide about promotion by.
    """

    failures: tuple[RequestSummary, ...]
    replay: tuple[RequestSummary, ...]
    validation: tuple[RequestSummary, ...]
    gate: tuple[RequestSummary, ...]


def threshold_of(setting: float | Literal["auto"], recent: Sequence[RequestSummary]) -> float:
    """The acceptance rate that separates failures (strictly below) from replay.

    A number is itself. `auto` ranks the newest 200 requests with drafts by their rate; the threshold is the
    lowest rate outside the worst 30 % (rounded up). So at most these are failures, and what ties with the
    threshold is none. Where the lowest rate of all is shared by more than 30 %, they are alike and are
    marked together: the threshold is the next rate above. Never are all marked: where every rate is equal
    none is. Without any request with drafts the threshold is 0.
    """
    if setting != "auto":
        return setting
    newest = sorted(recent, key=lambda one: one.id)
    rates = [rate for one in newest if (rate := _rate(one)) is not None][-RECENT_REQUESTS:]
    if not rates:
        return 0.0
    ranked = sorted(rates)
    worst = -(-WORST_PERCENT * len(ranked) // 100)
    return next((rate for rate in ranked[worst:] if rate > ranked[0]), ranked[0])


def split(summaries: Sequence[RequestSummary], threshold: float) -> Split:
    """Sort requests by what they are good for.

    Of the held-out ones every fourth, in the order of their ids, validates; the rest is the gate's. With
    fewer than four the gate has them all.
    """
    ordered = sorted(summaries, key=lambda one: one.id)
    held_out = [one for one in ordered if one.held_out]
    usable = [one for one in ordered if not one.held_out]
    validation = held_out[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    chosen = {one.id for one in validation}
    return Split(
        failures=tuple(one for one in usable if _is_failure(one, threshold)),
        replay=tuple(one for one in usable if not _is_failure(one, threshold)),
        validation=tuple(validation),
        gate=tuple(one for one in held_out if one.id not in chosen),
    )


def _is_failure(summary: RequestSummary, threshold: float) -> bool:
    rate = _rate(summary)
    return rate is not None and rate < threshold and summary.trained_by is None


def _rate(summary: RequestSummary) -> float | None:
    """The acceptance rate, at `num_draft_tokens` in each round; None where too few tokens were tested.

    Rounds of nothing but drafts test every second token of the answer at least, be it ever so short.
    A schedule drafts little where the draft is bad, and of few drafts a larger share is accepted: such a
    request is judged by the rate that its alpha would give, so that a bad draft is not learnt from less.
    """
    if summary.tested_tokens < min(LEAST_TESTED_TOKENS, summary.num_answer_tokens // 2):
        return None
    alpha, k = mean_alpha(summary.alpha_sum, summary.tested_tokens), summary.num_draft_tokens
    # Where max_tokens ends an answer, its last rounds have room for K - 1, K - 2 … 0 drafts.
    rounds = summary.rounds - summary.suffix_rounds
    full_rounds = summary.drafted_tokens >= k * rounds - k * (k + 1) // 2
    if alpha is None or full_rounds:
        return acceptance_rate(summary.accepted_tokens, summary.drafted_tokens)
    return constant_acceptance_rate(alpha, k)
