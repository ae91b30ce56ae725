"""Whole answers through the core's rounds: greedy identity, seeds, and where an answer ends."""

from __future__ import annotations

import numpy as np
import pytest

from draftloop.speculation.round import decode
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import FinishReason, Sampling, TokenKind
from toys import EOS_ID

GREEDY = Sampling()
SAMPLED = Sampling(temperature=1.0, top_p=0.95)
NO_EOS = frozenset()
PROMPTS = [
    tuple(np.random.default_rng(seed).integers(0, 256, length).tolist())
    for seed, length in enumerate((1, 2, 8, 21, 40))
]


def answer(
    pair,
    prompt,
    sampling=GREEDY,
    max_tokens=18,
    eos_token_ids=NO_EOS,
    num_draft_tokens=4,
    seed=0,
    min_tokens=1,
):
    """All rounds of one answer in a fresh conversation."""
    conversation = Conversation(pair)
    for _ in read_prompt(pair, conversation, prompt):
        pass
    settings = DecodeSettings(sampling, max_tokens, eos_token_ids, num_draft_tokens, seed, min_tokens)
    return list(decode(pair, Stream(conversation, settings)))


def tokens_of(rounds):
    return tuple(token for outcome in rounds for token in outcome.tokens)


def accepted_of(rounds):
    return sum(outcome.accepted_tokens for outcome in rounds)


@pytest.fixture(scope="session")
def pair(backend, load_pair):
    return load_pair(backend)


@pytest.fixture(scope="session")
def alone(pair):
    """The target without a draft."""
    return Pair(pair.target, None)


@pytest.mark.parametrize("num_draft_tokens", range(1, 7))
def test_greedy_speculation_equals_the_target_alone(pair, alone, num_draft_tokens):
    accepted = drafted = 0
    for prompt in PROMPTS:
        rounds = answer(pair, prompt, num_draft_tokens=num_draft_tokens)
        assert tokens_of(rounds) == tokens_of(answer(alone, prompt))
        accepted += accepted_of(rounds)
        drafted += sum(outcome.drafted_tokens for outcome in rounds)
    # Neither a draft that is never right nor one that always is would test anything.
    assert 0 < accepted < drafted


@pytest.mark.parametrize("options", [{"model_type": "qwen2", "quantized": True}, {"model_type": "qwen3"}])
def test_greedy_speculation_on_other_models(backend, load_pair, options):
    pair = load_pair(backend, **options)
    for prompt in PROMPTS[-3:]:
        assert tokens_of(answer(pair, prompt)) == tokens_of(answer(Pair(pair.target, None), prompt))


def test_greedy_answers_equal_the_references(pair, reference, load_pair):
    expected = load_pair(reference)
    for prompt in PROMPTS:
        assert tokens_of(answer(pair, prompt)) == tokens_of(answer(expected, prompt))


def test_sampled_answers_equal_the_references(pair, reference, load_pair):
    """The core owns the random numbers: the same seed gives the same text on every backend (in float32)."""
    expected = load_pair(reference)
    for seed in range(4):
        found = answer(pair, PROMPTS[2], SAMPLED, seed=seed)
        assert tokens_of(found) == tokens_of(answer(expected, PROMPTS[2], SAMPLED, seed=seed))


def test_a_seed_fixes_the_answer(pair):
    first, again, other = (answer(pair, PROMPTS[2], SAMPLED, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert tokens_of(first) != tokens_of(other)


def test_numbers_belong_to_positions(alone):
    """A text continued from its own beginning goes on as it did."""
    whole = tokens_of(answer(alone, PROMPTS[2], SAMPLED, max_tokens=12, seed=3))
    for max_tokens in (1, 5):
        assert (
            tokens_of(answer(alone, PROMPTS[2], SAMPLED, max_tokens=max_tokens, seed=3)) == whole[:max_tokens]
        )


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_max_tokens_is_exact(pair, sampling, max_tokens):
    rounds = answer(pair, PROMPTS[3], sampling, max_tokens)
    assert len(tokens_of(rounds)) == max_tokens
    assert rounds[-1].finish_reason is FinishReason.LENGTH
    assert all(outcome.finish_reason is None for outcome in rounds[:-1])


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [115, 126, 127])
def test_the_caches_cap_ends_the_answer(pair, alone, sampling, length):
    """The cache holds 128 tokens: prompt and answer together are never longer."""
    prompt = tuple(np.random.default_rng(length).integers(0, 256, length).tolist())
    rounds = answer(pair, prompt, sampling, max_tokens=500)
    assert len(tokens_of(rounds)) == 128 - length
    assert rounds[-1].finish_reason is FinishReason.LENGTH
    if sampling is GREEDY:
        assert tokens_of(rounds) == tokens_of(answer(alone, prompt, max_tokens=500))


def test_eos_ends_the_answer_wherever_it_falls(pair):
    """Each token of a greedy text in turn is made EOS: accepted in mid-run, recovered, or bonus."""
    text = tokens_of(answer(pair, PROMPTS[4]))
    kinds = set()
    for eos in set(text):
        rounds = answer(pair, PROMPTS[4], eos_token_ids=frozenset({eos}))
        assert tokens_of(rounds) == text[: text.index(eos) + 1]
        assert rounds[-1].finish_reason is FinishReason.STOP
        assert all(outcome.finish_reason is None for outcome in rounds[:-1])
        kinds.add(rounds[-1].kinds[-1])
    assert {TokenKind.ACCEPTED, TokenKind.RECOVERED} <= kinds


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_min_tokens_holds_eos_back(pair, sampling, num_draft_tokens):
    """EOS tokens that are otherwise met early come only from position `min_tokens` on."""
    text = tokens_of(answer(pair, PROMPTS[3], sampling, num_draft_tokens=num_draft_tokens))
    eos = frozenset({text[0], text[1], text[3], EOS_ID})
    for min_tokens in (2, 3, 9):
        rounds = answer(
            pair,
            PROMPTS[3],
            sampling,
            eos_token_ids=eos,
            num_draft_tokens=num_draft_tokens,
            min_tokens=min_tokens,
        )
        found = tokens_of(rounds)
        assert len(found) >= min_tokens
        assert not eos & set(found[:-1])
        if rounds[-1].finish_reason is FinishReason.STOP:
            assert found[-1] in eos


def test_a_masked_greedy_answer_equals_the_target_alone(pair, alone):
    text = tokens_of(answer(alone, PROMPTS[3]))
    options = {"eos_token_ids": frozenset(text[:6]), "min_tokens": 10}
    assert tokens_of(answer(pair, PROMPTS[3], **options)) == tokens_of(answer(alone, PROMPTS[3], **options))


def test_a_second_turn_reuses_the_caches(pair):
    conversation = Conversation(pair)
    settings = DecodeSettings(GREEDY, 12, NO_EOS, 4, 0)
    for _ in read_prompt(pair, conversation, PROMPTS[3]):
        pass
    first = tokens_of(decode(pair, Stream(conversation, settings)))
    longer = (*PROMPTS[3], *first, 10, 11, 12)
    held = next(iter(read_prompt(pair, conversation, longer)))
    assert held == len(longer) - 4
    for _ in read_prompt(pair, conversation, longer):
        pass
    assert tokens_of(decode(pair, Stream(conversation, settings))) == tokens_of(
        answer(pair, longer, max_tokens=12)
    )
