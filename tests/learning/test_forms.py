"""The form that an adapter is deployed in, chosen by given costs and a draft that only remembers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from draftloop.backends.lora import AdapterForm, Lora, LoraSpec
from draftloop.backends.training import Example
from draftloop.learning.forms import (
    MIN_COMPARED,
    TIMED_PROPOSALS,
    VERIFY_DRAFTS,
    FormFigures,
    Outfit,
    choose_form,
    interleaved_draft_seconds,
)
from draftloop.learning.judging import HeldOut, judge_candidate
from draftloop.learning.replayed import TimedRound
from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.timing import GREEDY
from draftloop.types import Rules, Sampling

ADAPTER = Lora(LoraSpec(2, 4.0, ("q_proj",)), {})
OLD = Lora(LoraSpec(1, 4.0, ("q_proj",)), {})
UNFUSED, FUSED16, FUSED4 = AdapterForm.UNFUSED, AdapterForm.FUSED16, AdapterForm.FUSED4
ROWS = 40


def example(number: int = 0) -> Example:
    return Example(
        tokens=np.full(ROWS + 1, number, np.int32),
        num_prompt_tokens=1,
        top_ids=np.zeros((ROWS, 1), np.int32),
        top_probs=np.ones((ROWS, 1), np.float32),
        tail_probs=np.zeros(ROWS, np.float32),
        rules=Rules(Sampling()),
    )


class FakeCache:
    def __init__(self) -> None:
        self.position, self.max_tokens = 0, 100

    def trim(self, n: int) -> None:
        assert 0 <= n <= self.position
        self.position -= n


class FakeDraft:
    """Alpha by what it wears, a number or one for each example; every proposal is noted with it."""

    def __init__(self, alphas: dict, forms=(UNFUSED, FUSED16, FUSED4)) -> None:
        self.adapter_forms = forms
        self.worn, self.vocabulary = (None, UNFUSED), None
        self.proposed: list = []
        self.replayed: list = []
        self._alphas = alphas

    def set_adapter(self, lora, form) -> None:
        self.worn = (lora, form)

    def replay(self, batch):
        self.replayed += [self.worn] * len(batch)
        alpha = self._alphas[self.worn]
        values = [alpha if isinstance(alpha, float) else alpha[one.tokens[0]] for one in batch]
        return [np.full(one.num_rows, value, np.float32) for one, value in zip(batch, values, strict=True)]

    def new_cache(self) -> FakeCache:
        return FakeCache()

    def prefill(self, batch):
        (job,) = batch
        job.cache.position += len(job.tokens)

    def propose(self, batch):
        (job,) = batch
        job.cache.position += len(job.unread) + job.num_draft_tokens - 1
        assert job.cache.position <= job.cache.max_tokens
        self.proposed.append(self.worn)
        return [SimpleNamespace(tokens=np.zeros(job.num_draft_tokens, np.int32))]


@pytest.fixture
def costs(monkeypatch):
    """`costs(bare, incumbent, *forms)`: seconds a drafted token, each a number or several timings."""

    def give(bare, incumbent, *of_forms):
        by_form = dict(zip((UNFUSED, FUSED16, FUSED4), of_forms, strict=True))

        def timings(draft, outfits, k, sampling, courtesy):
            seconds = [by_form[one.form] for one in outfits]
            if outfits[0] == Outfit():
                seconds[:2] = bare, incumbent
            return [[one] if isinstance(one, float) else one for one in seconds]

        monkeypatch.setattr("draftloop.learning.forms.interleaved_draft_seconds", timings)

    return give


def alphas(unfused=0.8, fused16=0.8, fused4=0.8, bare=0.5, old=0.6):
    return {
        (ADAPTER, UNFUSED): unfused,
        (ADAPTER, FUSED16): fused16,
        (ADAPTER, FUSED4): fused4,
        (None, UNFUSED): bare,
        (OLD, FUSED16): old,
    }


TIMED = TimedRound(0.1, 4.0)


def choose(
    draft,
    timed_round=TIMED,
    incumbent=Outfit(),  # noqa: B008
    count=12,
    by_width=None,
    compared=lambda share: None,
):
    return choose_form(
        draft,
        ADAPTER,
        incumbent,
        [example(number) for number in range(count)],
        num_draft_tokens=4,
        timed_round=timed_round,
        by_width=by_width,
        compared=compared,
    )


def test_the_fastest_form_wins_where_that_is_certain(costs):
    costs(0.01, 0.01, 0.015, 0.02, 0.01)
    choice = choose(FakeDraft(alphas()))
    assert choice.best is FUSED4
    assert list(choice.figures) == [UNFUSED, FUSED16, FUSED4]
    # Nothing scatters here, so the bound is the gain itself.
    speeds = [choice.figures[form].tokens_per_s for form in (FUSED4, UNFUSED)]
    assert choice.figures[FUSED4].gain_low == pytest.approx(speeds[0] / speeds[1] - 1)
    assert choice.figures[FUSED4].tokens_per_s == pytest.approx(
        choice.figures[FUSED4].tau / (4 * 0.01 + choice.cost.verify_s)
    )


def test_a_form_that_is_fast_and_forgets_loses(costs):
    costs(0.01, 0.01, 0.012, 0.02, 0.01)
    assert choose(FakeDraft(alphas(fused4=0.5))).best is UNFUSED


def test_of_equals_the_plainest_wins(costs):
    costs(0.01, 0.01, 0.01, 0.01, 0.01)
    assert choose(FakeDraft(alphas())).best is UNFUSED


def scattered(loss, spread):
    """Alpha of twelve examples: 0.8 less `loss` on average, and every other one `spread` off."""
    return [0.8 - loss + spread * (-1) ** number for number in range(12)]


def test_a_gain_that_few_requests_bear_out_is_no_gain(costs):
    """On average the coarser form gains 3 %, but a third of the requests would say the opposite."""
    costs(0.006, 0.006, 0.0105, 0.02, 0.0095)
    noisy = choose(FakeDraft(alphas(fused4=scattered(0.0, 0.1))))
    figures = noisy.figures
    assert figures[FUSED4].tokens_per_s > figures[UNFUSED].tokens_per_s
    assert figures[FUSED4].gain_low < 0
    assert noisy.best is UNFUSED
    assert choose(FakeDraft(alphas(fused4=scattered(0.0, 0.001)))).best is FUSED4


def test_a_gain_within_the_error_of_the_timings_is_no_gain(costs):
    busy, quiet = [0.006, 0.008, 0.0098, 0.012, 0.014], [0.0097, 0.0098, 0.0098, 0.0098, 0.0099]
    costs(0.006, 0.006, 0.01, 0.02, busy)
    assert choose(FakeDraft(alphas())).best is UNFUSED
    costs(0.006, 0.006, 0.01, 0.02, quiet)
    assert choose(FakeDraft(alphas())).best is FUSED4


def test_four_requests_choose_no_coarser_form(costs):
    costs(0.01, 0.01, 0.015, 0.02, 0.01)
    choice = choose(FakeDraft(alphas()), count=4)
    assert choice.best is UNFUSED
    assert choice.figures[FUSED4].tokens_per_s > choice.figures[UNFUSED].tokens_per_s


def test_a_form_that_drafts_no_faster_is_not_replayed(costs):
    costs(0.01, 0.01, 0.015, 0.02, 0.01)
    draft, shares = FakeDraft(alphas(fused16=0.99)), []
    choice = choose(draft, compared=shares.append)
    assert choice.figures[FUSED16].tau is None
    assert set(draft.replayed) == {(ADAPTER, UNFUSED), (ADAPTER, FUSED4)}
    assert sum(shares) == pytest.approx(12)


def test_verification_is_what_the_drafts_leave_of_a_round(costs):
    costs(0.01, 0.02, 0.01, 0.01, 0.01)
    assert choose(FakeDraft(alphas()), timed_round=TimedRound(0.1, 4.0)).cost.verify_s == pytest.approx(
        0.1 - 4 * 0.02
    )
    # Where the schedule drafted less than the cap, less of the round was the drafts'.
    assert choose(FakeDraft(alphas()), timed_round=TimedRound(0.1, 1.5)).cost.verify_s == pytest.approx(0.07)
    # A round that was timed on a quiet machine, against drafts timed on a busy one.
    assert choose(FakeDraft(alphas()), timed_round=TimedRound(0.03, 4.0)).cost.verify_s == pytest.approx(0.02)
    assert choose(FakeDraft(alphas()), timed_round=None).cost.verify_s == pytest.approx(VERIFY_DRAFTS * 0.02)


def test_times_are_taken_in_turn_and_the_cache_is_left_as_it_was():
    draft = FakeDraft(alphas())
    outfits = [Outfit(), Outfit(ADAPTER, UNFUSED), Outfit(ADAPTER, FUSED4)]
    seconds = interleaved_draft_seconds(draft, outfits, 4, Sampling())
    assert len(seconds) == 3
    assert all(len(timings) == 2 * TIMED_PROPOSALS and min(timings) > 0 for timings in seconds)
    turns = [draft.proposed[i] for i in range(0, len(draft.proposed), TIMED_PROPOSALS + 1)]
    assert turns == 2 * [(None, UNFUSED), (ADAPTER, UNFUSED), (ADAPTER, FUSED4)]


def test_where_the_bare_draft_is_hardly_faster_no_other_form_is_made(costs):
    costs(0.01, 0.01, 0.0105, 0.005, 0.005)
    draft, shares = FakeDraft(alphas()), []
    choice = choose(draft, compared=shares.append)
    assert choice.best is UNFUSED
    assert choice.figures[FUSED4] == choice.figures[FUSED16] == FormFigures()
    assert set(draft.replayed) == {(ADAPTER, UNFUSED)}
    assert sum(shares) == pytest.approx(12)


def test_a_form_that_cannot_win_any_more_is_given_up(costs):
    costs(0.01, 0.01, 0.012, 0.02, 0.0115)
    draft, shares = FakeDraft(alphas(fused4=0.5)), []
    choice = choose(draft, compared=shares.append)
    assert draft.replayed.count((ADAPTER, FUSED4)) == choice.figures[FUSED4].examples == MIN_COMPARED
    assert sum(shares) == pytest.approx(12)


BY_WIDTH = RoundCosts(((1, 0.05), (2, 0.06), (5, 0.2)), 0.01, 0.0, 0.0)


def test_a_schedule_is_judged_at_the_fastest_depth(costs):
    """Five rows cost four times as much as one, so one draft a round is best; a sure draft bears two."""
    costs(0.01, 0.01, 0.01, 0.02, 0.02)
    for alpha, depth in ((0.01, 0), (0.8, 1)):
        cost = choose(FakeDraft(alphas(unfused=alpha)), by_width=BY_WIDTH).cost
        assert cost.fastest([[alpha] * ROWS] * 12, 4)[0] == depth
    assert choose(FakeDraft(alphas()), by_width=None).cost.fastest([[0.01] * ROWS], 4)[0] == 4


def test_what_asking_costs_once_a_round_is_not_spread_over_its_tokens(costs):
    """Three of each four milliseconds a proposal of four took were its own: one draft a round is dear."""
    costs(0.004, 0.004, 0.005, 0.005, 0.005)
    asking = RoundCosts(BY_WIDTH.verify_s, 0.001, 0.012, 0.0)
    cost = choose(FakeDraft(alphas()), by_width=asking).cost
    assert cost.round_s(0) == pytest.approx(0.05)
    assert cost.round_s(1) == pytest.approx(0.012 + 0.002 + 0.06)
    assert cost.round_s(4) == pytest.approx(0.012 + 4 * 0.002 + 0.2)


def test_each_example_is_walked_once_at_each_depth(costs, monkeypatch):
    """However often the forms are compared on the way."""
    walked = []
    monkeypatch.setattr(
        "draftloop.learning.replayed.expected_rounds", lambda rows, k: walked.append(k) or 10.0 - k
    )
    costs(0.01, 0.01, 0.015, 0.02, 0.01)
    choose(FakeDraft(alphas()), by_width=RoundCosts(((1, 0.1), (5, 0.1)), 0.01, 0.0, 0.0))
    assert sorted(walked) == sorted([*range(5)] * 2 * 12)


def test_the_calibration_follows_the_machines_mood(costs):
    costs(0.03, 0.03, 0.04, 0.04, 0.04)
    cost = choose(FakeDraft(alphas()), by_width=BY_WIDTH).cost
    assert cost.round_s(1) == pytest.approx(0.04 + 3 * 0.06)


def test_drafts_are_timed_as_the_calibration_drafted(monkeypatch):
    """Sampled steps cost more than greedy ones; that is no mood of the machine's."""

    def proposals(draft, k, times, *, rules=GREEDY, clock):
        return [k * (0.01 if rules.sampling.greedy else 0.02)] * times

    monkeypatch.setattr("draftloop.learning.forms.time_proposals", proposals)
    for sampling, draft_s in ((Sampling(), 0.01), (Sampling(temperature=0.7, top_p=0.9), 0.02)):
        cost = choose(
            FakeDraft(alphas()), by_width=replace(BY_WIDTH, draft_s=draft_s, sampling=sampling)
        ).cost
        assert cost.round_s(0) == pytest.approx(0.05)
        assert cost.round_s(1) == pytest.approx(draft_s + 0.06)


def test_without_any_example_the_plainest_form_stays(costs):
    costs(0.01, 0.01, 0.015, 0.02, 0.01)
    choice = choose(FakeDraft(alphas()), count=0)
    assert (choice.best, choice.figures[UNFUSED].tau) == (UNFUSED, 1.0)


def judged(draft, costs_given, incumbent=Outfit(), requests=12):  # noqa: B008
    shares = []
    judgement = judge_candidate(
        draft,
        ADAPTER,
        incumbent,
        compared=[example(number) for number in range(6)],
        held_out=[HeldOut(number, "a", example(number)) for number in range(requests)],
        num_draft_tokens=4,
        timed_round=TimedRound(0.1, 4.0),
        by_width=None,
        seed=0,
        replayed=shares.append,
    )
    assert sum(shares) == pytest.approx(requests + 6)
    return judgement


def test_the_gate_compares_the_chosen_form_with_what_is_served_now(costs):
    costs(0.01, 0.01, 0.02, 0.012, 0.01)
    judgement = judged(FakeDraft(alphas(fused4=0.75)), costs, Outfit(OLD, FUSED16))
    verdict = judgement.verdict
    assert judgement.form is FUSED16
    assert (verdict.alpha_before, verdict.alpha_bare) == (pytest.approx(0.6), pytest.approx(0.5))
    assert verdict.alpha_after == pytest.approx(alphas(fused4=0.75)[ADAPTER, judgement.form])
    assert verdict.promote
    assert len(judgement.requests) == 12
    assert judgement.requests[3]["request"] == 3
    assert judgement.requests[3]["alpha_before"] == pytest.approx(0.6)


def test_a_form_that_costs_more_than_it_brings_is_refused(costs):
    costs(0.01, 0.01, 0.06, 0.06, 0.06)
    judgement = judged(FakeDraft(alphas()), costs)
    assert judgement.verdict.tau_after > judgement.verdict.tau_before
    assert not judgement.verdict.promote


def test_without_an_adapter_the_incumbent_is_the_bare_draft(costs):
    costs(0.01, 0.01, 0.01, 0.01, 0.01)
    verdict = judged(FakeDraft(alphas()), costs).verdict
    assert verdict.alpha_before == verdict.alpha_bare == pytest.approx(0.5)


def test_requests_of_a_domain_are_replayed_together_and_each_keeps_its_rows(costs, monkeypatch):
    costs(0.01, 0.01, 0.06, 0.06, 0.06)
    every = [number / 20 for number in range(12)]
    draft, packs = FakeDraft(alphas(unfused=every, bare=every)), []
    replay = draft.replay
    monkeypatch.setattr(
        draft, "replay", lambda batch: (packs.append([int(one.tokens[0]) for one in batch]), replay(batch))[1]
    )
    # A text has 41 tokens, and the seventh of a domain is long.
    long = replace(example(11), tokens=np.full(600, 11, np.int32), num_prompt_tokens=560)
    held_out = [HeldOut(n, "ab"[n % 2], long if n == 11 else example(n)) for n in range(12)]
    judgement = judge_candidate(
        draft,
        ADAPTER,
        Outfit(),
        compared=[],
        held_out=held_out,
        num_draft_tokens=4,
        timed_round=None,
        by_width=None,
        seed=0,
        replayed=lambda _: None,
    )
    assert packs == [[0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9], [11]] * 2
    assert [one["alpha_before"] for one in judgement.requests] == pytest.approx(every)
    assert [one["alpha_after"] for one in judgement.requests] == pytest.approx(every)
