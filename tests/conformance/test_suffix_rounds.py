"""Rounds that draft from suffix matches: exact, counted apart, and the draft's cache catches up."""

from __future__ import annotations

import numpy as np
import pytest
from chi_square import p_value
from tiny import PROMPT, TINY, AcceptsAlways, RecoversFromP, second_tokens

from draftloop.backends.base import ProposeJob
from draftloop.speculation.round import decode, run_round
from draftloop.speculation.schedule import Choice
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.speculation.suffix import SuffixIndex, SuffixText
from draftloop.types import FinishReason, Sampling, TokenKind

GREEDY = Sampling()
PLAIN = Sampling(temperature=1.0)
K, LONGEST = 3, 15
PROMPTS = [
    tuple(np.random.default_rng(seed).integers(0, 256, length).tolist())
    for seed, length in enumerate((2, 8, 30))
]


class Matching:
    """A pace: whatever is found again is proposed, but the model drafts in every third round."""

    def __init__(self):
        self._rounds = 0

    def choose(self, cap, backlog_tokens, remaining_tokens):
        return Choice(min(cap, K), 1.0)

    def choose_free(self, chances):
        return Choice(len(chances), 0.5 if self._rounds % 3 == 2 else 2.0)

    def reads_along(self, backlog_tokens, remaining_tokens):
        return True

    def observe(self, timed):
        self._rounds += 1


class Watched:
    """A draft that notes each text that it drafted behind, what it had to read, and what it proposed."""

    def __init__(self, draft):
        self._draft = draft
        self.conversation = None
        self.seen = []

    def __getattr__(self, name):
        return getattr(self._draft, name)

    def propose(self, batch):
        proposals = self._draft.propose(batch)
        text = tuple(self.conversation.tokens)
        for job, proposal in zip(batch, proposals, strict=True):
            self.seen.append((text, len(job.unread), [int(token) for token in proposal.tokens]))
        return proposals


def answer(pair, prompt, remembered=(), sampling=GREEDY, max_tokens=60, eos=(), min_tokens=1, pace=None):
    """All rounds of one answer, with these texts in the index; None looks for no match."""
    conversation = Conversation(pair)
    if isinstance(pair.draft, Watched):
        pair.draft.conversation = conversation
    for _ in read_prompt(pair, conversation, prompt):
        pass
    suffix = None
    if remembered is not None:
        index = SuffixIndex(10_000)
        for text in remembered:
            index.add_answer(text)
        suffix = SuffixText(index, conversation.max_tokens, LONGEST)
    k = 0 if pair.draft is None else K
    settings = DecodeSettings(sampling, max_tokens, frozenset(eos), k, 0, min_tokens, trace=True)
    return list(decode(pair, Stream(conversation, settings, pace, suffix)))


def tokens_of(rounds):
    return tuple(token for outcome in rounds for token in outcome.tokens)


def disturbed(tokens, every):
    return [(token + 1) % 250 if i % every == every - 1 else token for i, token in enumerate(tokens)]


def matched(rounds):
    """Those in which a match proposed; every round counts for one drafter at most."""
    assert not any(outcome.drafted_tokens and outcome.suffix_drafted_tokens for outcome in rounds)
    return [outcome for outcome in rounds if outcome.from_suffix]


@pytest.fixture(scope="session")
def pair(backend, load_pair):
    return load_pair(backend)


@pytest.mark.parametrize("with_draft", [True, False], ids=["with the draft", "without"])
def test_greedy_answers_are_the_targets(pair, with_draft):
    drafts = Pair(pair.target, pair.draft if with_draft else None)
    accepted = drafted = 0
    for prompt in PROMPTS:
        expected = answer(Pair(pair.target, None), prompt, None)
        text = tokens_of(expected)
        remembered = [(*prompt, *disturbed(text, every=20)), disturbed(text[7:], every=5)]
        rounds = answer(drafts, prompt, remembered, pace=Matching())
        assert tokens_of(rounds) == text
        assert max(outcome.suffix_accepted_tokens for outcome in rounds) > 2 * K
        assert any(outcome.drafted_tokens for outcome in rounds) == with_draft
        accepted += sum(outcome.suffix_accepted_tokens for outcome in rounds)
        drafted += sum(outcome.suffix_drafted_tokens for outcome in rounds)
        # The draft model's positions are the only ones with its q; p stands at every one.
        whole = np.concatenate([outcome.trace.top_ids for outcome in expected])
        assert np.array_equal(
            np.concatenate([outcome.trace.top_ids[:, :2] for outcome in rounds]), whole[:, :2]
        )
    assert 0 < accepted < drafted


def test_a_match_counts_as_nothing_of_the_drafts(pair):
    text = tokens_of(answer(pair, PROMPTS[1], None))
    rounds = answer(pair, PROMPTS[1], [disturbed(text, every=9)], pace=Matching())
    kinds = set()
    for outcome in matched(rounds):
        assert (outcome.drafted_tokens, outcome.accepted_tokens, outcome.alphas) == (0, 0, ())
        assert (outcome.trace.draft_ids == -1).all()
        assert not outcome.trace.draft_probs.any()
        assert outcome.kinds.count(TokenKind.SUFFIX) == outcome.suffix_accepted_tokens
        kinds |= set(outcome.kinds)
    assert kinds == {TokenKind.SUFFIX, TokenKind.RECOVERED, TokenKind.BONUS}
    by_model = [outcome for outcome in rounds if outcome.drafted_tokens]
    assert all(outcome.suffix_drafted_tokens == 0 for outcome in by_model)
    assert all(TokenKind.SUFFIX not in outcome.kinds for outcome in by_model)
    assert all((outcome.trace.draft_ids[: len(outcome.alphas)] >= 0).all() for outcome in by_model)


def test_the_draft_reads_what_matches_wrote_before_it_drafts_again(pair):
    watched = Watched(pair.draft)
    text = tokens_of(answer(pair, PROMPTS[2], None))
    answer(Pair(pair.target, watched), PROMPTS[2], [disturbed(text, every=20)], pace=Matching())
    assert max(unread for _, unread, _ in watched.seen) > LONGEST // 2
    rules = Stream(Conversation(pair), DecodeSettings(GREEDY, 60, frozenset(), K, 0)).rules
    for tokens, _, proposed in watched.seen:
        job = ProposeJob(pair.draft.new_cache(), tokens, len(proposed), rules, np.zeros(K, np.float32))
        assert [int(token) for token in pair.draft.propose([job])[0].tokens] == proposed


def test_eos_inside_a_match_ends_the_answer(pair):
    text = tokens_of(answer(pair, PROMPTS[2], None, max_tokens=30))
    inside = 0
    for eos in sorted(set(text)):
        rounds = answer(pair, PROMPTS[2], [text], eos=[eos], max_tokens=30, pace=Matching())
        end = text.index(eos) + 1
        assert tokens_of(rounds) == text[:end]
        assert rounds[-1].finish_reason is FinishReason.STOP
        if rounds[-1].from_suffix:
            last = rounds[-1]
            assert last.suffix_accepted_tokens <= last.suffix_drafted_tokens
            assert len(last.kinds) == len(last.tokens) == len(last.trace.top_ids)
            if last.suffix_drafted_tokens == len(last.tokens):
                inside += 1
    assert inside > 0


@pytest.mark.parametrize("max_tokens", [1, 2, 9, 23])
@pytest.mark.parametrize("sampling", [GREEDY, PLAIN], ids=["greedy", "sampled"])
def test_max_tokens_is_exact(pair, sampling, max_tokens):
    text = tokens_of(answer(pair, PROMPTS[1], None))
    rounds = answer(pair, PROMPTS[1], [text], sampling, max_tokens, pace=Matching())
    assert len(tokens_of(rounds)) == max_tokens
    assert rounds[-1].finish_reason is FinishReason.LENGTH


def test_the_caches_cap_ends_the_answer(pair):
    """The cache holds 128 tokens: a match's draft is never longer than the room that is left."""
    prompt = tuple(np.random.default_rng(7).integers(0, 256, 100).tolist())
    text = tokens_of(answer(Pair(pair.target, None), prompt, None, max_tokens=500))
    rounds = answer(pair, prompt, [(*text, *range(40))], max_tokens=500, pace=Matching())
    assert tokens_of(rounds) == text
    assert len(text) == 28
    assert matched(rounds)


def test_min_tokens_holds_back_the_eos_of_a_match(pair):
    text = tokens_of(answer(pair, PROMPTS[2], None, max_tokens=30))
    options = {"eos": text[5:8], "min_tokens": 16, "max_tokens": 30}
    expected = tokens_of(answer(Pair(pair.target, None), PROMPTS[2], None, **options))
    rounds = answer(pair, PROMPTS[2], [text], **options, pace=Matching())
    assert tokens_of(rounds) == expected
    assert matched(rounds)


def sampled(target, samples):
    """The first two tokens of `samples` answers, one a seed, where the likeliest ones are proposed."""
    conversation, found, kept = Conversation(Pair(target, None)), [], 0
    first, second = second_tokens(target, PLAIN)
    index = SuffixIndex(100)
    index.add_answer((*PROMPT, int(first.argmax()), int(second.argmax()), 5))
    for seed in range(samples):
        for _ in read_prompt(Pair(target, None), conversation, PROMPT):
            pass
        settings = DecodeSettings(PLAIN, 3, frozenset(), 0, seed)
        suffix = SuffixText(index, conversation.max_tokens, 2)
        stream = Stream(conversation, settings, suffix=suffix)
        outcome = run_round(Pair(target, None), [stream])[0]
        assert outcome.suffix_drafted_tokens == 2
        kept += outcome.suffix_accepted_tokens > 0
        while stream.remaining_tokens:
            run_round(Pair(target, None), [stream])
        found.append(conversation.tokens[len(PROMPT) :])
    assert kept / samples > 0.05
    return np.array(found)


def p_values(tokens, distributions):
    return [p_value(tokens[:, i], distributions[i]) for i in range(2)]


@pytest.fixture(scope="session")
def exact(reference, load_pair):
    return second_tokens(load_pair(reference, **TINY).target, PLAIN)


def test_sampled_answers_follow_the_target(backend, load_pair, exact):
    samples = 3000 if backend.capabilities().backend == "numpy" else 600
    tokens = sampled(load_pair(backend, **TINY).target, samples)
    assert min(p_values(tokens, exact)) > 1e-3


@pytest.mark.parametrize("rule", [AcceptsAlways, RecoversFromP])
def test_a_wrong_rule_is_caught(reference, load_pair, exact, rule):
    """The negative controls."""
    tokens = sampled(rule(load_pair(reference, **TINY).target), 1500)
    assert min(p_values(tokens, exact)) < 1e-6
