"""The confidence interval that the program gives: bootstrap over independent cases, percentiles, expanded.

Contract: pure: the same cases and seed give the same interval. Must not know what a case is.

Sources: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", ch. 13 (percentile interval);
Hesterberg 2015, "What Teachers Should Know About the Bootstrap" (the expanded percentile interval).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from draftloop.learning.student import student_quantile

if TYPE_CHECKING:
    from numpy.typing import NDArray

Statistic = Callable[["NDArray[np.int64]"], "NDArray[np.float64]"]
"""[B, n] indices of drawn cases, a row for each resample -> [B] values."""

CONFIDENCE = 0.95
_BLOCK_RESAMPLES = 250


def bootstrap_interval(
    n: int, statistic: Statistic, *, seed: int = 0, num_resamples: int = 2000
) -> tuple[float, float]:
    """95 % interval of a statistic of `n` >= 2 independent cases.

    The plain percentile interval of few cases is too narrow; Hesterberg's expansion takes the percentiles
    that Student's t with n - 1 degrees and the factor sqrt(n / (n - 1)) would take of a normal distribution.
    It vanishes as n grows; below five cases it reaches from the lowest to the highest resample.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    sizes = [min(_BLOCK_RESAMPLES, num_resamples - i) for i in range(0, num_resamples, _BLOCK_RESAMPLES)]
    values = [statistic(random.integers(n, size=(size, n))) for size in sizes]
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_quantile((1 + CONFIDENCE) / 2, n - 1))
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return float(low), float(high)
