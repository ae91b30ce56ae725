"""The seam of drafters: the best offer is made good, whoever made it, and nobody else is asked to draft."""

from __future__ import annotations

from draftloop.backends.base import NO_PROPOSAL, Proposal
from draftloop.speculation.drafters import Offer, propose
from draftloop.speculation.schedule import Choice


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
