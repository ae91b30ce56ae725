"""The learning rate over a run."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloop.learning.learning_rate import learning_rate_at


def curve(warmup_steps: int, total_steps: int, peak: float = 1.0) -> list[float]:
    return [
        learning_rate_at(step, peak=peak, warmup_steps=warmup_steps, total_steps=total_steps)
        for step in range(1, total_steps + 1)
    ]


def test_warmup_is_a_line_from_zero_to_the_peak():
    assert curve(10, 100, peak=1e-4)[:10] == pytest.approx([1e-5 * step for step in range(1, 11)])


def test_the_rest_is_half_a_cosine():
    rates = curve(10, 109)
    # 100 steps from the peak at step 10 to zero at step 110, the one after the last.
    assert rates[34] == pytest.approx((1 + 0.5**0.5) / 2)
    assert rates[59] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001


def test_without_warmup_the_run_begins_at_the_peak():
    assert curve(0, 20)[0] == 1.0


@pytest.mark.parametrize("warmup_steps", [20, 21, 1000])
def test_a_warmup_longer_than_the_run_takes_half_of_it(warmup_steps):
    assert curve(warmup_steps, 20) == curve(10, 20)


@given(st.integers(0, 300), st.integers(1, 200), st.floats(1e-6, 1))
def test_every_run_rises_to_the_peak_and_falls(warmup_steps, total_steps, peak):
    rates = curve(warmup_steps, total_steps, peak)
    top = rates.index(max(rates))
    assert rates[top] == peak
    assert all(0 < rate <= peak for rate in rates)
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a > b for a, b in pairwise(rates[top:]))
    if warmup_steps < total_steps:
        assert top + 1 == max(1, warmup_steps)


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match="of a run of 10"):
        learning_rate_at(step, peak=1.0, warmup_steps=2, total_steps=10)
