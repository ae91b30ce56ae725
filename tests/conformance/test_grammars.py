"""Grammars on every backend: speculation stays exact, and every answer is what the schema says."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema_rs
import numpy as np
import pytest
from chi_square import p_value
from examples import random_prompt, rounds_of, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from draftloop.backends.numpy.acceptance import warp
from draftloop.models.grammar import Grammars
from draftloop.models.tokenizer import Tokenizer
from draftloop.speculation.processors import Steering
from draftloop.speculation.round import decode
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.speculation.suffix import SuffixIndex, SuffixText
from draftloop.types import FinishReason, Sampling

GREEDY = Sampling()
PLAIN = Sampling(temperature=1.0)
PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((1, 8, 20))]
SCHEMA = {
    "type": "object",
    "properties": {
        "on": {"type": "boolean"},
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["the", "other", None]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["on", "name", "kind", "ages"],
    "additionalProperties": False,
}
LETTERS = "abcdefgh"


@pytest.fixture(scope="session")
def tokenizer(toy_folder):
    return Tokenizer.load(toy_folder())


@pytest.fixture(scope="session")
def grammars(tokenizer):
    return Grammars(tokenizer, 272)


@pytest.fixture(scope="session")
def plain_text(tokenizer):
    """A toy writes blanks as readily as anything; without them its JSON is short."""
    return {token: -50.0 for token in range(tokenizer.vocab_size) if tokenizer.decode([token]).isspace()}


@pytest.fixture(scope="session")
def pair(backend, load_pair):
    return load_pair(backend)


@pytest.fixture(scope="session")
def asked(tokenizer, grammars, plain_text):
    """`asked(schema, sampling, **settings)`."""

    def settings_of(schema, sampling=GREEDY, **options):
        steering = Steering(plain_text, grammar=grammars.json_schema(schema))
        eos = frozenset(tokenizer.eos_token_ids)
        return replace(DecodeSettings(sampling, 100, eos, 4, 0, steering=steering), **options)

    return settings_of


def accepted_and_drafted(rounds):
    return np.sum([(outcome.accepted_tokens, outcome.drafted_tokens) for outcome in rounds], axis=0)


def test_greedy_speculation_equals_the_target_alone(pair, reference, load_pair, asked, tokenizer):
    expected, totals = load_pair(reference), np.zeros(2, int)
    for prompt in PROMPTS:
        rounds = rounds_of(pair, prompt, asked(SCHEMA))
        assert tokens_of(rounds) == tokens_of(rounds_of(Pair(pair.target, None), prompt, asked(SCHEMA)))
        assert tokens_of(rounds) == tokens_of(rounds_of(Pair(expected.target, None), prompt, asked(SCHEMA)))
        assert rounds[-1].finish_reason is FinishReason.STOP
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(tokenizer.decode(tokens_of(rounds))))
        totals += accepted_and_drafted(rounds)
    assert 0 < totals[0] < totals[1]


def test_sampled_answers_equal_the_references(pair, reference, load_pair, asked):
    expected = load_pair(reference)
    for seed in range(3):
        settings = asked(SCHEMA, Sampling(temperature=0.8, top_p=0.95), seed=seed)
        found, wanted = (tokens_of(rounds_of(one, PROMPTS[1], settings)) for one in (pair, expected))
        assert found == wanted


def test_masking_the_draft_is_what_it_is_accepted_for(pair, asked):
    """A draft that does not know the grammar guesses what is forbidden."""

    class Unmasked:
        def __getattr__(self, name):
            return getattr(pair.draft, name)

        def propose(self, batch):
            return pair.draft.propose(
                [replace(job, rules=replace(job.rules, processor=None)) for job in batch]
            )

    totals = np.zeros((2, 2), int)
    for prompt in PROMPTS:
        masked = rounds_of(pair, prompt, asked(SCHEMA))
        unmasked = rounds_of(Pair(pair.target, Unmasked()), prompt, asked(SCHEMA))
        assert tokens_of(masked) == tokens_of(unmasked)
        totals += [accepted_and_drafted(masked), accepted_and_drafted(unmasked)]
    assert totals[0, 0] / totals[0, 1] > 2 * totals[1, 0] / totals[1, 1]


def test_min_tokens_does_not_hold_a_grammars_end_back(pair, asked, grammars, tokenizer):
    """Neither where the grammar ends the answer, nor where it lets EOS do so."""
    rounds = rounds_of(pair, PROMPTS[1], asked({"const": 5}, min_tokens=30))
    assert tokenizer.decode(tokens_of(rounds)) == "5"
    assert rounds[-1].finish_reason is FinishReason.STOP
    eos = dict.fromkeys(tokenizer.eos_token_ids, 50.0)
    steering = Steering(eos, grammar=grammars.lark("start: /[a-h]*/"))
    rounds = rounds_of(pair, PROMPTS[1], asked({}, min_tokens=30, steering=steering))
    assert len(tokens_of(rounds)) == 1
    assert rounds[-1].finish_reason is FinishReason.STOP


def test_max_tokens_cuts_a_grammar(pair, asked):
    rounds = rounds_of(pair, PROMPTS[1], asked(SCHEMA, max_tokens=5))
    assert len(tokens_of(rounds)) == 5
    assert rounds[-1].finish_reason is FinishReason.LENGTH


def test_suffix_guesses_end_before_what_is_forbidden(pair, asked, grammars):
    """What stood in past answers is proposed as far as the grammar has it, and the answer is the target's."""
    proposed = []

    class Watched:
        def __getattr__(self, name):
            return getattr(pair.target, name)

        def verify(self, batch):
            proposed.extend(job.proposal for job in batch)
            return pair.target.verify(batch)

    drafted = accepted = 0
    for prompt in PROMPTS:
        text = tokens_of(rounds_of(Pair(pair.target, None), prompt, asked(SCHEMA)))
        # Right for some tokens, then what no JSON has.
        past = [(token + 1) % 250 if i % 11 == 10 else token for i, token in enumerate(text)]
        index = SuffixIndex(1000)
        index.add_answer([*prompt, *past])
        conversation = Conversation(pair)
        for _ in read_prompt(pair, conversation, prompt):
            pass
        stream = Stream(conversation, asked(SCHEMA), suffix=SuffixText(index, conversation.max_tokens, 12))
        place, state = 0, grammars.json_schema(SCHEMA).start()
        for outcome in decode(Pair(Watched(), pair.draft), stream):
            guesses = [int(token) for token in proposed.pop().tokens]
            if outcome.from_suffix:
                assert state.num_allowed(guesses) == len(guesses)
            drafted += outcome.suffix_drafted_tokens
            accepted += outcome.suffix_accepted_tokens
            assert state.advance(outcome.tokens) == len(outcome.tokens)
            assert outcome.tokens == text[place : place + len(outcome.tokens)]
            place += len(outcome.tokens)
        assert place == len(text)
    assert 0 < accepted < drafted


class TestDistributions:
    """Chi-square of the first two tokens of `[a-h]*`, whose masks are known without the library."""

    @pytest.fixture(scope="class")
    def exact(self, reference, load_pair, tokenizer):
        """p of two tokens [V * V]; where the first is EOS, it stands for both."""
        target = load_pair(reference).target
        allowed = [*(tokenizer.encode(letter)[0] for letter in LETTERS), *sorted(tokenizer.eos_token_ids)]
        mask = np.full(272, -np.inf)
        mask[allowed] = 0
        cache = target.new_cache()
        first = warp(target.logits(cache, PROMPTS[1])[-1:] + mask, PLAIN)[0]
        joint = np.zeros((272, 272))
        for token in allowed:
            if token in tokenizer.eos_token_ids:
                joint[token, token] = first[token]
                continue
            joint[token] = first[token] * warp(target.logits(cache, (token,)) + mask, PLAIN)[0]
            cache.trim(1)
        return joint.ravel()

    def drawn(self, pair, grammar, tokenizer, samples):
        conversation, found = Conversation(pair), []
        eos = frozenset(tokenizer.eos_token_ids)
        for seed in range(samples):
            for _ in read_prompt(pair, conversation, PROMPTS[1]):
                pass
            settings = DecodeSettings(PLAIN, 2, eos, 1, seed, steering=Steering(grammar=grammar))
            tokens = [token for one in decode(pair, Stream(conversation, settings)) for token in one.tokens]
            found.append(tokens[0] * 272 + tokens[-1])
        return found

    def test_answers_follow_the_masked_target(self, backend, pair, grammars, tokenizer, exact):
        samples = 2000 if backend.capabilities().backend == "numpy" else 600
        found = self.drawn(pair, grammars.lark(f"start: /[{LETTERS}]*/"), tokenizer, samples)
        assert p_value(found, exact) > 1e-3

    def test_masking_one_letter_more_is_caught(self, pair, grammars, tokenizer, exact):
        likely = int(np.bincount(np.flatnonzero(exact) // 272, exact[exact > 0])[:256].argmax())
        letters = LETTERS.replace(tokenizer.decode([likely]), "")
        assert len(letters) < len(LETTERS)
        found = self.drawn(pair, grammars.lark(f"start: /[{letters}]*/"), tokenizer, 600)
        assert p_value(found, exact) < 1e-6


words = st.text('abc é"\\', max_size=4)
leaves = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
    st.tuples(st.integers(-50, 0), st.integers(0, 50)).map(
        lambda bounds: {"type": "integer", "minimum": bounds[0], "maximum": bounds[1]}
    ),
    st.integers(0, 5).map(lambda length: {"type": "string", "maxLength": length}),
    st.lists(st.one_of(words, st.integers(-9, 9), st.none()), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
)


def objects(inner):
    def of(properties, optional):
        required = [name for i, name in enumerate(properties) if i >= optional]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    return st.builds(of, st.dictionaries(words, inner, max_size=3), st.integers(0, 3))


def nests(inner):
    arrays = st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 2)
    )
    choices = st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options})
    return st.one_of(objects(inner), arrays, choices)


@given(st.recursive(leaves, nests, max_leaves=4), st.integers(0, 99), st.sampled_from([GREEDY, PLAIN]))
@settings(deadline=None, max_examples=60)
def test_every_answer_is_valid(toy_pair, reference, grammars, plain_text, tokenizer, schema, seed, sampling):
    """These schemas allow no text that is longer than the answer may be: each answer ends by itself."""
    target, draft = toy_pair()
    pair = Pair(*(reference.load(folder, max_kv_cache_tokens=600) for folder in (target, draft)))
    steering = Steering(plain_text, grammar=grammars.json_schema(schema))
    eos = frozenset(tokenizer.eos_token_ids)
    settings = DecodeSettings(sampling, 500, eos, 3, seed, steering=steering)
    rounds = rounds_of(pair, PROMPTS[1], settings)
    assert rounds[-1].finish_reason is FinishReason.STOP
    assert jsonschema_rs.is_valid(schema, json.loads(tokenizer.decode(tokens_of(rounds))))
