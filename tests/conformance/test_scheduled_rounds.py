"""With K chosen round by round the answers stay exact, whatever the schedule makes of its costs."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest
from chi_square import p_value
from tiny import PROMPT, TINY, second_tokens

from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.round import decode, run_round
from draftloop.speculation.schedule import Choice, Schedule
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import Sampling

GREEDY = Sampling()
PROMPTS = [
    tuple(np.random.default_rng(seed).integers(0, 256, length).tolist())
    for seed, length in enumerate((1, 8, 40))
]
CHEAP = RoundCosts(((1, 1.0), (5, 1.2)), 0.1, 0.0, 0.01)
HOPELESS = RoundCosts(((1, 1.0), (5, 5.0)), 1.0, 0.0, 0.01)


class Script:
    """Takes each K in turn, whatever happens: 0 for so long that the draft lags, and then much."""

    def __init__(self, ks):
        self._ks = cycle(ks)
        self.backlogs = []

    def choose(self, cap, backlog_tokens, remaining_tokens):
        self.backlogs.append(backlog_tokens)
        return Choice(min(cap, next(self._ks)), 1.0)

    def choose_free(self, chances):
        return Choice(0, 0.0)

    def reads_along(self, backlog_tokens, remaining_tokens):
        return False

    def observe(self, timed):
        pass


def answer(pair, prompt, pace, sampling=GREEDY, max_tokens=24, seed=0):
    conversation = Conversation(pair)
    for _ in read_prompt(
        pair, conversation, prompt, pace and (lambda lag: pace.reads_along(lag, max_tokens))
    ):
        pass
    settings = DecodeSettings(sampling, max_tokens, frozenset(), 4, seed)
    clock = iter(np.arange(0, 1e6, 0.5))
    return list(decode(pair, Stream(conversation, settings, pace), lambda: float(next(clock))))


def tokens_of(rounds):
    return tuple(token for outcome in rounds for token in outcome.tokens)


@pytest.fixture(scope="session")
def pair(backend, load_pair):
    return load_pair(backend)


@pytest.mark.parametrize("ks", [(0, 4), (0, 0, 0, 0, 0, 3, 1), (1, 2, 3, 4, 0)])
def test_greedy_answers_are_the_targets_at_any_schedule(pair, ks):
    backlogs = []
    for prompt in PROMPTS:
        pace = Script(ks)
        rounds = answer(pair, prompt, pace)
        assert tokens_of(rounds) == tokens_of(answer(Pair(pair.target, None), prompt, None))
        assert sum(outcome.accepted_tokens for outcome in rounds) > 0
        backlogs += pace.backlogs
    assert max(backlogs) > 4


@pytest.mark.parametrize("costs", [CHEAP, HOPELESS], ids=["cheap", "hopeless"])
def test_greedy_answers_under_the_schedule(pair, costs):
    schedule, drafted = Schedule(costs), 0
    for prompt in PROMPTS:
        rounds = answer(pair, prompt, schedule.open(4))
        assert tokens_of(rounds) == tokens_of(answer(Pair(pair.target, None), prompt, None))
        drafted += sum(outcome.drafted_tokens for outcome in rounds)
    assert drafted > 0


def test_a_long_backlog_is_read_in_pieces(pair, monkeypatch):
    monkeypatch.setattr("draftloop.speculation.drafters.PREFILL_CHUNK_TOKENS", 4)
    rounds = answer(pair, PROMPTS[2], Script((0, 0, 0, 4)))
    assert tokens_of(rounds) == tokens_of(answer(Pair(pair.target, None), PROMPTS[2], None))
    whole = answer(pair, PROMPTS[2], Script((4,)))
    assert sum(outcome.accepted_tokens for outcome in whole) > 0


def sampled(pair, pace_of, samples):
    """The first three tokens of `samples` answers, one a seed."""
    found = []
    conversation = Conversation(pair)
    for seed in range(samples):
        for _ in read_prompt(pair, conversation, PROMPT):
            pass
        settings = DecodeSettings(Sampling(temperature=1.0), 3, frozenset(), 2, seed)
        stream = Stream(conversation, settings)
        stream.pace = pace_of(stream)
        while stream.remaining_tokens:
            run_round(pair, [stream])
        found.append(conversation.tokens[len(PROMPT) :])
    return np.array(found)


class Peeking(Script):
    """A wrong pace: it looks at the coming number and drafts only where that lets the draft win."""

    def __init__(self, stream):
        super().__init__((0,))
        self._stream = stream

    def choose(self, cap, backlog_tokens, remaining_tokens):
        high = self._stream.uniforms.extra(self._stream.emitted_tokens, 1)[0] > 0.5
        return Choice(min(cap, 2) if high else 0, 1.0)


@pytest.fixture(scope="session")
def second_token(reference, load_pair):
    """The reference's p of the first token, and of the second one."""
    return second_tokens(load_pair(reference, **TINY).target, Sampling(temperature=1.0))


@pytest.mark.parametrize("kind", ["script", "adaptive"])
def test_sampled_answers_follow_the_target_at_any_schedule(backend, load_pair, second_token, kind):
    samples = 3000 if backend.capabilities().backend == "numpy" else 600
    script, schedule = Script((0, 2, 1, 0, 0, 2)), Schedule(CHEAP)
    pair = load_pair(backend, **TINY)
    tokens = sampled(pair, lambda _: script if kind == "script" else schedule.open(2), samples)
    assert p_value(tokens[:, 0], second_token[0]) > 1e-3
    assert p_value(tokens[:, 1], second_token[1]) > 1e-3


def test_a_pace_that_peeks_at_the_coming_number_is_caught(reference, load_pair, second_token):
    """The negative control: K must not depend on the numbers that decide."""
    tokens = sampled(load_pair(reference, **TINY), Peeking, 1500)
    assert p_value(tokens[:, 0], second_token[0]) < 1e-6
