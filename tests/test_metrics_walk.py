"""Expected rounds and acceptance of a replayed answer, against enumeration, chance and real decoding."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloop.backends.numpy.backend import NumpyBackend
from draftloop.speculation.metrics import (
    Tally,
    expected_acceptance_rate,
    expected_rounds,
    tokens_per_round,
)
from draftloop.speculation.round import decode
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import FinishReason, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

CHANCES = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
PROMPTS = ((72, 101, 108), (258, 1, 2, 3, 40, 41), tuple(range(60, 100)))


def enumerated(alphas: Sequence[float], num_draft_tokens: int) -> tuple[float, float, float]:
    """Expected rounds, drafted and accepted tokens, each number of accepted tokens of each round in turn."""

    @cache
    def walk(t: int) -> np.ndarray:
        if t == len(alphas):
            return np.zeros(3)
        k = min(num_draft_tokens, len(alphas) - t - 1)
        total = np.array([1.0, k, 0.0])
        for m in range(k + 1):
            chance = np.prod(alphas[t : t + m]) * (1 - alphas[t + m] if m < k else 1)
            total = total + chance * (walk(t + m + 1) + np.array([0, 0, m]))
        return total

    return tuple(walk(0))


@given(st.lists(CHANCES, max_size=30), st.integers(0, 8))
def test_the_walk_is_the_enumeration(alphas, num_draft_tokens):
    rounds, drafted, accepted = enumerated(alphas, num_draft_tokens)
    assert expected_rounds(alphas, num_draft_tokens) == pytest.approx(rounds)
    rate = expected_acceptance_rate(alphas, num_draft_tokens)
    assert rate == (pytest.approx(accepted / drafted, abs=1e-9) if drafted else None)


@given(st.lists(CHANCES, max_size=30), st.integers(0, 8))
def test_rounds_lie_between_none_wrong_and_none_right(alphas, num_draft_tokens):
    length = len(alphas)
    rounds = expected_rounds(alphas, num_draft_tokens)
    assert -(-length // (num_draft_tokens + 1)) - 1e-9 <= rounds <= length + 1e-9
    assert expected_rounds([1.0] * length, num_draft_tokens) == -(-length // (num_draft_tokens + 1))
    assert expected_rounds([0.0] * length, num_draft_tokens) == length
    assert expected_rounds(alphas, 0) == length


def test_the_walk_is_what_chance_does():
    random = np.random.default_rng(5)
    alphas, k, walks = random.uniform(0.2, 1, 40), 4, 4000
    counts = np.zeros(walks)
    for i in range(walks):
        t = 0
        while t < len(alphas):
            drafted = min(k, len(alphas) - t - 1)
            wrong = np.flatnonzero(random.random(drafted) >= alphas[t : t + drafted])
            t += (wrong[0] if len(wrong) else drafted) + 1
            counts[i] += 1
    error = counts.std() / walks**0.5
    assert abs(counts.mean() - expected_rounds(alphas.tolist(), k)) < 4 * error


def test_a_float32_array_will_do():
    alphas = np.array([0.5, 1.0, 0.25, 0.75], np.float32)
    assert expected_rounds(alphas, 2) == expected_rounds(alphas.tolist(), 2)


def test_an_empty_answer_needs_nothing():
    assert expected_rounds([], 4) == 0
    assert expected_acceptance_rate([], 4) is None
    assert tokens_per_round(0, expected_rounds([], 4)) is None


@pytest.fixture(scope="module")
def pair(toy_pair) -> Pair:
    target, draft = toy_pair()
    backend = NumpyBackend()
    return Pair(backend.load(target, max_kv_cache_tokens=256), backend.load(draft, max_kv_cache_tokens=256))


def served(pair: Pair, prompt: Sequence[int], num_draft_tokens: int, eos: int | None = None) -> tuple:
    """A greedy answer: its tokens, its tally and how it ended."""
    conversation = Conversation(pair)
    for _ in read_prompt(pair, conversation, prompt):
        pass
    settings = DecodeSettings(
        sampling=Sampling(),
        max_tokens=50,
        eos_token_ids=frozenset() if eos is None else frozenset([eos]),
        num_draft_tokens=num_draft_tokens,
        seed=0,
    )
    tally, tokens, ended = Tally(), [], None
    for outcome in decode(pair, Stream(conversation, settings)):
        tally.add(outcome)
        tokens += outcome.tokens
        ended = outcome.finish_reason
    return tokens, tally, ended


def replayed(pair: Pair, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Alpha of each answer token, teacher-forced: 1 where the draft's argmax is that token."""
    logits = pair.draft.logits(pair.draft.new_cache(), [*prompt, *answer])
    guesses = logits[len(prompt) - 1 : -1].argmax(axis=-1)
    return (guesses == np.array(answer)).astype(float).tolist()


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 4, 7])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_decoding_takes_the_rounds_that_its_replay_expects(pair, prompt, num_draft_tokens):
    answer, tally, ended = served(pair, prompt, num_draft_tokens)
    alphas = replayed(pair, prompt, answer)
    assert ended is FinishReason.LENGTH
    assert 0 < sum(alphas) < len(alphas)
    assert expected_rounds(alphas, num_draft_tokens) == tally.rounds
    assert expected_acceptance_rate(alphas, num_draft_tokens) == pytest.approx(tally.acceptance_rate)


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_wherever_eos_falls_the_rounds_are_those_expected(pair, num_draft_tokens):
    for prompt in PROMPTS[:2]:
        for eos in sorted(set(served(pair, prompt, num_draft_tokens)[0]))[:12]:
            answer, tally, ended = served(pair, prompt, num_draft_tokens, eos)
            assert ended is FinishReason.STOP
            assert expected_rounds(replayed(pair, prompt, answer), num_draft_tokens) == tally.rounds
