"""A ratio that is estimated while it is used.

Contract: what was seen long ago weighs less. Must not know what is counted.
"""

from __future__ import annotations

_KEPT = 0.98
"""Of the weight of everything before, at each new observation: the last fifty or so count."""


class SmoothedRatio:
    """Seen over expected, drawn towards a prior while little was seen.

    Args:
        prior: the ratio before anything was seen.
        prior_weight: how much expected it is worth.
    """

    def __init__(self, prior: float, prior_weight: float) -> None:
        self._prior = prior
        self._prior_weight = prior_weight
        self._seen = 0.0
        self._expected = 0.0

    @property
    def value(self) -> float:
        """The estimate."""
        return (self._seen + self._prior * self._prior_weight) / (self._expected + self._prior_weight)

    def add(self, seen: float, expected: float) -> None:
        """Count one observation."""
        self._seen = _KEPT * self._seen + seen
        self._expected = _KEPT * self._expected + expected
