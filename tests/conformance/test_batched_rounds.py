"""Many streams at once: whoever joins and leaves beside it, each gets what it gets alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.backends.vocabulary import CutVocabulary
from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.round import run_round
from draftloop.speculation.schedule import Schedule
from draftloop.speculation.stream import Conversation, DecodeSettings, Stream, read_prompt
from draftloop.speculation.suffix import SuffixIndex, SuffixText
from draftloop.speculation.together import TogetherPace
from draftloop.types import Sampling

KINDS_OF_SAMPLING = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.2, top_k=20, min_p=0.02),
)
CHEAP = RoundCosts(((1, 1.0), (40, 1.4)), 0.05, 0.0, 0.01, verify_more_s=0.01, draft_more_s=0.01)
HOPELESS = RoundCosts(((1, 1.0), (40, 40.0)), 1.0, 0.0, 0.01, draft_more_s=1.0)
CUT = CutVocabulary(np.arange(0, 272, 3, dtype=np.int32))


@dataclass(frozen=True, slots=True)
class Visit:
    """One answer among others: it joins before a round, and leaves after so many of its own at the latest."""

    joins: int
    rounds: int
    prompt: tuple[int, ...]
    settings: DecodeSettings


@st.composite
def visits(draw):
    seed = draw(st.integers(0, 999))
    length = draw(st.sampled_from((1, 2, 7, 20, 33)))
    return Visit(
        joins=draw(st.integers(0, 4)),
        rounds=draw(st.integers(1, 8)),
        prompt=tuple(np.random.default_rng(seed).integers(0, 256, length).tolist()),
        settings=DecodeSettings(
            sampling=draw(st.sampled_from(KINDS_OF_SAMPLING)),
            max_tokens=draw(st.integers(1, 16)),
            eos_token_ids=frozenset({11, 12}),
            num_draft_tokens=draw(st.integers(0, 5)),
            seed=seed,
            min_tokens=draw(st.sampled_from((1, 4))),
            trace=draw(st.booleans()),
        ),
    )


def opened(pair, visit, schedule=None):
    conversation = Conversation(pair)
    for _ in read_prompt(pair, conversation, visit.prompt):
        pass
    repeatable, pace, suffix = not visit.settings.sampling.greedy, None, None
    if schedule is not None:
        pace = schedule.open(visit.settings.num_draft_tokens, repeatable=repeatable)
        suffix = SuffixText(SuffixIndex(0), conversation.max_tokens, 8)
        suffix.read(visit.prompt, len(visit.prompt) - 1)
    return Stream(conversation, visit.settings, pace, suffix)


def answered(pair, guests, schedule=None):
    """Each visit's rounds, with the others beside it."""
    together = None if schedule is None else TogetherPace(schedule)
    clock = iter(np.arange(0, 1e6, 0.5))
    found = {index: [] for index in range(len(guests))}
    present, waiting, now = {}, dict(enumerate(guests)), 0
    while present or waiting:
        now += 1
        for index in [index for index, visit in waiting.items() if visit.joins <= now or not present]:
            present[index] = opened(pair, waiting.pop(index), schedule)
        outcomes = run_round(pair, list(present.values()), lambda: float(next(clock)), together)
        for index, outcome in zip(list(present), outcomes, strict=True):
            found[index].append(outcome)
            if outcome.finish_reason is not None or len(found[index]) == guests[index].rounds:
                del present[index]
    return list(found.values())


def assert_each_as_alone(pair, guests):
    for visit, rounds in zip(guests, answered(pair, guests), strict=True):
        alone = answered(pair, [Visit(0, visit.rounds, visit.prompt, visit.settings)])[0]
        for outcome, wanted in zip(rounds, alone, strict=True):
            facts = [
                (one.tokens, one.kinds, one.drafted_tokens, one.finish_reason) for one in (outcome, wanted)
            ]
            assert facts[0] == facts[1]
            assert outcome.alphas == pytest.approx(wanted.alphas, abs=1e-4)
            assert (outcome.trace is None) == (wanted.trace is None)
            if outcome.trace is not None:
                np.testing.assert_array_equal(outcome.trace.draft_ids, wanted.trace.draft_ids)
                np.testing.assert_allclose(outcome.trace.top_logprobs, wanted.trace.top_logprobs, atol=1e-3)


@pytest.fixture(scope="session")
def pair(backend, load_pair):
    return load_pair(backend)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(guests=st.lists(visits(), min_size=2, max_size=5))
def test_each_gets_what_it_gets_alone(pair, guests):
    assert_each_as_alone(pair, guests)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(guests=st.lists(visits(), min_size=2, max_size=4))
def test_also_where_the_drafts_head_is_cut_and_follows_each_text(backend, load_pair, guests):
    assert_each_as_alone(load_pair(backend, CUT), guests)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(guests=st.lists(visits(), min_size=2, max_size=4))
def test_also_on_other_models(backend, load_pair, guests):
    assert_each_as_alone(load_pair(backend, model_type="qwen3"), guests)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    guests=st.lists(visits().filter(lambda visit: visit.rounds > 4), min_size=2, max_size=5),
    costs=st.sampled_from((CHEAP, HOPELESS)),
)
def test_texts_do_not_depend_on_who_chooses_k(pair, guests, costs):
    """Chosen together, greedy rounds end elsewhere than alone; sampled ones choose as alone."""
    found = answered(pair, guests, Schedule(costs))
    for visit, rounds in zip(guests, found, strict=True):
        alone = answered(pair, [Visit(0, 99, visit.prompt, visit.settings)], Schedule(costs))[0]
        text = tuple(token for outcome in rounds for token in outcome.tokens)
        assert text == tuple(token for outcome in alone for token in outcome.tokens)[: len(text)]
        if not visit.settings.sampling.greedy:
            assert [one.tokens for one in rounds] == [one.tokens for one in alone[: len(rounds)]]


def test_greedy_streams_are_drafted_for_together(pair):
    """Where drafting pays for all of them it is done, and where it does not for none, but for probes."""
    guests = [
        Visit(0, 99, tuple(range(first, first + 9)), DecodeSettings(Sampling(), 24, frozenset(), 4, 0))
        for first in (5, 60, 130)
    ]
    shares = []
    for costs in (CHEAP, HOPELESS):
        rounds = [one for rounds in answered(pair, guests, Schedule(costs)) for one in rounds]
        shares.append(
            sum(bool(one.drafted_tokens or one.suffix_drafted_tokens) for one in rounds) / len(rounds)
        )
    assert shares[0] > 0.8
    assert shares[1] < 0.5
