"""The rules of a benchmark: who goes first, what a ratio is, what counts as decoding."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloop.benchmarking.child import usable_cores
from draftloop.benchmarking.contenders import Answer, Job, answer_from_bursts
from draftloop.benchmarking.run import WARM_UP_TOKENS, interleave
from draftloop.benchmarking.summary import add_best, paired_ratio, summarize
from draftloop.types import Sampling

SPEEDS = st.floats(0.1, 1000)


@dataclass
class Noting:
    """A contender that notes what it is asked."""

    name: str
    log: list[tuple[str, int, int]] = field(default_factory=list)
    description: str = ""

    def answer(self, job: Job) -> Answer:
        self.log.append((self.name, job.prompt_tokens[0], job.max_tokens))
        return Answer(tokens=1, seconds=1.0)


@given(num_contenders=st.integers(1, 5), num_jobs=st.integers(1, 12))
def test_every_prompt_is_decoded_by_all_before_the_next_and_everyone_goes_first(num_contenders, num_jobs):
    log, told = [], []
    contenders = [Noting(f"mode {i}", log) for i in range(num_contenders)]
    jobs = [Job((i,), 100, Sampling(), 0) for i in range(num_jobs)]
    answers = list(interleave(contenders, jobs, lambda name, _: told.append(name)))
    warm_up, measured = log[:num_contenders], log[num_contenders:]
    assert warm_up == [(one.name, 0, WARM_UP_TOKENS) for one in contenders]
    assert [prompt for _, prompt, _ in measured] == [i for i in range(num_jobs) for _ in contenders]
    assert told == [name for name, _, _ in measured]
    assert all(list(one) == [c.name for c in contenders] for one in answers)
    firsts = Counter(name for name, _, _ in measured[::num_contenders])
    counts = [firsts[one.name] for one in contenders]
    assert max(counts) - min(counts) <= 1


def test_a_warm_up_is_no_longer_than_an_answer():
    one = Noting("one")
    list(interleave([one], [Job((0,), 3, Sampling(), 0)], lambda *_: None))
    assert [tokens for _, _, tokens in one.log] == [3, 3]


@given(st.lists(st.tuples(SPEEDS, SPEEDS), min_size=2, max_size=30))
def test_a_ratio_is_the_median_of_ratios_inside_its_interval_and_the_range(pairs):
    over, under = zip(*pairs, strict=True)
    ratio = paired_ratio(over, under)
    ratios = [a / b for a, b in pairs]
    assert ratio.median == pytest.approx(float(np.median(ratios)))
    slack = 1 + 1e-12
    assert min(ratios) <= ratio.low * slack
    assert ratio.low <= ratio.median * slack
    assert ratio.median <= ratio.high * slack
    assert ratio.high <= max(ratios) * slack


@given(st.lists(st.tuples(SPEEDS, SPEEDS), min_size=2, max_size=20), st.floats(0.1, 10))
def test_a_machine_that_slows_all_modes_alike_changes_no_ratio(pairs, factor):
    over, under = zip(*pairs, strict=True)
    slower = [speed * factor for speed in over], [speed * factor for speed in under]
    for got, expected in zip(
        (paired_ratio(*slower).median, paired_ratio(*slower).low),
        (paired_ratio(over, under).median, paired_ratio(over, under).low),
        strict=True,
    ):
        assert got == pytest.approx(expected)


def test_prompts_pair_up_so_that_their_own_spread_does_not_widen_the_interval():
    under = [1.0, 10.0, 100.0, 3.0, 30.0, 7.0]
    ratio = paired_ratio([2 * speed for speed in under], under)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        over = np.exp(random.normal(0.2, 0.3, size=20))
        ratio = paired_ratio(list(over), [1.0] * 20, seed=seed)
        covered += ratio.low <= np.exp(0.2) <= ratio.high
    assert 0.91 <= covered / 300 <= 0.99


def test_a_prompt_without_a_speed_does_not_count():
    assert paired_ratio([2.0, None, 5.0], [1.0, 1.0, None]).median == 2
    assert paired_ratio([2.0], [1.0]) == paired_ratio([2.0, None], [1.0, 1.0])
    assert paired_ratio([2.0], [1.0]).low is None
    assert paired_ratio([None], [1.0]).median is None


def test_the_first_round_counts_with_neither_its_time_nor_its_tokens():
    answer = answer_from_bursts([(10.0, 3), (10.5, 2), (12.0, 4)])
    assert (answer.tokens, answer.seconds, answer.rounds) == (6, 2.0, 2)
    assert answer.tokens_per_s == 3
    assert answer_from_bursts([(10.0, 3)]).tokens_per_s is None


def test_figures_sum_rounds_and_take_medians_of_speeds():
    prompts = [
        {"target": Answer(10, seconds), "speculative": Answer(10, seconds / 2, rounds, 0.5 * rounds, rounds)}
        for seconds, rounds in ((1.0, 2), (2.0, 5), (10.0, 3))
    ]
    summary = summarize(prompts, {})
    assert summary.modes["target"].tokens_per_s == 5
    assert summary.modes["target"].tau is None
    assert summary.modes["speculative"].tau == 3
    assert summary.modes["speculative"].alpha == 0.5
    assert summary.ratios["speculative/target"].median == 2


def test_the_best_mode_is_chosen_anew_at_each_prompt():
    prompts = [{"a": Answer(1, 1.0), "b": Answer(1, 4.0)}, {"a": Answer(1, 4.0), "b": Answer(1, 1.0)}]
    summary = summarize([add_best(one, "a best", ["a", "b"]) for one in prompts], {"a best": ["a", "b"]})
    assert summary.modes["a best"].tokens_per_s == 1
    assert list(summary.ratios) == ["b/a"]


def test_a_process_counts_the_cores_that_it_is_confined_to():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system confines no process")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= usable_cores() <= len(before)
