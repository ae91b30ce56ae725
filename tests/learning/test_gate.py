"""The gate: better passes, chance does not, and whoever loses is named."""

from __future__ import annotations

from dataclasses import astuple
from json import dumps

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from draftloop.learning.gate import Verdict, judge
from draftloop.learning.replayed import ReplayedRequest, RoundCost
from draftloop.learning.student import student_quantile
from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.metrics import expected_rounds

COST = RoundCost(draft_s=0.01, verify_s=0.1)
K = 4


def greedy_rows(random: np.random.Generator, count: int, alpha: float) -> np.ndarray:
    return (random.random(count) < alpha).astype(np.float32)


def request(candidate, incumbent, bare=None, domain: str = "letters") -> ReplayedRequest:
    alphas = [
        np.asarray(rows, np.float32) for rows in (candidate, incumbent, incumbent if bare is None else bare)
    ]
    return ReplayedRequest(domain, K, *alphas)


def traffic(
    random: np.random.Generator,
    count: int,
    before: float,
    after: float,
    *,
    rows: int = 100,
    domain: str = "letters",
) -> list[ReplayedRequest]:
    """Greedy requests whose alpha goes from `before` to `after`; most rows stay as they were."""
    made = []
    for _ in range(count):
        incumbent = greedy_rows(random, rows, before)
        redone = random.random(rows) < 0.2
        fresh = greedy_rows(random, rows, before + (after - before) / 0.2)
        made.append(request(np.where(redone, fresh, incumbent), incumbent, domain=domain))
    return made


def verdict_on(requests, **options) -> Verdict:
    costs = {"candidate_cost": COST, "incumbent_cost": COST}
    return judge(requests, **{**costs, **options})


def test_a_clearly_better_candidate_is_promoted():
    verdict = verdict_on(traffic(np.random.default_rng(0), 40, 0.6, 0.7))
    assert verdict.promote
    assert verdict.requests == 40
    assert verdict.rows == 4000
    assert verdict.alpha_after > verdict.alpha_before
    assert verdict.tau_after > verdict.tau_before
    low, high = verdict.gain_ci95
    assert 0 < low < verdict.gain < high
    for figure in (f"{verdict.tau_before:.3f}", f"{verdict.tau_after:.3f}", "40 held-out requests"):
        assert figure in verdict.reason


def test_figures_are_pooled_over_rows_and_rounds():
    requests = [request([1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0]), *[request([0.5, 0.5], [0.25, 0.25])] * 4]
    verdict = verdict_on(requests)
    rounds = [
        sum(expected_rounds(list(getattr(one, draft)), K) for one in requests)
        for draft in ("candidate", "incumbent")
    ]
    assert verdict.alpha_before == pytest.approx((3 + 8 * 0.25) / 14)
    assert verdict.alpha_after == pytest.approx((6 + 8 * 0.5) / 14)
    assert verdict.tau_after == pytest.approx(14 / rounds[0])
    assert verdict.tau_before == pytest.approx(14 / rounds[1])
    assert verdict.gain == pytest.approx(rounds[1] / rounds[0] - 1)


def test_a_slower_form_eats_the_gain():
    requests = traffic(np.random.default_rng(1), 40, 0.6, 0.65)
    slow = RoundCost(draft_s=2 * COST.draft_s, verify_s=COST.verify_s)
    same, slower = verdict_on(requests), verdict_on(requests, candidate_cost=slow)
    assert same.promote
    assert not slower.promote
    assert 1 + slower.gain == pytest.approx((1 + same.gain) * 0.14 / 0.18)
    assert 1 + slower.gain_ci95[0] == pytest.approx((1 + same.gain_ci95[0]) * 0.14 / 0.18)
    assert (slower.tau_after, slower.alpha_after) == (same.tau_after, same.alpha_after)


@pytest.mark.parametrize("count", [5, 8, 20])
def test_chance_is_refused(count):
    """A candidate that differs from the incumbent but is no better: a 95 % interval lets 2.5 % through."""
    promoted = better = 0
    for seed in range(200):
        requests = traffic(np.random.default_rng(seed), count, 0.7, 0.7, rows=50)
        verdict = verdict_on(requests, seed=seed, num_resamples=500)
        promoted += verdict.promote
        better += verdict.gain > 0
    assert promoted <= 10
    assert 60 < better < 140


def test_each_draft_is_judged_at_its_own_fastest_depth():
    """A better draft may be asked for more tokens; at the cap both would be slower than the target alone."""
    widths = RoundCosts(((1, 0.1), (2, 0.11), (3, 0.13), (5, 0.6)), 0.0, 0.0, 0.0)
    cost = RoundCost(0.02, 0.6, widths)
    random = np.random.default_rng(0)
    requests = [request(greedy_rows(random, 100, 0.85), greedy_rows(random, 100, 0.5)) for _ in range(60)]
    verdict = verdict_on(requests, candidate_cost=cost, incumbent_cost=cost)
    speeds = {
        k: [(1 + sum(alpha**i for i in range(1, k + 1))) / cost.round_s(k) for alpha in (0.5, 0.85)]
        for k in range(K + 1)
    }
    best = [max(speeds, key=lambda k, i=i: speeds[k][i]) for i in (0, 1)]
    assert best == [1, 2]
    assert verdict.promote
    assert "fastest with 1 drafts a round before, 2 after" in verdict.reason
    assert verdict.gain == pytest.approx(speeds[2][1] / speeds[1][0] - 1, abs=0.05)
    # Tau is told at the cap, where it can be compared.
    assert verdict.tau_after > verdict.tau_before > 1.8


def test_an_uncertain_gain_is_refused_with_its_interval():
    requests = traffic(np.random.default_rng(8), 10, 0.7, 0.705)
    verdict = verdict_on(requests)
    low, high = verdict.gain_ci95
    assert not verdict.promote
    assert low < 0 < verdict.gain < high
    assert verdict.reason.startswith("A gain is not certain")
    assert f"{100 * low:+.1f} % to {100 * high:+.1f} %" in verdict.reason


def test_a_loss_against_the_bare_draft_is_told_once():
    """Where no adapter is active, the bare draft is the incumbent."""
    verdict = verdict_on(traffic(np.random.default_rng(8), 10, 0.7, 0.69))
    assert verdict.gain < 0
    assert verdict.reason.startswith("A gain is not certain")


def test_the_same_draft_is_no_gain():
    incumbent = greedy_rows(np.random.default_rng(0), 50, 0.5)
    verdict = verdict_on([request(incumbent, incumbent)] * 10)
    assert not verdict.promote
    assert verdict.gain == 0
    assert verdict.gain_ci95 == (0, 0)


def test_a_domain_that_loses_is_named():
    random = np.random.default_rng(2)
    requests = traffic(random, 40, 0.6, 0.7) + traffic(random, 40, 0.8, 0.77, domain="proofs")
    verdict = verdict_on(requests)
    assert verdict.gain_ci95[0] > 0
    assert not verdict.promote
    figures = verdict.domains["proofs"]
    assert (figures.requests, figures.rows) == (40, 4000)
    assert f"'proofs' loses {100 * (figures.alpha_before - figures.alpha_after):.1f} points" in verdict.reason
    assert "'letters'" not in verdict.reason
    assert verdict.domains["letters"].tau_after > verdict.domains["letters"].tau_before


@pytest.mark.parametrize(("lost_rows", "promote"), [(100, True), (101, False)])
def test_a_large_domain_is_held_to_one_point_as_measured(lost_rows, promote):
    """10,000 rows, of which 100 are one point; spread evenly, so that the error is far below half a point."""
    after = np.ones(10_000, np.float32)
    after[np.linspace(0, 9999, lost_rows).astype(int)] = 0
    lost = [request(part, np.ones(100), domain="proofs") for part in after.reshape(100, 100)]
    verdict = verdict_on(lost + traffic(np.random.default_rng(3), 200, 0.5, 0.7))
    assert verdict.promote is promote
    assert ("'proofs'" in verdict.reason) is not promote


def test_a_small_domain_may_lose_what_chance_takes():
    """Each of ten domains has 200 rows and is as good as before; as measured, one nearly always is not."""
    refused = worst = 0
    for seed in range(30):
        random = np.random.default_rng(seed)
        requests = traffic(random, 60, 0.5, 0.6)
        for domain in "abcdefghij":
            requests += traffic(random, 2, 0.7, 0.7, domain=domain)
        verdict = verdict_on(requests, num_resamples=250)
        refused += "Domain" in verdict.reason
        worst += max(one.alpha_before - one.alpha_after for one in verdict.domains.values()) > 0.01
    assert worst > 25
    assert refused < 20


def test_a_small_domain_that_clearly_loses_is_refused():
    random = np.random.default_rng(4)
    requests = traffic(random, 60, 0.5, 0.6) + traffic(random, 2, 0.8, 0.65, domain="proofs")
    assert "Domain 'proofs'" in verdict_on(requests).reason


@pytest.mark.parametrize(("rows", "promote"), [(1, True), (3, False)])
def test_one_row_condemns_nobody(rows, promote):
    requests = traffic(np.random.default_rng(5), 60, 0.5, 0.6)
    requests.append(request(np.zeros(rows), np.ones(rows), domain="one question"))
    assert verdict_on(requests).promote is promote


def test_requests_of_a_domain_that_disagree_are_one_voice_each():
    """Rows of a request go together: two requests, one lost and one won, say little however many rows."""
    mixed = [
        request(np.full(400, 0.50), np.full(400, 0.60), domain="moods"),
        request(np.full(400, 0.67), np.full(400, 0.60), domain="moods"),
    ]
    steady = [request(np.full(400, 0.585), np.full(400, 0.60), domain="moods")] * 2
    better = traffic(np.random.default_rng(6), 60, 0.5, 0.6)
    assert verdict_on(better + mixed).promote
    assert not verdict_on(better + steady).promote


def test_a_candidate_worse_than_the_bare_draft_is_refused():
    """The traffic has changed: both adapters harm, the candidate only less."""
    random = np.random.default_rng(7)
    requests = [
        request(one.candidate, one.incumbent, greedy_rows(random, 100, 0.9))
        for one in traffic(random, 40, 0.5, 0.6)
    ]
    verdict = verdict_on(requests)
    assert not verdict.promote
    assert "bare draft" in verdict.reason
    assert verdict.alpha_bare > verdict.alpha_after > verdict.alpha_before
    assert verdict.tau_bare > verdict.tau_after
    slow = RoundCost(draft_s=0.2, verify_s=COST.verify_s)
    assert verdict_on(requests, bare_cost=slow).promote


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_requests_are_refused(count):
    good = [request(np.ones(100), np.zeros(100))] * count
    verdict = verdict_on([*good, request([], [])])
    assert not verdict.promote
    assert f"{count} held-out requests are too few" in verdict.reason
    assert verdict.gain > 0
    assert verdict.gain_ci95 is None
    assert verdict_on([*good, *good, *good, *good, *good]).promote


@pytest.mark.parametrize("requests", [[], [request([], [])] * 10])
def test_nothing_to_replay_is_refused(requests):
    verdict = verdict_on(requests)
    assert not verdict.promote
    assert "No held-out request" in verdict.reason
    assert astuple(verdict)[2:4] == (0, 0)
    assert verdict.tau_before is verdict.gain is verdict.gain_ci95 is None


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_draft_that_computes_no_numbers_is_refused(wrong):
    rows = np.ones(50, np.float32)
    rows[7] = wrong
    requests = traffic(np.random.default_rng(0), 40, 0.5, 0.6)
    for draft, broken in (("trained", request(rows, np.zeros(50))), ("active", request(np.ones(50), rows))):
        verdict = verdict_on([*requests, broken])
        assert not verdict.promote
        assert f"{draft} draft" in verdict.reason
        dumps(astuple(verdict), allow_nan=False)


@given(
    st.lists(st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), max_size=12), max_size=12),
    st.sampled_from(["letters", "proofs"]),
)
@settings(max_examples=60)
def test_any_traffic_gets_a_verdict(rows, domain):
    requests = [request(*np.array(one).reshape(-1, 3).T, domain=domain) for one in rows]
    verdict = verdict_on(requests, num_resamples=100)
    dumps(astuple(verdict), allow_nan=False)
    assert verdict.reason.endswith(("5.", "requests.", "second."))
    if verdict.promote:
        assert verdict.gain_ci95[0] > 0
    assert verdict == verdict_on(requests, num_resamples=100)


@pytest.mark.parametrize("cost", [RoundCost(0.01, 0.0), RoundCost(-0.1, 1.0), RoundCost(np.nan, 1.0)])
def test_a_cost_that_is_none_is_refused(cost):
    with pytest.raises(ValueError, match="costs nothing"):
        verdict_on([], candidate_cost=cost)


def test_drafts_replayed_on_different_rows_are_refused():
    with pytest.raises(ValueError, match="numbers of rows"):
        verdict_on([request([1, 0], [1])])


@pytest.mark.parametrize("degrees", [4, 5, 9, 40, 1000])
def test_quantiles_of_students_t(degrees):
    assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)
