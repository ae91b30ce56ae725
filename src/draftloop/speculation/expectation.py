"""How likely a draft is to be kept, by its position in the round, from what was tested lately.

Contract: pure sums. What it is fed lies in the past, so whatever is chosen by it leaves the output's
distribution alone (the coming random numbers never enter). Must not know costs or rounds.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PRIOR_CHANCE = 0.75
"""Before anything was tested."""
_PRIOR_WEIGHT = 4.0
_SHARED_TESTS, _STREAM_TESTS = 64.0, 16.0
"""How many tests of one position are remembered: the older ones fade."""


class PositionAcceptance:
    """Chance that draft i of a round is kept if those before it were: an exponentially weighted mean.

    It is fed with alphas, Σ_x min(p, q) at the tested positions: the acceptance's expectation, which varies
    less than whether the draft was kept. A position leans on its prior as with four tests: on the mean over
    all positions, or on what all streams saw there (`for_stream`).
    """

    def __init__(self, shared: PositionAcceptance | None = None) -> None:
        self._shared = shared
        self._keep = 1 - 1 / (_SHARED_TESTS if shared is None else _STREAM_TESTS)
        self._sums: list[float] = []
        self._weights: list[float] = []
        self._all_sum = self._all_weight = 0.0

    def for_stream(self) -> PositionAcceptance:
        """An estimate of one answer's own that begins with this one as it is now."""
        return PositionAcceptance(copy.deepcopy(self))

    def observe(self, alphas: Sequence[float]) -> None:
        """Add one round's tested positions, in order."""
        for position, alpha in enumerate(alphas):
            if position == len(self._sums):
                self._sums.append(0.0)
                self._weights.append(0.0)
            self._sums[position] = self._keep * self._sums[position] + alpha
            self._weights[position] = self._keep * self._weights[position] + 1
            self._all_sum = self._keep * self._all_sum + alpha
            self._all_weight = self._keep * self._all_weight + 1

    def chance(self, position: int) -> float:
        """Of the draft at `position`, counted from 0."""
        prior = self._mean() if self._shared is None else self._shared.chance(position)
        if position >= len(self._sums):
            return prior
        total, weight = self._sums[position], self._weights[position]
        return min(1.0, (total + _PRIOR_WEIGHT * prior) / (weight + _PRIOR_WEIGHT))

    def chances(self, count: int) -> list[float]:
        """Of the first `count` positions."""
        return [self.chance(position) for position in range(count)]

    def _mean(self) -> float:
        return (self._all_sum + _PRIOR_WEIGHT * PRIOR_CHANCE) / (self._all_weight + _PRIOR_WEIGHT)
