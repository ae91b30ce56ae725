"""The rehearsal: which shapes of round a pair is put through before it serves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from draftloop.backends.base import NO_PROPOSAL
from draftloop.speculation.calibration import ServedRounds
from draftloop.speculation.rehearsal import rehearse
from draftloop.speculation.stream import Pair
from draftloop.types import Sampling

SAMPLED = Sampling(temperature=0.7)


@dataclass
class CountingCache:
    max_tokens: int
    position: int = 0

    def read(self, n):
        self.position += n
        assert self.position <= self.max_tokens

    def trim(self, n):
        assert 0 <= n <= self.position
        self.position -= n

    def copy(self, n):
        return n

    def paste(self, copied, n):
        self.position = n


@dataclass
class SeenModel:
    """Notes the shapes of what it is asked."""

    room: int = 512
    shapes: list = field(default_factory=list)
    together: list = field(default_factory=list)
    read: set = field(default_factory=set)
    vocabulary: None = None

    def new_cache(self):
        return CountingCache(self.room)

    def prefill(self, batch):
        for job in batch:
            job.cache.read(len(job.tokens))
            self.read.add(len(job.tokens))

    def propose(self, batch):
        job, *_ = batch
        k = job.num_draft_tokens
        for one in batch:
            one.cache.read(len(job.unread) + k - 1)
        self.note(batch, (len(job.unread), k, job.rules.sampling))
        q = None if job.rules.sampling.greedy else [[1.0]] * k
        return [replace(NO_PROPOSAL, tokens=(0,) * k, q=q, num_tokens=k)] * len(batch)

    def verify(self, batch):
        job, *_ = batch
        for one in batch:
            one.cache.read(job.proposal.num_tokens + 1)
        self.note(batch, (job.proposal.num_tokens, job.proposal.q is not None, job.trace))

    def note(self, batch, shape):
        assert len({id(job.cache) for job in batch}) == len(batch)
        if len(batch) == 1:
            self.shapes.append(shape)
        else:
            self.together.append((len(batch), *shape))


def test_every_shape_of_round_is_run():
    target, draft = SeenModel(), SeenModel()
    rehearse(Pair(target, draft), ServedRounds(3, 5, SAMPLED, trace=True))
    after_rounds = {(unread, k, SAMPLED) for unread in (1, 2) for k in (1, 2, 3)}
    after_matches = {(unread, 1, SAMPLED) for unread in range(3, 8)}
    assert set(draft.shapes) == after_rounds | after_matches
    by_model, by_match = {(k, True, True) for k in (1, 2, 3)}, {(k, False, True) for k in range(6)}
    assert set(target.shapes) == by_model | by_match


def test_a_target_alone_is_run_with_suffix_matches():
    target = SeenModel()
    rehearse(Pair(target, None), ServedRounds(3, 2))
    assert set(target.shapes) == {(k, False, False) for k in (0, 1, 2)}


def test_pieces_of_prompts_are_read():
    target, draft = SeenModel(), SeenModel()
    rehearse(Pair(target, draft), ServedRounds(3))
    for model in (target, draft):
        assert model.read >= {2**i for i in range(9)}


def test_the_usual_rounds_are_run_together_too():
    target, draft = SeenModel(), SeenModel()
    rehearse(Pair(target, draft), ServedRounds(3, 5, SAMPLED, trace=True), most_together=6)
    assert draft.together == [(count, unread, 3, SAMPLED) for count in (2, 4, 6) for unread in (1, 2)]
    assert target.together == [(count, k, k > 0, True) for count in (2, 4, 6) for k in range(4)]


@pytest.mark.parametrize("room", [4, 5, 6, 9])
def test_the_smallest_caches_that_settings_allow_are_enough(room):
    target, draft = SeenModel(room), SeenModel(room)
    rehearse(Pair(target, draft), ServedRounds(2, 15), most_together=4)
    assert {k for k, *_ in target.shapes} >= {0, 1, 2}
    assert {k for _, k, _ in draft.shapes} == {1, 2}
