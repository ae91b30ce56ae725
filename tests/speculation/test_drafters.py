"""The seam of drafters: the best offer is made good, whoever made it, and nobody else is asked to draft."""

from __future__ import annotations

from types import SimpleNamespace

from draftloop.backends.base import NO_PROPOSAL, Proposal
from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.drafters import Offer, propose
from draftloop.speculation.plans import Prospect
from draftloop.speculation.schedule import Choice, Schedule
from draftloop.speculation.together import TogetherPace


class Fake:
    """Offers what it is told for each stream, and remembers whom it drafted for."""

    def __init__(self, token, **offers):
        self._token, self._offers = token, offers
        self.asked = []

    def offer(self, stream):
        made = self._offers.get(stream)
        return None if made is None else Offer(Choice(*made))

    def propose(self, streams, offers):
        self.asked += streams
        return [
            Proposal((self._token,) * offer.choice.num_draft_tokens, None, offer.choice.num_draft_tokens)
            for offer in offers
        ]


def test_each_stream_gets_its_best_offer():
    model = Fake(1, a=(3, 20.0), b=(3, 20.0), c=(0, 16.0))
    match = Fake(2, a=(12, 50.0), b=(2, 18.0))
    drafted = propose((model, match), ["a", "b", "c", "d"])
    assert [one.proposal.tokens for one in drafted] == [(2,) * 12, (1,) * 3, (), ()]
    assert (model.asked, match.asked) == (["b"], ["a"])
    assert [one.offer and one.offer.choice.tokens_per_s for one in drafted] == [50.0, 20.0, 16.0, None]


def test_the_target_alone_may_be_the_best_offer():
    (one,) = propose((Fake(1, a=(0, 16.0)), Fake(2, a=(4, 9.0))), ["a"])
    assert one.proposal is NO_PROPOSAL


def test_of_equal_offers_the_first_drafters_is_taken():
    (one,) = propose((Fake(1, a=(2, 10.0)), Fake(2, a=(2, 10.0))), ["a"])
    assert one.proposal.tokens == (1, 1)


def test_without_drafters_nobody_drafts():
    assert [one.proposal for one in propose((), ["a", "b"])] == [NO_PROPOSAL, NO_PROPOSAL]


class Settled(Fake):
    """Offers every stream the same, of which it could do more."""

    def __init__(self, prospect, k, tokens_per_s):
        super().__init__(1)
        self._prospect, self._choice = prospect, Choice(k, tokens_per_s)

    def offer(self, stream):
        return Offer(self._choice, self._prospect.by_model, self._prospect.backlog_tokens)

    def prospect(self, stream):
        return self._prospect


class Listening(TogetherPace):
    """Remembers the plans that it made."""

    def __init__(self):
        super().__init__(Schedule(RoundCosts(((1, 1.0), (40, 1.4)), 0.05, 0.0, 0.01)))
        self.plans = []

    def choose(self, prospects):
        self.plans.append(super().choose(prospects))
        return self.plans[-1]


def test_what_a_stream_has_chosen_by_itself_is_in_the_plan_of_all_with_its_rows_and_its_backlog():
    streams = [SimpleNamespace(pace=SimpleNamespace(apart=True))] * 2
    model = Settled(Prospect((0.9,) * 4, backlog_tokens=30), 2, 20.0)
    match = Settled(Prospect((0.5,) * 15, by_model=False), 12, 50.0)
    for drafters, rows, reads in (((model,), 6, True), ((model, match), 26, False)):
        together = Listening()
        drafted = propose(drafters, streams, together)
        (plan,) = together.plans
        assert plan.rows == len(drafted) + sum(one.proposal.num_tokens for one in drafted) == rows
        assert plan.reads_backlog is reads
