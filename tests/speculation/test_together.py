"""One choice for several streams: the best plan there is, never below plain batching, and cheap probes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.plans import Prospect, best_plan
from draftloop.speculation.schedule import PROBE_SHARE, Schedule, best_choice
from draftloop.speculation.together import LEAST_SPEEDUP, STANDING_ROUNDS, TogetherPace

CHANCES = st.floats(0, 1)
PACKED = RoundCosts(
    ((1, 0.045), (2, 0.047), (4, 0.053), (8, 0.070), (16, 0.130), (32, 0.260)),
    draft_s=0.015,
    draft_round_s=0.001,
    read_s=0.001,
    verify_more_s=0.001,
    draft_more_s=0.001,
)
"""A CPU that reads the weights once for eight rows, and is bound by arithmetic beyond."""
HOPELESS = RoundCosts(((1, 0.01), (64, 0.64)), 0.01, 0.0, 0.002, draft_more_s=0.01)


@st.composite
def costs(draw):
    steps = draw(st.lists(st.floats(0, 0.2), min_size=1, max_size=9))
    verify_s = np.cumsum([draw(st.floats(1e-3, 1)), *steps])
    draft_s = draw(st.floats(1e-3, 1))
    return RoundCosts(
        tuple((width, float(seconds)) for width, seconds in enumerate(verify_s, start=1)),
        draft_s=draft_s,
        draft_round_s=draw(st.floats(0, 0.1)),
        read_s=0.0,
        verify_more_s=draw(st.floats(0, 0.1)),
        draft_more_s=draw(st.floats(0, 1)) * draft_s,
    )


def rate(prices, prospects, ks):
    tokens = sum(
        1 + sum(float(np.prod(one.chances[:i])) for i in range(1, k + 1))
        for one, k in zip(prospects, ks, strict=True)
    )
    asked = [k for one, k in zip(prospects, ks, strict=True) if one.by_model]
    drafting = [sum(k > step for k in asked) for step in range(max(asked, default=0))]
    return tokens / prices.shared_s(len(ks) + sum(ks), len(ks), drafting)


@settings(deadline=None)
@given(costs(), st.lists(st.lists(CHANCES, max_size=3), min_size=1, max_size=3))
def test_no_other_plan_of_the_drafts_has_more_tokens_a_second(prices, chances):
    prospects = [Prospect(tuple(one)) for one in chances]
    plain = best_plan(prices, prospects, with_model=False)
    assert not any(plain.num_draft_tokens)
    assert plain.tokens_per_s == pytest.approx(rate(prices, prospects, plain.num_draft_tokens))
    drafting = best_plan(prices, prospects, with_model=True)
    every = list(product(*(range(len(one) + 1) for one in chances)))
    best = max(rate(prices, prospects, ks) for ks in every if any(ks) or len(every) == 1)
    assert drafting.tokens_per_s == pytest.approx(best)
    assert rate(prices, prospects, drafting.num_draft_tokens) == pytest.approx(best)


@given(costs(), st.lists(CHANCES, min_size=1, max_size=8))
def test_of_one_stream_it_is_that_streams_own_choice(prices, chances):
    for by_model in (True, False):
        plan = best_plan(prices, [Prospect(tuple(chances), by_model=by_model)], with_model=by_model)
        own = best_choice(prices, chances, by_model=by_model, least=int(by_model))
        assert plan.tokens_per_s == pytest.approx(own.tokens_per_s)


@settings(deadline=None)
@given(
    costs(),
    st.lists(st.tuples(st.lists(CHANCES, max_size=6), st.booleans(), st.booleans()), min_size=1, max_size=6),
)
def test_what_others_settled_stays_and_is_paid_for(prices, given_):
    prospects = [Prospect(tuple(c), by_model=model, settled=settled) for c, model, settled in given_]
    least = [len(one.chances) if one.settled else 0 for one in prospects]
    for with_model in (False, True):
        plan = best_plan(prices, prospects, with_model=with_model)
        for one, k, settled_k in zip(prospects, plan.num_draft_tokens, least, strict=True):
            assert settled_k <= k <= len(one.chances)
            assert k == settled_k or (not one.settled and (with_model or not one.by_model))
        assert plan.tokens_per_s == pytest.approx(rate(prices, prospects, plan.num_draft_tokens))
    assert best_plan(prices, prospects, with_model=False).tokens_per_s >= rate(prices, prospects, least) * (
        1 - 1e-9
    )


def test_the_likelier_stream_drafts_more():
    plan = best_plan(PACKED, [Prospect((0.95,) * 4), Prospect((0.1,) * 4)], with_model=True)
    assert plan.num_draft_tokens[0] > plan.num_draft_tokens[1]


def test_k_shrinks_as_the_batch_grows():
    ks = []
    for count in (1, 2, 4, 8, 16):
        prospects = [Prospect((0.8,) * 4)] * count
        plans = [best_plan(PACKED, prospects, with_model=asked) for asked in (False, True)]
        ks.append(sum(max(plans, key=lambda plan: plan.tokens_per_s).num_draft_tokens) / count)
    assert ks == sorted(ks, reverse=True)
    assert ks[0] >= 2
    assert ks[-1] < 1


def paced(read_s=0.02):
    """A pace whose allowance of probes is spent, and the gap before the next one has begun."""
    pace = TogetherPace(Schedule(replace(PACKED, read_s=read_s)))
    while any((plan := pace.choose([Prospect((0.01,))] * 2)).num_draft_tokens):
        pace.observe(plan.round_s)
    pace.observe(plan.round_s)
    return pace


def test_a_backlog_is_read_where_it_pays():
    late, ready = Prospect((0.9,) * 4, backlog_tokens=900), Prospect((0.9,) * 4)
    plan = paced().choose([late, ready, ready])
    assert plan.num_draft_tokens[0] == 0
    assert plan.num_draft_tokens[1] > 0
    assert not plan.reads_backlog
    for one, reads in ((replace(late, backlog_tokens=9), True), (late, False)):
        assert paced().choose([one, one]).reads_backlog == reads
    # Who is about to join may leave nothing of what it would gain.
    pace = paced(read_s=0.001)
    pace.expect(16)
    assert not any(pace.choose([replace(late, backlog_tokens=9)] * 2).num_draft_tokens)
    # Near the break-even a choice is not taken back and forth.
    near = Prospect((0.7,) * 4)
    assert any(paced().choose([near, near]).num_draft_tokens)
    assert not any(paced().choose([replace(near, backlog_tokens=90)] * 2).num_draft_tokens)


def test_the_least_backlog_is_read_for_a_probe():
    pace = TogetherPace(Schedule(replace(PACKED, read_s=0.001)))
    lacks = (900, 9, 30)
    plan = pace.choose([Prospect((0.1,) * 4, backlog_tokens=count) for count in lacks])
    assert [k > 0 for k in plan.num_draft_tokens] == [False, True, False]
    assert plan.reads_backlog


def test_the_draft_reads_along_where_so_many_streams_draft():
    pace = paced(read_s=0.001)
    one = Prospect((0.8,) * 4, backlog_tokens=40, ahead_tokens=100)
    assert pace.reads_along(one, 2)
    assert not pace.reads_along(one, 16)
    assert not pace.reads_along(replace(one, backlog_tokens=4000), 2)
    assert not pace.reads_along(replace(one, chances=()), 2)


def test_of_a_match_and_a_draft_that_lags_the_match_is_taken():
    pace = paced()
    draft, match = Prospect((0.9,) * 4), Prospect((0.9,) * 3, by_model=False, tokens=(1, 2, 3))
    assert pace.favourite([draft, Prospect((0.3,), by_model=False, tokens=(1,))]) == 0
    assert pace.favourite([draft, match]) == 1
    assert pace.favourite([replace(draft, backlog_tokens=500), Prospect((), by_model=False)]) == 1


class Machine:
    """Serves a batch with costs and acceptance of its own; what is believed may be wrong."""

    def __init__(self, true, alpha, count):
        self.true, self.alpha, self.count = true, alpha, count
        self.random = np.random.default_rng(3)
        self.seconds = self.tokens = 0.0
        self.drafting_rounds = self.rounds = 0

    def serve(self, pace, rounds, cap=4):
        prospects = [Prospect((self.alpha,) * cap)] * self.count
        for _ in range(rounds):
            ks = pace.choose(prospects).num_draft_tokens
            drafting = [sum(k > step for k in ks) for step in range(max(ks))]
            seconds = self.true.shared_s(self.count + sum(ks), self.count, drafting)
            pace.observe(seconds)
            self.seconds += seconds
            for k in ks:
                kept = self.random.random(k) < self.alpha
                self.tokens += 1 + (k if kept.all() else int(kept.argmin()))
            self.rounds += 1
            self.drafting_rounds += any(ks)
        return self

    @property
    def speed(self):
        """Against plain batching."""
        plain_s = self.true.shared_s(self.count, self.count, ())
        return self.tokens / self.count * plain_s / self.seconds


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("alpha", [0.1, 0.6, 0.9])
@pytest.mark.parametrize("true", [PACKED, HOPELESS])
def test_it_is_never_slower_than_plain_batching_but_for_the_probes(true, alpha, count):
    machine = Machine(true, alpha, count).serve(TogetherPace(Schedule(true)), 1500)
    assert machine.speed > 1 - 2 * PROBE_SHARE


@pytest.mark.parametrize(
    "believed",
    [
        replace(PACKED, draft_s=PACKED.draft_s / 5, draft_more_s=PACKED.draft_more_s / 5),
        replace(PACKED, draft_s=PACKED.draft_s * 5, draft_more_s=PACKED.draft_more_s * 5),
        replace(PACKED, verify_more_s=PACKED.verify_at(1)),
    ],
    ids=["a cheap draft", "a dear draft", "nothing shared"],
)
@pytest.mark.parametrize("alpha", [0.3, 0.95])
@pytest.mark.parametrize("count", [4, 8])
def test_what_the_calibration_got_wrong_is_learnt(believed, alpha, count):
    pace = TogetherPace(Schedule(believed))
    early = Machine(PACKED, alpha, count).serve(pace, 100)
    late = Machine(PACKED, alpha, count).serve(pace, 1500)
    right = Machine(PACKED, alpha, count).serve(TogetherPace(Schedule(PACKED)), 1500)
    assert early.speed > 0.9
    assert late.speed > 0.93 * right.speed
    assert late.speed > 1 - 2 * PROBE_SHARE


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("alpha", [0.5, 0.95])
def test_rounds_that_set_something_up_say_nothing_of_later_ones(alpha, count):
    """A GPU records the first round of each shape, which takes as long as twenty."""
    pace, seen = TogetherPace(Schedule(PACKED)), set()
    prospects = [Prospect((alpha,) * 4)] * count
    for _ in range(60):
        plan = pace.choose(prospects)
        seconds = PACKED.shared_s(plan.rows, count, plan.drafting)
        pace.observe(seconds if plan.num_draft_tokens in seen else 20 * seconds)
        seen.add(plan.num_draft_tokens)
    late = Machine(PACKED, alpha, count).serve(pace, 300)
    right = Machine(PACKED, alpha, count).serve(TogetherPace(Schedule(PACKED)), 300)
    assert late.speed > 0.95 * right.speed
    assert late.speed > 1 - 2 * PROBE_SHARE


def test_drafts_grow_by_one_each_in_a_round_of_streams_never_seen():
    pace, likely = TogetherPace(Schedule(PACKED)), [Prospect((0.95,) * 4)] * 2
    found = []
    for _ in range(4):
        plan = pace.choose(likely)
        found.append(sum(plan.num_draft_tokens))
        pace.observe(plan.round_s)
    assert found[0] == 0
    assert found[1] == 2
    assert 2 < found[2] <= 4
    # Three streams are like two.
    assert sum(pace.choose([*likely, likely[0]]).num_draft_tokens) > 0


def test_a_draft_that_is_never_right_is_asked_ever_less():
    pace = TogetherPace(Schedule(PACKED))
    first = Machine(PACKED, 0.05, 2).serve(pace, 200)
    later = Machine(PACKED, 0.05, 2).serve(pace, 2000)
    assert first.drafting_rounds > 0
    assert 0 < later.drafting_rounds < 2000 * 0.05


def test_a_draft_that_cannot_pay_however_right_is_hardly_asked():
    pace = TogetherPace(Schedule(HOPELESS))
    machine = Machine(HOPELESS, 0.9, 4)
    assert machine.serve(pace, 500).drafting_rounds == 0
    assert 0 < machine.serve(pace, 2000).drafting_rounds < 2000 * 0.02


def test_drafts_begin_for_more_than_they_go_on_for():
    near = [Prospect((0.55,) * 4)] * 2
    plain, drafting = (best_plan(PACKED, near, with_model=asked).tokens_per_s for asked in (False, True))
    assert 1 < drafting / plain < LEAST_SPEEDUP
    pace = paced()
    assert not any(pace.choose(near).num_draft_tokens)
    pace.observe(PACKED.shared_s(2, 2, ()))
    while not any(pace.choose([Prospect((0.95,) * 4)] * 2).num_draft_tokens):
        pace.observe(PACKED.shared_s(2, 2, ()))
    pace.observe(PACKED.shared_s(4, 2, (2,)))
    assert any(pace.choose(near).num_draft_tokens)


def drafting_pace(prospects):
    """A pace that has come to a plan for these streams which is to stand, and the plan."""
    pace, plans = TogetherPace(Schedule(PACKED)), []
    while len(plans) < 2 or plans[-1].num_draft_tokens != plans[-2].num_draft_tokens:
        plans.append(pace.choose(prospects))
        pace.observe(plans[-1].round_s)
    return pace, plans[-1]


def test_a_plan_stands_for_some_rounds_and_for_streams_alike():
    likely, unlikely = [Prospect((0.95,) * 4)] * 2, [Prospect((0.01,) * 4)] * 2
    pace, plan = drafting_pace(likely)
    assert all(plan.num_draft_tokens)
    for _ in range(STANDING_ROUNDS - 1):
        assert pace.choose(unlikely).num_draft_tokens == plan.num_draft_tokens
        pace.observe(plan.round_s)
    assert not all(pace.choose(unlikely).num_draft_tokens)
    shorter = [Prospect((0.95,) * 3)] * 2
    pace, _ = drafting_pace(likely)
    assert max(pace.choose(shorter).num_draft_tokens) <= 3


def test_who_joins_in_anothers_place_is_not_caught_up_with_by_the_plan_that_stood():
    ready, late = Prospect((0.9,) * 4), Prospect((0.9,) * 4, backlog_tokens=9000)
    pace, plan = drafting_pace([late, ready, ready])
    assert [k > 0 for k in plan.num_draft_tokens] == [False, True, True]
    # The first of the ready ones is gone, and so all others stand a place further up.
    moved = pace.choose([ready, late, ready])
    assert moved.num_draft_tokens[1] == 0
    assert not moved.reads_backlog
