"""Totals, rolling figures and parts of requests, against what they are by definition."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloop.reporting.figures import (
    WINDOW_REQUESTS,
    blocks_of,
    domains_of,
    figures_of,
    first_and_last,
    rolling_alpha,
    rolling_tau,
    rolling_tokens_per_s,
    rolling_window,
    stretches_of,
)
from reporting.sample import sample_requests, summary_of

if TYPE_CHECKING:
    from draftloop.storage.records import RequestSummary

TEMPLATE = summary_of(sample_requests(13)[-1], 1)


@st.composite
def drafted_requests(draw: st.DrawFn) -> list[RequestSummary]:
    count = draw(st.integers(0, 70))
    adapters = draw(
        st.lists(st.sampled_from([None, None, None, "a0001", "a0002"]), min_size=count, max_size=count)
    )
    requests = []
    for number, adapter in enumerate(sorted(adapters, key=lambda one: one or ""), start=1):
        tested = draw(st.integers(1, 40))
        rounds = draw(st.integers(1, 40))
        requests.append(
            replace(
                TEMPLATE,
                id=number,
                adapter=adapter,
                tested_tokens=tested,
                alpha_sum=tested * draw(st.floats(0, 1)),
                rounds=rounds,
                num_answer_tokens=rounds + draw(st.integers(0, 100)),
            )
        )
    return requests


@given(drafted_requests())
def test_a_rolling_figure_is_that_of_the_window_within_its_stretch(requests: list[RequestSummary]) -> None:
    stretches = stretches_of(requests)
    assert len(stretches) == len(rolling_alpha(requests)) == len(rolling_tau(requests))
    curves = rolling_alpha(requests), rolling_tau(requests), rolling_tokens_per_s(requests)
    for stretch, alphas, taus, speeds in zip(stretches, *curves, strict=True):
        assert alphas[-1].position == stretch.last
        for alpha, tau, speed in zip(alphas, taus, speeds, strict=True):
            window = requests[max(stretch.first - 1, alpha.position - WINDOW_REQUESTS) : alpha.position]
            assert {one.adapter for one in window} == {stretch.adapter}
            assert alpha.value == pytest.approx(figures_of(window).alpha)
            assert tau.value == pytest.approx(figures_of(window).tau)
            assert speed.value == pytest.approx(figures_of(window).tokens_per_s)


@given(drafted_requests())
def test_stretches_cover_every_request_once(requests: list[RequestSummary]) -> None:
    stretches = stretches_of(requests)
    assert [place for one in stretches for place in range(one.first, one.last + 1)] == list(
        range(1, len(requests) + 1)
    )
    assert all(one.figures == figures_of(requests[one.first - 1 : one.last]) for one in stretches)


def test_the_window_grows_with_many_requests() -> None:
    assert [rolling_window(count) for count in (0, 20, 800, 8000)] == [20, 20, 20, 200]


@given(drafted_requests(), st.integers(1, 12))
def test_blocks_are_all_requests_in_order_and_equally_long(
    requests: list[RequestSummary], count: int
) -> None:
    blocks = blocks_of(requests, count)
    assert [one for block in blocks for one in block] == requests
    lengths = [len(block) for block in blocks]
    assert len(blocks) == min(count, len(requests))
    assert not lengths or max(lengths) - min(lengths) <= 1


@given(drafted_requests())
def test_first_and_last_do_not_overlap_and_weigh_alike(requests: list[RequestSummary]) -> None:
    first, last = first_and_last(requests)
    if len(requests) < 2:
        assert (first, last) == (None, None)
        return
    count = min(WINDOW_REQUESTS, len(requests) // 2)
    assert first == figures_of(requests[:count])
    assert last == figures_of(requests[len(requests) - count :])


def test_requests_without_drafts_count_and_have_no_metrics() -> None:
    alone = [summary_of(one, number) for number, one in enumerate(sample_requests(12), start=1)]
    figures = figures_of(alone)
    assert (figures.requests, figures.drafted_requests) == (12, 0)
    assert figures.tokens == sum(one.num_answer_tokens for one in alone)
    assert (figures.alpha, figures.tau, figures.acceptance_rate) == (None, None, None)
    assert figures.tokens_per_s is None


def test_mixed_requests_have_the_metrics_of_those_with_drafts() -> None:
    requests = [summary_of(one, number) for number, one in enumerate(sample_requests(20), start=1)]
    mixed, drafted = figures_of(requests), figures_of(requests[12:])
    assert mixed.tau == drafted.tau
    assert mixed.tokens_per_s == drafted.tokens_per_s
    assert mixed.requests == 20


def test_suffix_matches_change_no_figure_of_the_draft() -> None:
    """Tau is of the draft's rounds; speed is of all of them."""
    plain = [summary_of(one, number) for number, one in enumerate(sample_requests(20), start=1)]
    matched = [
        replace(
            one,
            rounds=one.rounds + 5,
            num_answer_tokens=one.num_answer_tokens + 40,
            suffix_rounds=5,
            suffix_tokens=40,
            suffix_drafted_tokens=50,
            suffix_accepted_tokens=35,
        )
        for one in plain
    ]
    before, after = figures_of(plain), figures_of(matched)
    assert (after.tau, after.alpha, after.acceptance_rate) == (
        before.tau, before.alpha, before.acceptance_rate,
    )  # fmt: skip
    assert after.tokens_per_s > before.tokens_per_s
    assert rolling_tau(matched[12:]) == rolling_tau(plain[12:])


def test_domains_are_sorted_by_size_and_hold_each_request_once() -> None:
    requests = [summary_of(one, number) for number, one in enumerate(sample_requests(100), start=1)]
    domains = domains_of(requests)
    sizes = [one.figures.requests for one in domains]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == 100
    assert all({one.domain for one in domain.drafted} == {domain.name} for domain in domains)
    assert all(
        [one.id for one in domain.drafted] == sorted(one.id for one in domain.drafted) for domain in domains
    )
