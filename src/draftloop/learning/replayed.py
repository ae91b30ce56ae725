"""What the gate decides by: held-out requests replayed under three drafts, and what a round costs.

Contract: plain data and sums of it. Must not know how it was measured, nor what is decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from draftloop.speculation.metrics import expected_rounds, mean_alpha, tokens_per_round

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from numpy.typing import NDArray

    from draftloop.speculation.costs import RoundCosts

    Floats = NDArray[np.float64]

CANDIDATE, INCUMBENT, BARE = range(3)
"""Columns of a `Table`."""


@dataclass(frozen=True, slots=True, eq=False)
class ReplayedRequest:
    """One held-out request, teacher-forced under each draft. R response rows.

    Attributes:
        domain: what it is about.
        num_draft_tokens: the cap of the rounds to expect, the same for all requests.
        candidate, incumbent, bare: [R] float32, alpha of each row (`Model.replay`). Where no adapter is
            active, incumbent and bare are the same.
    """

    domain: str
    num_draft_tokens: int
    candidate: NDArray[np.float32]
    incumbent: NDArray[np.float32]
    bare: NDArray[np.float32]

    @property
    def drafts(self) -> tuple[NDArray[np.float32], ...]:
        """The alphas in the order of a table's columns."""
        return self.candidate, self.incumbent, self.bare


@dataclass(frozen=True, slots=True)
class TimedRound:
    """A mean round as it was served.

    Attributes:
        seconds: of the round.
        drafted_tokens: in it; no whole number where K varied.
    """

    seconds: float
    drafted_tokens: float


@dataclass(frozen=True, slots=True)
class RoundCost:
    """What a round costs with one draft, measured on this machine.

    Attributes:
        draft_s: seconds a drafted token.
        verify_s: seconds of everything else at the cap: the target's verification above all.
        by_width: where a schedule chooses K, the verification by its width, and what asking the draft costs
            once a round; None where K is constant.
    """

    draft_s: float
    verify_s: float
    by_width: RoundCosts | None = None

    def round_s(self, num_draft_tokens: int) -> float:
        """Seconds of a round that drafts K tokens."""
        drafts_s = num_draft_tokens * self.draft_s
        if self.by_width is None:
            return drafts_s + self.verify_s
        asking_s = self.by_width.draft_round_s if num_draft_tokens else 0.0
        return drafts_s + asking_s + self.by_width.verify_at(num_draft_tokens + 1)

    def fastest(self, alphas: Sequence[Sequence[float]], cap: int) -> tuple[int, Floats]:
        """The K that answers these requests in the fewest seconds, and each one's expected rounds at it, [n].

        A constant K is the cap.
        """
        return self.fastest_of([self.rounds(rows, cap) for rows in alphas])

    def rounds(self, alphas: Sequence[float], cap: int) -> dict[int, float]:
        """Expected rounds of one request at each K that may be chosen."""
        depths = (cap,) if self.by_width is None else range(cap + 1)
        return {k: expected_rounds(alphas, k) for k in depths}

    def fastest_of(self, requests: Sequence[Mapping[int, float]]) -> tuple[int, Floats]:
        """As `fastest`, of at least one request's `rounds`."""
        rounds = {k: np.array([one[k] for one in requests], np.float64) for k in requests[0]}
        best = min(rounds, key=lambda k: float(rounds[k].sum()) * self.round_s(k))
        return best, rounds[best]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What n requests add up to; columns are candidate, incumbent and bare draft.

    Attributes:
        rows: [n], response rows.
        alpha_sums: [n, 3].
        rounds: [n, 3], expected at the cap, so that tau can be compared.
        seconds: [n, 3], expected at the K that is fastest with that draft.
        depths: those K.
        square_losses: [n], Σ over rows of (alpha of the incumbent - alpha of the candidate)².
    """

    rows: Floats
    alpha_sums: Floats
    rounds: Floats
    seconds: Floats
    depths: tuple[int, ...]
    square_losses: Floats

    @classmethod
    def of(cls, requests: Sequence[ReplayedRequest], costs: Sequence[RoundCost]) -> Self:
        """Add up at least one request, given what a round costs with each of the three drafts.

        Where alpha is no number nothing would be accepted, so it counts as 0.

        Raises:
            ValueError: a request's drafts have different numbers of rows.
        """
        if any(len({len(rows) for rows in one.drafts}) > 1 for one in requests):
            raise ValueError("a request's drafts were replayed on different numbers of rows")
        cap = requests[0].num_draft_tokens
        alphas = [np.array([_as_chances(rows) for rows in one.drafts]) for one in requests]
        by_draft = [[drafts[i].tolist() for drafts in alphas] for i in range(len(costs))]
        rounds = [[expected_rounds(rows, cap) for rows in texts] for texts in by_draft]
        fastest = [cost.fastest(texts, cap) for cost, texts in zip(costs, by_draft, strict=True)]
        seconds = [found * cost.round_s(k) for cost, (k, found) in zip(costs, fastest, strict=True)]
        return cls(
            rows=np.array([drafts.shape[1] for drafts in alphas], np.float64),
            alpha_sums=np.array([drafts.sum(axis=1) for drafts in alphas]),
            rounds=np.array(rounds).T,
            seconds=np.array(seconds).T,
            depths=tuple(k for k, _ in fastest),
            square_losses=np.array(
                [np.square(drafts[INCUMBENT] - drafts[CANDIDATE]).sum() for drafts in alphas]
            ),
        )

    def part(self, chosen: NDArray[np.bool_]) -> Table:
        """The requests that are chosen, [n]."""
        return Table(
            rows=self.rows[chosen],
            alpha_sums=self.alpha_sums[chosen],
            rounds=self.rounds[chosen],
            seconds=self.seconds[chosen],
            depths=self.depths,
            square_losses=self.square_losses[chosen],
        )

    @property
    def num_rows(self) -> int:
        """Of all requests."""
        return int(self.rows.sum())

    def alpha(self, draft: int) -> float | None:
        """Mean over all rows."""
        return mean_alpha(float(self.alpha_sums[:, draft].sum()), self.num_rows)

    def tau(self, draft: int) -> float | None:
        """All tokens over all expected rounds."""
        return tokens_per_round(self.num_rows, float(self.rounds[:, draft].sum()))

    def gain_over(self, draft: int) -> float:
        """The candidate's tokens per second over those of `draft`, less 1. The tokens are the same."""
        seconds = self.seconds.sum(axis=0)
        return float(seconds[draft] / seconds[CANDIDATE] - 1)


def _as_chances(alphas: NDArray[np.float32]) -> Floats:
    return np.clip(np.nan_to_num(alphas.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0)
