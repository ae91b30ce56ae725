"""Pearson's chi-square: do counts come from the distribution they should come from?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FEWEST_EXPECTED = 5


def p_value(samples: Sequence[int], probabilities: NDArray[np.float64]) -> float:
    """How likely counts as far off as these are, if `samples` are drawn from `probabilities` [V].

    Outcomes are merged, rarest first, until each bin expects at least five. A sample of probability zero
    gives 0.

    Raises:
        ValueError: fewer than three bins are left, too few to tell anything.
    """
    counts = np.bincount(samples, minlength=len(probabilities))
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities / probabilities.sum() * len(samples)
    order = np.argsort(expected)
    # Bins of neighbours in rank: a new one begins where the one before has enough.
    bins = np.zeros(len(order), int)
    current, mass = 0, 0.0
    for rank, outcome in enumerate(order):
        if mass >= FEWEST_EXPECTED:
            current, mass = current + 1, 0.0
        bins[rank] = current
        mass += expected[outcome]
    if mass < FEWEST_EXPECTED and current > 0:
        bins[bins == current] = current - 1
    if bins.max() < 2:
        raise ValueError(
            f"{bins.max() + 1} bins tell nothing; draw more samples or from a flatter distribution"
        )
    observed_bins = np.bincount(bins, weights=counts[order])
    expected_bins = np.bincount(bins, weights=expected[order])
    return float(stats.chisquare(observed_bins, expected_bins).pvalue)
