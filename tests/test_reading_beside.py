"""A long prompt read beside others: by a clock that the models' work alone moves, their tokens come at worst
half as often."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest

from draftloop.answers import RoundDone
from draftloop.backends.base import Proposal
from draftloop.backends.registry import open_backend
from draftloop.engine import Engine, Request
from draftloop.models.tokenizer import Tokenizer
from draftloop.speculation.stream import Pair
from draftloop.types import Sampling, Verdict

PROMPT_TOKENS, CACHE_TOKENS = 8000, 60_000


class Cache:
    """Counts."""

    def __init__(self):
        self.position, self.max_tokens, self.bytes_per_token = 0, CACHE_TOKENS, 1

    def trim(self, n):
        self.position -= n


@dataclass
class Costs:
    """Of a pass: once, for each token or row, and more with so many tokens of context that it doubles."""

    once_s: float
    token_s: float
    doubling_tokens: float = 1e9


@dataclass
class Clock:
    """Seconds of all work, and of rounds alone."""

    now_s: float = 0.0
    rounds_s: float = 0.0

    def __call__(self):
        return self.now_s


class Model:
    """Says nothing of its own and takes its time.

    Args:
        clock: moved by it.
        costs: of a pass of a round.
        reading: of one over a prompt, where that is another.
        kept: drafts, of each round.
        hiccups: what rounds take more, in turn.
        chance: by which share a pass over a prompt may take more or less.
    """

    def __init__(self, clock, costs, reading=None, kept=0, hiccups=(0.0,), chance=0.0):
        self._chance, self._random = chance, np.random.default_rng(7)
        self._clock, self._costs, self._reading = clock, costs, reading or costs
        self._kept, self._hiccups = kept, cycle(hiccups)
        self.architecture = SimpleNamespace(vocab_size=272)

    def new_cache(self):
        return Cache()

    def prefill(self, batch):
        by_chance = self._random.uniform(1 - self._chance, 1 + self._chance)
        self._clock.now_s += by_chance * pass_s(self._reading, batch, [len(job.tokens) for job in batch])

    def propose(self, batch):
        for step in range(max(job.num_draft_tokens for job in batch)):
            going = [job for job in batch if job.num_draft_tokens > step]
            self._work(pass_s(self._costs, going, [1 if step else len(job.unread) for job in going]))
        return [Proposal((1,) * job.num_draft_tokens, None, job.num_draft_tokens) for job in batch]

    def verify(self, batch):
        self._work(pass_s(self._costs, batch, [job.proposal.num_tokens + 1 for job in batch]))
        self._work(next(self._hiccups))
        verdicts = []
        for job in batch:
            k, kept = job.proposal.num_tokens, min(self._kept, job.proposal.num_tokens)
            verdicts.append(Verdict((1,) * k, kept, 1, (0.5,) * min(kept + 1, k)))
        return verdicts

    def _work(self, seconds):
        self._clock.now_s += seconds
        self._clock.rounds_s += seconds


def pass_s(costs, jobs, counts):
    """What a pass takes; the caches hold the tokens then."""
    work = 0.0
    for job, count in zip(jobs, counts, strict=True):
        work += count * (1 + job.cache.position / costs.doubling_tokens)
        job.cache.position += count
    return costs.once_s + costs.token_s * work


def asked(length, k):
    return Request([1] * length, Sampling(), 50_000, k, min_tokens=50_000, seed=0)


class Scene:
    """A pair whose answers never end, in a batch of its own."""

    def __init__(self, toy_pair, target, draft=None, **options):
        self.clock = Clock()
        pair = Pair(Model(self.clock, target, **options), draft and Model(self.clock, draft))
        tokenizer = Tokenizer.load(toy_pair(noise=0.05)[0])
        backend = open_backend("numpy", device="cpu")
        engine = Engine(backend, pair, tokenizer, cache_clear_frequency=100, most_together=16)
        self.batch = engine.batch(clock=self.clock)

    def read(self, others=1, k=0, readers=((PROMPT_TOKENS, 0),)):
        """Prompts are read beside so many; one's seconds between tokens, with that and as if it were not.

        The tokens of a round share the time since the one before.
        """
        for _ in range(others):
            quick = self.batch.join(asked(2, k))
        for _ in range(20):
            [*self.batch.step()]
        late = [self.batch.join(asked(length, own_k)) for length, own_k in readers]
        found, without = [], []
        now_s, rounds_s = self.clock.now_s, self.clock.rounds_s
        while any(member.reads for member in late):
            rounds = [event.outcome for who, event in self.batch.step() if who is quick and is_round(event)]
            (count,) = [len(outcome.tokens) for outcome in rounds]
            found += [(self.clock.now_s - now_s) / count] * count
            without += [(self.clock.rounds_s - rounds_s) / count] * count
            now_s, rounds_s = self.clock.now_s, self.clock.rounds_s
        return found, without


def is_round(event):
    return isinstance(event, RoundDone)


def p95(seconds):
    return float(np.percentile(seconds, 95))


TARGET, DRAFT = Costs(0.040, 0.004), Costs(0.014, 0.001)
BOTH = ((2000, 0), (2000, 4), (2000, 0), (2000, 4))


@pytest.mark.parametrize(
    ("models", "options", "scene"),
    [
        ((TARGET,), {}, {"others": 3}),
        ((Costs(0.001, 0.004),), {}, {"others": 8}),
        ((TARGET,), {"reading": Costs(0.038, 0.00001)}, {}),
        ((TARGET,), {"reading": Costs(0.040, 0.004, doubling_tokens=4000)}, {"others": 4}),
        ((TARGET, DRAFT), {"kept": 2}, {"k": 4, "readers": ((PROMPT_TOKENS, 4),)}),
        ((TARGET, DRAFT), {"kept": 2}, {"others": 4, "k": 2, "readers": ((PROMPT_TOKENS, 2),)}),
        ((TARGET, DRAFT), {"kept": 2}, {"others": 4, "k": 4, "readers": BOTH}),
        ((TARGET,), {"hiccups": (0.4, *(0.0,) * 30)}, {"others": 3}),
        ((TARGET,), {"hiccups": (0.0, 0.15)}, {"others": 3}),
    ],
    ids=["rows", "linear", "flat", "growing", "drafting", "together", "several", "rarely long", "uneven"],
)
def test_tokens_come_half_as_often_at_worst(toy_pair, models, options, scene):
    found, without = Scene(toy_pair, *models, **options).read(**scene)
    assert len(found) > 40
    assert p95(found) <= 2 * p95(without)
    assert sum(found) > 1.2 * sum(without)


@pytest.mark.parametrize("chance", [0.0, 0.1])
def test_where_a_pass_takes_longer_than_a_round_a_prompt_is_soon_read_all_the_same(toy_pair, chance):
    """As where rounds' steps are recorded or traced and other passes are not."""
    scene = Scene(toy_pair, Costs(0.010, 0.001), reading=Costs(0.020, 0.00001), chance=chance)
    found, without = scene.read()
    assert len(found) < 80
    assert max(found) < 4 * p95(without)


def test_the_first_piece_is_short_and_no_piece_is_much_too_long(toy_pair):
    """The speed of reading is unknown, and a pass over many tokens takes far longer than a round."""
    found, without = Scene(toy_pair, Costs(0.040, 0.004)).read()
    assert max(found) <= 3 * p95(without)


@pytest.mark.parametrize("late", [10, 200])
def test_a_short_prompt_does_not_wait_for_a_long_one_nor_that_for_many_short_ones(toy_pair, late):
    scene = Scene(toy_pair, TARGET)
    scene.read(readers=((2, 0),))
    long = scene.batch.join(asked(PROMPT_TOKENS, 0))
    [*scene.batch.step()]
    left = long.left_tokens
    short = [scene.batch.join(asked(late, 0)) for _ in range(3)]
    while any(one.reads for one in short):
        [*scene.batch.step()]
    read = left - long.left_tokens
    assert 0.5 * 3 * late <= read <= 1.5 * 3 * late + 20
    assert long.reads
