"""Quantiles of Student's t: how far a mean of few requests may be off.

Contract: pure arithmetic.

Source: Abramowitz and Stegun 1964, eq. 26.7.5.
"""

from __future__ import annotations

from statistics import NormalDist


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, to about 0.1 % from 4 degrees on (Abramowitz and Stegun 26.7.5)."""
    x = NormalDist().inv_cdf(probability)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / float(degrees) ** (i + 1) for i, term in enumerate(terms))
