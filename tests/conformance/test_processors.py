"""Processors on every backend: what is added to p and q alike leaves an answer exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chi_square import p_value
from examples import random_prompt, rounds_of, tokens_of
from tiny import PROMPT, TINY, VOCABULARY, AcceptsAlways

from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.backends.numpy.acceptance import warp
from draftloop.backends.vocabulary import CutVocabulary
from draftloop.speculation.processors import Steering
from draftloop.speculation.round import run_round
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import Rules, Sampling

GREEDY = Sampling()
PLAIN = Sampling(temperature=1.0)
PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((1, 8, 30))]
STEERINGS = {
    "bias": Steering(logit_bias={token: 4.0 - token % 9 for token in range(0, 256, 2)}),
    "penalties": Steering(presence_penalty=1.5, frequency_penalty=0.7),
    "rewards": Steering(presence_penalty=-2.0, frequency_penalty=-0.5),
    "all": Steering({7: 5.0, 30: -100.0, 31: 3.0}, presence_penalty=2.0, frequency_penalty=-1.0),
}


class Fixed:
    """Adds these rows: behind no token, behind one, and so on; None behind the last one."""

    def __init__(self, *rows):
        self.rows = [np.asarray(row, np.float32) for row in rows]

    def bias(self, drafted):
        return self.rows[len(drafted)] if len(drafted) < len(self.rows) else None


def only(*tokens, width=272):
    bias = np.full(width, -np.inf, np.float32)
    bias[list(tokens)] = 0
    return bias


def uniforms(count, seed=0):
    return np.random.default_rng(seed).random(count, dtype=np.float32)


def read(model, tokens=PROMPTS[1]):
    cache = model.new_cache()
    model.prefill([PrefillJob(cache, tokens)])
    return cache


def host(q):
    return None if q is None else np.array(q.cpu() if hasattr(q, "cpu") else q)


def proposed(model, rules, k=4, seed=0, text=()):
    (found,) = model.propose([ProposeJob(read(model), (7,), k, rules, uniforms(k, seed), text)])
    return [int(token) for token in found.tokens], host(found.q), found


def verified(model, proposal, rules, *, seed=0, trace=False):
    k = proposal.num_tokens
    job = VerifyJob(read(model), 7, proposal, rules, uniforms(k, seed), uniforms(k + 1, seed + 9), trace)
    return model.verify([job])[0]


@pytest.fixture(scope="session")
def pair(backend, load_pair):
    return load_pair(backend)


@pytest.fixture(scope="session")
def reference_pair(reference, load_pair):
    return load_pair(reference)


@pytest.mark.parametrize("name", STEERINGS)
def test_greedy_speculation_equals_the_target_alone(pair, reference_pair, name):
    plain = DecodeSettings(GREEDY, 40, frozenset(), 4, 0)
    settings = replace(plain, steering=STEERINGS[name])
    accepted = drafted = changed = 0
    for prompt in PROMPTS:
        rounds = rounds_of(pair, prompt, settings)
        assert tokens_of(rounds) == tokens_of(rounds_of(Pair(pair.target, None), prompt, settings))
        assert tokens_of(rounds) == tokens_of(rounds_of(Pair(reference_pair.target, None), prompt, settings))
        changed += tokens_of(rounds) != tokens_of(rounds_of(Pair(pair.target, None), prompt, plain))
        accepted += sum(outcome.accepted_tokens for outcome in rounds)
        drafted += sum(outcome.drafted_tokens for outcome in rounds)
    assert changed
    assert 0 < accepted < drafted


@pytest.mark.parametrize("name", STEERINGS)
def test_sampled_answers_equal_the_references(pair, reference_pair, name):
    settings = DecodeSettings(Sampling(temperature=0.8, top_p=0.95), 24, frozenset(), 3, 5)
    settings = replace(settings, steering=STEERINGS[name])
    found, expected = (tokens_of(rounds_of(one, PROMPTS[1], settings)) for one in (pair, reference_pair))
    assert found == expected


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN], ids=["greedy", "sampled"])
def test_rows_are_added_where_they_belong(pair, reference_pair, sampling):
    """Each row of a round has its own; q and p are the reference's."""
    rows = [np.random.default_rng(i).normal(0, 6, 272) for i in range(5)]
    rules = Rules(sampling, masked_ids=(3, 4, 5), masked_rows=2, processor=Fixed(*rows))
    tokens, q, proposal = proposed(pair.draft, rules)
    expected, expected_q, _ = proposed(reference_pair.draft, rules)
    assert tokens == expected
    if q is not None:
        np.testing.assert_allclose(q, expected_q, atol=1e-4)
    found = verified(pair.target, proposal, rules)
    guesses = Proposal(tuple(tokens), expected_q, 4)
    wanted = verified(reference_pair.target, guesses, rules)
    assert found.tokens == wanted.tokens
    assert found.alphas == pytest.approx(wanted.alphas, abs=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN], ids=["greedy", "sampled"])
def test_what_is_forbidden_is_neither_drafted_nor_emitted(pair, sampling):
    rules = Rules(sampling, processor=Fixed(only(8, 9), only(10), only(11, 12, 13), only(60, 61)))
    tokens, q, proposal = proposed(pair.draft, rules, k=3)
    assert tokens[0] in {8, 9}
    assert tokens[1] == 10
    assert tokens[2] in {11, 12, 13}
    if q is not None:
        assert np.isfinite(q).all()
        assert q[1].argmax() == 10
        assert q[1].sum() == pytest.approx(1, abs=1e-5)
    verdict = verified(pair.target, proposal, rules)
    assert verdict.tokens[0] in {8, 9}
    assert len(verdict.tokens) < 2 or verdict.tokens[1] == 10
    guess = Proposal((20, 10), None, 2)
    rejected = verified(pair.target, guess, rules)
    assert (rejected.accepted_tokens, rejected.alphas) == (0, (0.0,))
    assert rejected.extra_token in {8, 9}


def test_rows_behind_a_forbidden_guess_do_not_matter(pair):
    rules = Rules(PLAIN, processor=Fixed(only(8, 9)))
    verdict = verified(pair.target, Proposal((20, 10, 11), None, 3), rules, trace=True)
    assert verdict.tokens[0] in {8, 9}
    assert len(verdict.tokens) == 1
    assert np.isfinite(verdict.trace.top_logprobs).all()


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN], ids=["greedy", "sampled"])
def test_traces_are_the_targets_own(pair, sampling):
    plain, biased = Rules(sampling), Rules(sampling, processor=Fixed(only(8), only(9)))
    found = verified(pair.target, Proposal((8,), None, 1), biased, trace=True)
    wanted = verified(pair.target, NO_PROPOSAL, plain, trace=True)
    assert found.tokens == (8, 9)
    np.testing.assert_array_equal(found.trace.top_ids[0], wanted.trace.top_ids[0])
    np.testing.assert_allclose(found.trace.top_logprobs[0], wanted.trace.top_logprobs[0], atol=1e-4)


class TestACutHead:
    """The draft can propose the first 100 tokens only."""

    @pytest.fixture(scope="class")
    def pair(self, backend, load_pair):
        return load_pair(backend, CutVocabulary(np.arange(100, dtype=np.int32)))

    @pytest.mark.parametrize("sampling", [GREEDY, PLAIN], ids=["greedy", "sampled"])
    def test_a_proposal_ends_where_the_head_has_nothing_that_is_allowed(self, pair, sampling):
        for allowed in range(4):
            rows = [only(5 + i, 200) for i in range(allowed)] + [only(200, 201)] * 4
            tokens, q, proposal = proposed(pair.draft, Rules(sampling, processor=Fixed(*rows)))
            assert tokens == [5, 6, 7][:allowed]
            assert proposal.num_tokens == allowed
            assert q is None or q.shape == (allowed, 272)
            verdict = verified(pair.target, proposal, Rules(sampling, processor=Fixed(*rows)))
            assert set(verdict.tokens) <= {5, 6, 7, 200, 201}

    @pytest.mark.parametrize("name", STEERINGS)
    def test_greedy_speculation_equals_the_target_alone(self, pair, name):
        settings = DecodeSettings(GREEDY, 24, frozenset(), 4, 0, steering=STEERINGS[name])
        rounds = rounds_of(pair, PROMPTS[1], settings)
        assert tokens_of(rounds) == tokens_of(rounds_of(Pair(pair.target, None), PROMPTS[1], settings))

    def test_an_answer_goes_on_where_the_draft_can_say_nothing(self, pair):
        bias = {token: -100.0 if token < 100 else 0.0 for token in range(272)}
        settings = DecodeSettings(PLAIN, 12, frozenset(), 4, 0, steering=Steering(logit_bias=bias))
        assert min(tokens_of(rounds_of(pair, PROMPTS[1], settings))) >= 100


@pytest.mark.parametrize("sizes", [(272, 288), (288, 272)])
def test_vocabularies_that_differ_by_padding(backend, load_pair, sizes):
    target_size, draft_size = sizes
    pair = load_pair(backend, vocab_size=target_size, draft_vocab_size=draft_size)
    assert pair.draft.architecture.vocab_size == draft_size
    for sampling in (GREEDY, PLAIN):
        settings = DecodeSettings(sampling, 20, frozenset(), 4, 0, steering=STEERINGS["all"])
        rounds = rounds_of(pair, PROMPTS[1], settings)
        assert max(tokens_of(rounds)) < target_size
        assert sum(outcome.accepted_tokens for outcome in rounds)
        if sampling is GREEDY:
            assert tokens_of(rounds) == tokens_of(rounds_of(Pair(pair.target, None), PROMPTS[1], settings))


class TestDistributions:
    """Chi-square of the first two tokens under a bias and penalties, with the negative controls."""

    STEERING = Steering(
        {token: 1.5 if token % 3 else -1.0 for token in range(VOCABULARY)},
        presence_penalty=1.5,
        frequency_penalty=0.5,
    )

    @pytest.fixture(scope="class")
    def pair(self, backend, load_pair):
        return load_pair(backend, **TINY)

    @pytest.fixture(scope="class")
    def exact(self, reference, load_pair):
        """The reference's p of the first two tokens together [V * V]; the repeated one penalized by hand."""
        target = load_pair(reference, **TINY).target
        cache = target.new_cache()
        bias = np.array([self.STEERING.logit_bias[token] for token in range(VOCABULARY)], np.float32)
        first = warp(target.logits(cache, PROMPT)[-1:] + bias, PLAIN)[0]
        joint = np.zeros((VOCABULARY, VOCABULARY))
        for token in range(VOCABULARY):
            said = np.arange(VOCABULARY) == token
            logits = target.logits(cache, (token,)) + bias - np.where(said, 2.0, 0.0)
            joint[token] = first[token] * warp(logits, PLAIN)[0]
            cache.trim(1)
        return joint.ravel()

    def drawn(self, pair, steering, samples):
        conversation, found = Conversation(pair), []
        for seed in range(samples):
            for _ in read_prompt(pair, conversation, PROMPT):
                pass
            settings = DecodeSettings(PLAIN, 2, frozenset(), 1, seed, steering=steering)
            stream = Stream(conversation, settings)
            while stream.remaining_tokens:
                run_round(pair, [stream])
            found.append(conversation.tokens[len(PROMPT) :])
        tokens = np.array(found)
        return tokens[:, 0] * VOCABULARY + tokens[:, 1]

    def test_answers_follow_the_biased_target(self, backend, pair, exact):
        samples = 3000 if backend.capabilities().backend == "numpy" else 800
        assert p_value(self.drawn(pair, self.STEERING, samples), exact) > 1e-3

    def test_forgetting_the_penalties_is_caught(self, pair, exact):
        wrong = replace(self.STEERING, presence_penalty=-1.0, frequency_penalty=-1.0)
        assert p_value(self.drawn(pair, wrong, 800), exact) < 1e-6

    def test_biasing_the_target_alone_of_a_wrong_rule_is_caught(self, pair, exact):
        wrong = Pair(AcceptsAlways(pair.target), pair.draft)
        assert p_value(self.drawn(wrong, self.STEERING, 800), exact) < 1e-6

    def test_an_unbiased_draft_is_still_exact(self, reference, load_pair, exact):
        """A q that nobody biased costs acceptance, never exactness."""
        pair = load_pair(reference, **TINY)
        tokens = self.drawn(Pair(pair.target, Unbiased(pair.draft)), self.STEERING, 3000)
        assert p_value(tokens, exact) > 1e-3


class Unbiased:
    """A draft that knows of no processor."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def propose(self, batch):
        return self._model.propose([replace(job, rules=replace(job.rules, processor=None)) for job in batch])
