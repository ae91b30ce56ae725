"""Speculative output is distributed exactly as the target's own (design §4): chi-square over many seeds.

Each test draws from whole rounds, with seeds that are fixed, and compares with the NumPy reference's p of
the target. A correct rule passes at 0.001; the negative controls, rules that are wrong on purpose, must
fail at 1e-6 by the very same test.
"""

from __future__ import annotations

import numpy as np
import pytest
from chi_square import p_value
from tiny import PROMPT, TINY, VOCABULARY, AcceptsAlways, ForgetsTheMap, RecoversFromP, TakesQForUncut

from draftloop.backends.base import PrefillJob, Proposal, VerifyJob
from draftloop.backends.numpy.acceptance import warp
from draftloop.backends.vocabulary import CutVocabulary
from draftloop.speculation.round import run_round
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import Rules, Sampling

CUT = CutVocabulary(np.arange(0, VOCABULARY, 2, dtype=np.int32))
SAMPLES = 4000
BATCH = 50
PLAIN = Sampling(temperature=1.0)
FILTERED = Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02)


def answers(pair, sampling, num_draft_tokens, max_tokens=2, samples=SAMPLES):
    """The first `max_tokens` tokens of `samples` answers, one a seed, in whole rounds."""
    conversations = [Conversation(pair) for _ in range(BATCH)]
    found = []
    for first_seed in range(0, samples, BATCH):
        streams = []
        for index, conversation in enumerate(conversations):
            for _ in read_prompt(pair, conversation, PROMPT):
                pass
            settings = DecodeSettings(sampling, max_tokens, frozenset(), num_draft_tokens, first_seed + index)
            streams.append(Stream(conversation, settings))
        running = streams
        while running:
            run_round(pair, running)
            running = [stream for stream in running if stream.remaining_tokens]
        found += [tuple(stream.conversation.tokens[len(PROMPT) :]) for stream in streams]
    return np.array(found)


@pytest.fixture(scope="session")
def pair(backend, load_pair):
    return load_pair(backend, **TINY)


@pytest.fixture(scope="session")
def exact(reference, load_pair):
    """`exact(sampling)`: the reference's p of the first token [V], and of the first two [V * V]."""
    target = load_pair(reference, **TINY).target

    def distributions(sampling):
        cache = target.new_cache()
        first = warp(target.logits(cache, PROMPT)[-1:], sampling)[0]
        joint = np.zeros((VOCABULARY, VOCABULARY))
        for token in np.flatnonzero(first):
            joint[token] = first[token] * warp(target.logits(cache, (int(token),)), sampling)[0]
            cache.trim(1)
        return first, joint.ravel()

    return distributions


def p_values(tokens, distributions):
    """Of the first token, and of the first two together."""
    first, joint = distributions
    return p_value(tokens[:, 0], first), p_value(tokens[:, 0] * VOCABULARY + tokens[:, 1], joint)


def test_answers_follow_the_targets_distribution(pair, exact):
    tokens = answers(pair, FILTERED, num_draft_tokens=1)
    assert min(p_values(tokens, exact(FILTERED))) > 1e-3


def test_point_mass_guesses_keep_the_distribution(pair, exact):
    """Two guesses from the host, as a suffix match makes them: the likeliest first token, then any."""
    first, _ = exact(PLAIN)
    likeliest = int(first.argmax())
    guesses = Proposal(tokens=(likeliest, 7), q=None, num_tokens=2)
    caches = [pair.target.new_cache() for _ in range(BATCH)]
    pair.target.prefill([PrefillJob(cache, PROMPT[:-1]) for cache in caches])
    random = np.random.default_rng(11)
    drawn = []
    for _ in range(SAMPLES // (2 * BATCH)):
        numbers = random.random((BATCH, 5), dtype=np.float32)
        jobs = [
            VerifyJob(cache, PROMPT[-1], guesses, Rules(PLAIN), row[:2], row[2:])
            for cache, row in zip(caches, numbers, strict=True)
        ]
        drawn += [verdict.tokens[0] for verdict in pair.target.verify(jobs)]
        for cache in caches:
            cache.trim(3)
    assert p_value(drawn, first) > 1e-3
    kept = float(np.mean(np.array(drawn) == likeliest))
    assert 0.05 < kept < 0.95


def test_accepting_always_is_caught(pair, exact):
    """The negative control: without it a passing chi-square would prove nothing."""
    tokens = answers(Pair(AcceptsAlways(pair.target), pair.draft), PLAIN, num_draft_tokens=1, samples=500)
    assert min(p_values(tokens, exact(PLAIN))) < 1e-6


class TestACutHead:
    """The draft proposes from half of the tokens; the other half comes from the target alone."""

    @pytest.fixture(scope="class")
    def pair(self, backend, load_pair):
        return load_pair(backend, CUT, **TINY)

    def test_answers_follow_the_targets_distribution(self, pair, exact):
        tokens = answers(pair, FILTERED, num_draft_tokens=1)
        assert min(p_values(tokens, exact(FILTERED))) > 1e-3
        # Else the test would say nothing of a cut.
        assert set(np.unique(tokens)) - set(CUT.ids.tolist())

    def test_forgetting_which_ids_were_kept_is_caught(self, pair, exact):
        wrong = Pair(pair.target, ForgetsTheMap(pair.draft))
        tokens = answers(wrong, PLAIN, num_draft_tokens=1, samples=1000)
        assert p_value(tokens[:, 0], exact(PLAIN)[0]) < 1e-6

    def test_taking_q_for_uncut_is_caught(self, backend, load_pair, pair, exact):
        whole = load_pair(backend, **TINY).draft
        wrong = Pair(pair.target, TakesQForUncut(pair.draft, whole))
        tokens = answers(wrong, PLAIN, num_draft_tokens=1, samples=1000)
        assert p_value(tokens[:, 0], exact(PLAIN)[0]) < 1e-6


class TestOnTheReference:
    """More of the same where a round is cheap: other backends are held to the reference's verdicts."""

    @pytest.fixture(scope="class")
    def pair(self, reference, load_pair):
        return load_pair(reference, **TINY)

    def test_longer_rounds(self, pair, exact):
        tokens = answers(pair, PLAIN, num_draft_tokens=2, max_tokens=3)
        assert min(p_values(tokens, exact(PLAIN))) > 1e-3

    def test_recovering_from_p_is_caught(self, pair, exact):
        wrong = Pair(RecoversFromP(pair.target), pair.draft)
        tokens = answers(wrong, PLAIN, num_draft_tokens=1, samples=1000)
        assert min(p_values(tokens, exact(PLAIN))) < 1e-6

    @pytest.mark.parametrize(
        "sampling",
        [
            Sampling(temperature=1.6, top_p=0.7),
            Sampling(temperature=1.0, top_k=6),
            Sampling(temperature=0.9, min_p=0.05),
        ],
        ids=["top_p", "top_k", "min_p"],
    )
    def test_each_filter(self, pair, exact, sampling):
        tokens = answers(pair, sampling, num_draft_tokens=1)
        assert min(p_values(tokens, exact(sampling))) > 1e-3

    def test_ignoring_a_filter_is_caught(self, pair, exact):
        tokens = answers(pair, PLAIN, num_draft_tokens=1, samples=1000)
        assert min(p_values(tokens, exact(Sampling(temperature=1.0, top_p=0.95)))) < 1e-6
