"""From stored requests to the figures that people look at: totals, first against last, rolling, by domain.

Contract: pure functions of `RequestSummary`; a request without drafts counts as a request and has no
metrics. Every metric comes from `speculation/metrics.py`. Must not know the store or how figures are shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING

from draftloop.speculation.metrics import (
    Tally,
    acceptance_rate,
    mean_alpha,
    tokens_per_round,
    tokens_per_second,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from draftloop.storage.records import RequestSummary

WINDOW_REQUESTS = 20
"""Requests at a domain's beginning and end, and the least that a rolling figure looks back on."""

WINDOWS = 40
"""A rolling figure of many requests looks back on this part of them, so that its curve stays a curve."""

FIRST_WINDOW_REQUESTS = 5
"""A rolling figure of fewer requests than this says nothing, so the line begins here."""


@dataclass(frozen=True, slots=True)
class SuffixFigures:
    """What suffix matches brought to some requests.

    Attributes:
        rounds: in which a match proposed.
        tokens: emitted in them.
        drafted_tokens, accepted_tokens: proposed by the matches, and kept of that.
        seconds: that those rounds took.
        share: `tokens` of all that was answered; None where nothing was.
    """

    rounds: int
    tokens: int
    drafted_tokens: int
    accepted_tokens: int
    seconds: float
    share: float | None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted."""
        return acceptance_rate(self.accepted_tokens, self.drafted_tokens)

    @property
    def tau(self) -> float | None:
        """Tokens a round with a match."""
        return tokens_per_round(self.tokens, self.rounds)

    @property
    def tokens_per_s(self) -> float | None:
        """While matches proposed."""
        return tokens_per_second(self.tokens, self.seconds)


@dataclass(frozen=True, slots=True)
class Figures:
    """What some requests amount to.

    Attributes:
        requests: all of them.
        drafted_requests: those with drafts; the metrics are theirs.
        tokens: answered.
        tally: sums over the drafted ones, from which the metrics are derived.
        decode_s: seconds that the drafted ones' rounds took.
        suffix: of suffix matches, in all requests.
    """

    requests: int
    drafted_requests: int
    tokens: int
    tally: Tally
    decode_s: float
    suffix: SuffixFigures

    @property
    def alpha(self) -> float | None:
        """Mean over tested positions."""
        return self.tally.alpha

    @property
    def tau(self) -> float | None:
        """Tokens a round of the draft's."""
        return self.tally.draft_tau

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted."""
        return self.tally.acceptance_rate

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of the answers over the time of their rounds."""
        return tokens_per_second(self.tally.completion_tokens, self.decode_s)


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain's requests.

    Attributes:
        name: as stored.
        figures: over all of them.
        first, last: over its first and last drafted requests, as many each; None where there are too few.
        drafted: the drafted ones, oldest first.
    """

    name: str
    figures: Figures
    first: Figures | None
    last: Figures | None
    drafted: tuple[RequestSummary, ...]


@dataclass(frozen=True, slots=True)
class RollingPoint:
    """A metric at one request.

    Attributes:
        position: the request's place among the drafted ones, from 1.
        value: over it and those before it, as many as the window holds.
    """

    position: int
    value: float


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive drafted requests, from position `first` to `last`, that one adapter drafted for."""

    first: int
    last: int
    adapter: str | None
    figures: Figures


def drafted_of(summaries: Sequence[RequestSummary]) -> list[RequestSummary]:
    """Those with drafts."""
    return [one for one in summaries if one.drafted_tokens]


def figures_of(summaries: Sequence[RequestSummary]) -> Figures:
    """All of them together, each position and each round counted once."""
    drafted = drafted_of(summaries)
    tally = Tally(
        rounds=sum(one.rounds for one in drafted),
        completion_tokens=sum(one.num_answer_tokens for one in drafted),
        drafted_tokens=sum(one.drafted_tokens for one in drafted),
        accepted_tokens=sum(one.accepted_tokens for one in drafted),
        tested_tokens=sum(one.tested_tokens for one in drafted),
        alpha_sum=sum(one.alpha_sum for one in drafted),
        suffix_rounds=sum(one.suffix_rounds for one in drafted),
        suffix_tokens=sum(one.suffix_tokens for one in drafted),
    )
    tokens = sum(one.num_answer_tokens for one in summaries)
    return Figures(
        requests=len(summaries),
        drafted_requests=len(drafted),
        tokens=tokens,
        tally=tally,
        decode_s=sum(one.decode_s for one in drafted),
        suffix=_suffixes_of(summaries, tokens),
    )


def _suffixes_of(summaries: Sequence[RequestSummary], answered_tokens: int) -> SuffixFigures:
    tokens = sum(one.suffix_tokens for one in summaries)
    return SuffixFigures(
        rounds=sum(one.suffix_rounds for one in summaries),
        tokens=tokens,
        drafted_tokens=sum(one.suffix_drafted_tokens for one in summaries),
        accepted_tokens=sum(one.suffix_accepted_tokens for one in summaries),
        seconds=sum(one.suffix_s for one in summaries),
        share=tokens / answered_tokens if answered_tokens else None,
    )


def alpha_of(summary: RequestSummary) -> float | None:
    """One request's alpha."""
    return mean_alpha(summary.alpha_sum, summary.tested_tokens)


def tau_of(summary: RequestSummary) -> float | None:
    """One request's tau, of the rounds that the draft model drafted or nobody did."""
    return tokens_per_round(*_draft_rounds(summary))


def tokens_per_s_of(summary: RequestSummary) -> float | None:
    """One request's tokens over the time of its rounds."""
    return tokens_per_second(summary.num_answer_tokens, summary.decode_s)


def rolling_window(num_requests: int) -> int:
    """How many requests a rolling figure looks back on, where there are so many in all."""
    return max(WINDOW_REQUESTS, num_requests // WINDOWS)


def rolling_alpha(drafted: Sequence[RequestSummary]) -> list[list[RollingPoint]]:
    """Alpha over the last `rolling_window` requests; a list for each stretch under one adapter.

    The window begins anew with each adapter, so that a change shows where it happened.
    """
    return _rolling(drafted, lambda one: (one.alpha_sum, one.tested_tokens), mean_alpha)


def rolling_tau(drafted: Sequence[RequestSummary]) -> list[list[RollingPoint]]:
    """Tau, as `rolling_alpha`."""
    return _rolling(drafted, _draft_rounds, tokens_per_round)


def rolling_tokens_per_s(drafted: Sequence[RequestSummary]) -> list[list[RollingPoint]]:
    """Tokens a second, as `rolling_alpha`."""
    return _rolling(drafted, lambda one: (one.num_answer_tokens, one.decode_s), tokens_per_second)


def stretches_of(drafted: Sequence[RequestSummary]) -> list[Stretch]:
    """The stretches of consecutive requests under one adapter, oldest first."""
    stretches = []
    start = 1
    for adapter, group in groupby(drafted, key=lambda one: one.adapter):
        members = list(group)
        stretches.append(Stretch(start, start + len(members) - 1, adapter, figures_of(members)))
        start += len(members)
    return stretches


def domains_of(summaries: Sequence[RequestSummary]) -> list[Domain]:
    """Every domain, the one with the most requests first."""
    by_name = sorted(summaries, key=lambda one: one.domain)
    groups = [(name, list(group)) for name, group in groupby(by_name, key=lambda one: one.domain)]
    domains = [_domain(name, sorted(group, key=lambda one: one.id)) for name, group in groups]
    return sorted(domains, key=lambda one: (-one.figures.requests, one.name))


def first_and_last(drafted: Sequence[RequestSummary]) -> tuple[Figures | None, Figures | None]:
    """The first and the last `WINDOW_REQUESTS`, or halves where there are fewer than twice as many."""
    count = min(WINDOW_REQUESTS, len(drafted) // 2)
    if count == 0:
        return None, None
    return figures_of(drafted[:count]), figures_of(drafted[-count:])


def blocks_of(drafted: Sequence[RequestSummary], count: int) -> list[Sequence[RequestSummary]]:
    """At most `count` runs of consecutive requests, oldest first, whose lengths differ by one at most."""
    count = min(count, len(drafted))
    edges = [len(drafted) * index // count for index in range(count + 1)] if count else []
    return [drafted[start:end] for start, end in pairwise(edges)]


def _domain(name: str, summaries: Sequence[RequestSummary]) -> Domain:
    drafted = drafted_of(summaries)
    first, last = first_and_last(drafted)
    return Domain(name, figures_of(summaries), first, last, tuple(drafted))


def _draft_rounds(summary: RequestSummary) -> tuple[int, int]:
    """Tokens, and the rounds that emitted them, without those in which a suffix match proposed."""
    return summary.num_answer_tokens - summary.suffix_tokens, summary.rounds - summary.suffix_rounds


def _rolling(
    drafted: Sequence[RequestSummary],
    sums_of: Callable[[RequestSummary], tuple[float, float]],
    metric: Callable[[float, float], float | None],
) -> list[list[RollingPoint]]:
    segments = []
    start, window = 0, rolling_window(len(drafted))
    for _, group in groupby(drafted, key=lambda one: one.adapter):
        sums = [sums_of(one) for one in group]
        tops = list(accumulate((top for top, _ in sums), initial=0.0))
        counts = list(accumulate((count for _, count in sums), initial=0.0))
        points = []
        for end in range(min(FIRST_WINDOW_REQUESTS, len(sums)), len(sums) + 1):
            begin = max(0, end - window)
            value = metric(tops[end] - tops[begin], counts[end] - counts[begin])
            if value is not None:
                points.append(RollingPoint(start + end, value))
        segments.append(points)
        start += len(sums)
    return segments
