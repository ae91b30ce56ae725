"""The choice of K: best under the formula, never below the target alone, and probing that stays cheap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.speculation.costs import LiveCosts, RoundCosts
from draftloop.speculation.expectation import PRIOR_CHANCE, PositionAcceptance
from draftloop.speculation.schedule import (
    FIRST_ALLOWANCE_ROUNDS,
    PROBE_ROUNDS,
    PROBE_SHARE,
    AdaptivePace,
    Probes,
    Schedule,
    Timed,
    best_choice,
    expected_tokens,
)

CHANCES = st.floats(0, 1)
SECONDS = st.floats(1e-4, 1)


@st.composite
def costs(draw: st.DrawFn) -> RoundCosts:
    steps = draw(st.lists(st.floats(0, 0.2), min_size=1, max_size=8))
    verify_s = np.cumsum([draw(SECONDS), *steps])
    points = tuple((width, float(seconds)) for width, seconds in enumerate(verify_s, start=1))
    return RoundCosts(points, draw(SECONDS), draw(st.floats(0, 0.01)), draw(st.floats(0, 0.01)))


CPU = RoundCosts(((1, 0.061), (2, 0.075), (3, 0.092), (4, 0.099), (5, 0.193)), 0.0197, 0.001, 0.005)
"""Widths 1 to 5 of a kernel that works in blocks of four rows (design §8)."""
HOPELESS = RoundCosts(((1, 0.01), (2, 0.02), (3, 0.03), (4, 0.04)), 0.01, 0.0, 0.002)
"""A draft as dear as the target: no acceptance makes it worth asking."""


def by_hand(prices: RoundCosts, chances: list[float], k: int) -> float:
    tokens = 1 + sum(float(np.prod(chances[:i])) for i in range(1, k + 1))
    drafting_s = prices.draft_round_s + k * prices.draft_s if k else 0
    return tokens / (drafting_s + prices.verify_at(k + 1))


@given(costs(), st.lists(CHANCES, max_size=12))
def test_the_choice_has_the_most_expected_tokens_a_second(prices, chances):
    choice = best_choice(prices, chances)
    rates = [by_hand(prices, chances, k) for k in range(len(chances) + 1)]
    assert choice.tokens_per_s == pytest.approx(max(rates))
    assert rates[choice.num_draft_tokens] == pytest.approx(max(rates))
    assert choice.tokens_per_s >= 1 / prices.verify_at(1)


@given(st.lists(CHANCES, max_size=20))
def test_expected_tokens_are_what_chance_emits(chances):
    total, kept = 1.0, 1.0
    for chance in chances:
        kept *= chance
        total += kept
    assert expected_tokens(chances) == pytest.approx(total)
    assert 1 <= expected_tokens(chances) <= len(chances) + 1


def test_costs_between_and_beyond_the_measured_widths():
    prices = RoundCosts(((1, 1.0), (4, 4.0), (8, 6.0)), 0.5, 0.25, 0.0)
    assert [prices.verify_at(width) for width in (1, 2, 4, 6, 8)] == [1, 2, 4, 5, 6]
    assert prices.verify_at(15) == pytest.approx(6 + 7 * 5 / 7)
    assert prices.round_s(0) == 1
    assert prices.round_s(3) == 4 + 0.25 + 1.5
    assert prices.round_s(3, by_model=False) == 4


class Machine:
    """Serves rounds with costs and acceptance of its own; what the schedule believes may be wrong."""

    def __init__(self, true: RoundCosts, alpha: float, *, sampled: bool = False, noise: float = 0.0) -> None:
        self.true, self.alpha, self.noise = true, alpha, noise
        self.random = np.random.default_rng(7)
        self.seconds = self.tokens = 0.0
        self.chosen: list[int] = []
        self.sampled = sampled
        self.lag = 0

    def answer(self, schedule: Schedule, *, prompt: int = 40, length: int = 128, cap: int = 4) -> None:
        pace = schedule.open(cap)
        self.lag, left = prompt, length
        if pace.reads_along(self.lag, length):
            self.seconds += self.lag * self.true.read_s
            self.lag = 1
        while left > 0:
            backlog = self.lag if self.lag > 2 else 0
            k = pace.choose(min(cap, left - 1), backlog, left).num_draft_tokens
            kept = self.random.random(k) < self.alpha
            m = k if kept.all() else int(kept.argmin())
            seconds = self.true.round_s(k) * float(np.exp(self.noise * self.random.standard_normal()))
            if k:
                seconds += backlog * self.true.read_s
                self.lag = 1
            else:
                self.lag += 1
            alphas = (self.alpha if self.sampled else 1.0,) * m + ((0.0,) if m < k else ())
            if self.sampled:
                alphas = (self.alpha,) * min(m + 1, k)
            pace.observe(Timed(k, k > 0, backlog if k else 0, alphas, seconds))
            self.seconds += seconds
            self.tokens += m + 1
            left -= m + 1
            self.chosen.append(k)

    def serve(self, schedule: Schedule, answers: int, **options: int) -> Machine:
        for _ in range(answers):
            self.answer(schedule, **options)
        return self

    @property
    def speed(self) -> float:
        """Against the target alone, which the same tokens take a round each."""
        return self.tokens * self.true.round_s(0) / self.seconds


@pytest.mark.parametrize("alpha", [0.3, 0.72, 0.92])
def test_constant_acceptance_converges_to_the_analytic_best(alpha):
    best = best_choice(CPU, [alpha] * 4).num_draft_tokens
    machine = Machine(CPU, alpha, sampled=True).serve(Schedule(CPU), 20, prompt=2)
    late = machine.chosen[len(machine.chosen) // 2 :]
    assert late.count(best) > 0.9 * len(late)


def test_the_examples_above_span_the_choices():
    assert [best_choice(CPU, [alpha] * 4).num_draft_tokens for alpha in (0.3, 0.72, 0.92)] == [0, 1, 3]


@settings(max_examples=25, deadline=None)
@given(costs(), CHANCES, st.booleans())
def test_never_slower_than_the_target_alone_but_for_the_probes(prices, alpha, sampled):
    """Whatever the pair is like: what is lost is bounded by the allowance."""
    machine = Machine(prices, alpha, sampled=sampled)
    # Learning that the draft is bad takes a few rounds; they are not the rule's, they are the prior's.
    schedule = Schedule(prices)
    machine.serve(schedule, 4)
    machine.seconds = machine.tokens = 0.0
    machine.serve(schedule, 12)
    assert machine.speed > 0.9


def test_a_hopeless_draft_costs_no_more_than_its_allowance():
    machine = Machine(HOPELESS, 0.9).serve(Schedule(HOPELESS), 40)
    assert machine.chosen.count(0) > 0.9 * len(machine.chosen)
    alone_s = machine.tokens * HOPELESS.round_s(0)
    allowed_s = FIRST_ALLOWANCE_ROUNDS * HOPELESS.round_s(0) + 1.5 * PROBE_SHARE * machine.seconds
    assert machine.seconds - alone_s < allowed_s


def test_probes_go_on_and_find_a_draft_that_got_better():
    schedule = Schedule(CPU)
    bad = Machine(CPU, 0.02).serve(schedule, 30)
    late = bad.chosen[-1000:]
    assert 0 < sum(k > 0 for k in late) < 0.1 * len(late)
    good = Machine(CPU, 0.95).serve(schedule, 30)
    assert sum(k > 0 for k in good.chosen[-200:]) > 180


def test_another_draft_is_asked_without_waiting_for_the_gap():
    schedule = Schedule(CPU)
    Machine(CPU, 0.02).serve(schedule, 60)
    probed = []
    for change in (False, True):
        if change:
            schedule.draft_changed()
        machine = Machine(CPU, 0.02).serve(schedule, 1, prompt=4)
        probed.append(machine.chosen[0] > 0)
    assert probed == [False, True]


@pytest.mark.parametrize("wrong", [0.4, 2.5])
def test_a_calibration_taken_at_a_bad_moment_heals(wrong):
    """The draft was measured too cheap, or too dear; rounds as they are put it right."""
    believed = RoundCosts(CPU.verify_s, CPU.draft_s * wrong, CPU.draft_round_s, CPU.read_s)
    alpha = 0.8
    best = best_choice(CPU, [alpha] * 4)
    schedule = Schedule(believed)
    Machine(CPU, alpha, sampled=True, noise=0.05).serve(schedule, 60)
    late = Machine(CPU, alpha, sampled=True, noise=0.05).serve(schedule, 20)
    assert late.tokens / late.seconds > 0.93 * best.tokens_per_s


def ratio(live: LiveCosts) -> float:
    return live.now().round_s(3) / live.now().round_s(0)


def test_a_busy_moment_changes_no_choice():
    live = LiveCosts(CPU)
    for _ in range(50):
        live.observe(3, CPU.round_s(3))
        live.observe(0, CPU.round_s(0))
    before = ratio(live)
    for _ in range(30):
        live.observe(3, 2 * CPU.round_s(3))
        live.observe(0, 2 * CPU.round_s(0))
    assert ratio(live) == pytest.approx(before, rel=0.35)
    for _ in range(60):
        live.observe(3, CPU.round_s(3))
        live.observe(0, CPU.round_s(0))
    assert ratio(live) == pytest.approx(before, rel=0.05)


def test_a_busy_moment_that_meets_one_k_only_hardly_speaks_against_it():
    live = LiveCosts(CPU)
    for _ in range(30):
        live.observe(3, 2 * CPU.round_s(3))
    assert ratio(live) < 1.25 * CPU.round_s(3) / CPU.round_s(0)


def test_one_stall_says_little():
    live = LiveCosts(CPU)
    live.observe(3, 100.0)
    assert live.now().round_s(3) < 1.2 * CPU.round_s(3)


def test_a_backlog_must_pay_within_what_remains():
    schedule = Schedule(CPU)
    for _ in range(50):
        schedule.acceptance.observe([0.95, 0.95, 0.95])
    assert schedule.open(3).choose(3, 0, 100).num_draft_tokens == 3
    dear = RoundCosts(CPU.verify_s, CPU.draft_s, CPU.draft_round_s, read_s=10.0)
    schedule = Schedule(dear)
    assert schedule.open(3).choose(3, 100, 100).num_draft_tokens == 0
    # An answer that may depend on nothing earlier has the draft read the prompt in any case.
    assert schedule.open(3).reads_along(100, 100)
    schedule.open(3).observe(Timed(0, False, 0, (), 0.1))
    assert schedule.open(3, repeatable=True).reads_along(100, 100)
    assert not schedule.open(3).reads_along(100, 100)
    cheap = Schedule(CPU)
    cheap.open(3).observe(Timed(0, False, 0, (), 0.1))
    assert cheap.open(3).reads_along(10, 100)


def test_a_repeatable_pace_heeds_its_own_rounds_only():
    def chosen(pace: AdaptivePace) -> list[int]:
        found = []
        for turn in range(60):
            k = pace.choose(4, 0, 100).num_draft_tokens
            found.append(k)
            pace.observe(Timed(k, k > 0, 0, ((1.0, 0.2)[turn // 20 % 2],) * k, 0.01 * (1 + turn % 7)))
        return found

    used = Schedule(CPU)
    Machine(CPU, 0.05).serve(used, 10)
    for _ in range(40):
        used.costs.observe(3, 1.0)
    again = chosen(used.open(4, repeatable=True))
    assert again == chosen(used.open(4, repeatable=True))
    assert again == chosen(Schedule(CPU).open(4))
    assert again != chosen(used.open(4))
    assert len(set(again)) > 1


class TestPositionAcceptance:
    @given(st.lists(st.lists(CHANCES, max_size=6), max_size=40))
    def test_chances_are_probabilities(self, rounds):
        shared = PositionAcceptance()
        own = shared.for_stream()
        for alphas in rounds:
            shared.observe(alphas)
            own.observe(alphas)
        assert all(0 <= chance <= 1 for chance in (*shared.chances(8), *own.chances(8)))

    def test_each_position_has_its_own(self):
        found = PositionAcceptance()
        for _ in range(200):
            found.observe([0.9, 0.5, 0.1])
        assert found.chances(3) == pytest.approx([0.9, 0.5, 0.1], abs=0.03)

    def test_nothing_seen_is_the_prior(self):
        assert PositionAcceptance().chances(3) == [PRIOR_CHANCE] * 3

    def test_a_new_stream_begins_with_recent_traffic_and_then_follows_its_own(self):
        shared = PositionAcceptance()
        for _ in range(100):
            shared.observe([0.9])
        own = shared.for_stream()
        assert own.chance(0) == pytest.approx(shared.chance(0))
        for _ in range(16):
            own.observe([0.1])
        assert own.chance(0) < 0.35
        assert shared.chance(0) == pytest.approx(0.9, abs=0.02)

    def test_the_newest_weigh_most(self):
        found = PositionAcceptance()
        for alpha in (0.0,) * 300 + (1.0,) * 300:
            found.observe([alpha])
        assert found.chance(0) > 0.9


def test_short_answers_look_at_the_target_alone_too():
    """Where drafting pays, the target alone is asked once in a while, over answers and not in each."""
    machine = Machine(CPU, 0.92, sampled=True).serve(Schedule(CPU), 60, prompt=2, length=24)
    full_rounds = [k for k in machine.chosen if k != 1]
    assert 0 < full_rounds.count(0) < 0.05 * len(machine.chosen)


def test_a_probe_ends_with_its_answer():
    schedule = Schedule(CPU)
    assert schedule.probes.due(0.0, 0.0)
    assert schedule.probes.due(0.0, 0.0)
    schedule.open(4)
    assert not schedule.probes.due(0.0, 0.0)


def test_a_match_may_go_beyond_the_cap_where_its_rows_are_worth_it():
    """The fifth row costs as much as four (design §8): a match goes on behind it only where it is certain."""
    wide = RoundCosts((*CPU.verify_s, (8, 0.191)), CPU.draft_s, CPU.draft_round_s, CPU.read_s)
    pace = Schedule(wide).open(3)
    assert pace.choose_free([1.0] * 7).num_draft_tokens == 7
    assert pace.choose_free([0.7] * 7).num_draft_tokens == 3
    assert pace.choose_free([0.1] * 7).num_draft_tokens == 0


def test_what_the_draft_must_read_afterwards_counts_where_it_is_asked():
    """Never where it is not worth asking, or where nobody asks it."""
    worth = RoundCosts(CPU.verify_s, 0.001, 0.0, 0.02)
    schedule = Schedule(worth)
    free = best_choice(worth, [0.9, 0.9], by_model=False)
    assert schedule.open(3).choose_free([0.9, 0.9]).tokens_per_s == pytest.approx(
        1 / (1 / free.tokens_per_s + 0.02)
    )
    assert schedule.open(0).choose_free([0.9, 0.9]) == free
    hopeless = best_choice(HOPELESS, [0.9, 0.9], by_model=False)
    assert Schedule(HOPELESS).open(3).choose_free([0.9, 0.9]) == hopeless


def test_without_a_draft_nothing_is_drafted_or_read_for_it():
    pace = Schedule(CPU).open(0)
    assert pace.choose(0, 0, 100).num_draft_tokens == 0
    assert not pace.reads_along(500, 100)


def test_rounds_of_matches_say_nothing_about_the_draft():
    schedule = Schedule(CPU)
    pace = schedule.open(3)
    before = schedule.acceptance.chances(3)
    for _ in range(50):
        pace.observe(Timed(7, by_model=False, backlog_tokens=0, alphas=(), seconds=0.2))
    assert schedule.acceptance.chances(3) == before


def test_a_probe_whose_round_a_match_takes_is_made_later():
    pace = Schedule(HOPELESS).open(3)
    seen = []
    for index in range(12):
        k = pace.choose(3, 0, 100).num_draft_tokens
        matched = index % 2 == 0
        seen.append(k > 0)
        pace.observe(Timed(2 if matched else k, k > 0 and not matched, 0, (), None))
    assert seen == [True] * (2 * PROBE_ROUNDS) + [False] * 4


def test_a_postponed_probe_pays_for_what_the_backlog_has_grown():
    """What is charged covers what is read: once where nothing grew, and the rest where matches wrote on."""
    probes = Probes(1.0)
    assert probes.due(0.5, 0.0)
    probes.postpone()
    assert probes.due(7.0, 0.0)
    assert probes.due(0.0, 0.0)
    probes.postpone()
    assert not probes.due(1.1, 0.0)


def test_a_postponed_probe_that_became_too_dear_is_dropped():
    probes = Probes(1.0)
    assert probes.due(6.0, 0.0)
    probes.postpone()
    assert not probes.due(FIRST_ALLOWANCE_ROUNDS + 0.1, 0.0)
    assert not probes.due(0.0, 0.0)
    for _ in range(8):
        probes.passed_alone(1.0)
    assert probes.due(FIRST_ALLOWANCE_ROUNDS, 0.0)
