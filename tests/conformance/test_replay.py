"""`Model.replay`: alpha at each response row, as the reference has it and as decoding measured it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from examples import (
    GREEDY,
    PLAIN,
    RULES,
    example_of,
    example_of_traces,
    one_of_each,
    random_example,
    random_lora,
    random_prompt,
    rounds_of,
    written_by,
)

from draftloop.backends.lora import AdapterForm
from draftloop.backends.numpy.acceptance import warp
from draftloop.speculation.stream import DecodeSettings
from draftloop.types import Rules, Sampling

SMALL = {
    "vocab_size": 64,
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
}


@pytest.fixture(scope="session")
def target(reference, load_pair):
    """The reference's toy target."""
    return load_pair(reference).target


@pytest.fixture(scope="session")
def examples(target):
    """One text for each kind of rules."""
    return one_of_each(target)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
def test_alphas_equal_the_references(backend, reference, load_pair, examples, name, adapted):
    example = examples[list(RULES).index(name)]
    told = []
    for one in (backend, reference):
        draft = load_pair(one).draft
        if adapted:
            draft.set_adapter(random_lora(draft.architecture, gain=0.2), AdapterForm.UNFUSED)
        told.append(draft.replay([example])[0])
    found, expected = told
    assert found.shape == (example.num_rows,)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize("name", RULES)
def test_the_reference_is_alpha_itself(reference, load_pair, name):
    """Σ min(p, q) over the whole vocabulary; above it by no more than the smaller tail."""
    pair, rules = load_pair(reference), RULES[name]
    example = written_by(pair.target, random_prompt(9, 6), rules, 30)
    tokens = example.tokens[:-1].tolist()
    p, q = (
        warp(m.logits(m.new_cache(), tokens)[5:], rules.sampling, rules.masked_ids, rules.masked_rows)
        for m in (pair.target, pair.draft)
    )
    above = pair.draft.replay([example])[0] - np.minimum(p, q).sum(axis=1)
    tails = np.minimum(*(1 - np.take_along_axis(x, example.top_ids, axis=1).sum(axis=1) for x in (p, q)))
    allowed = 0 if rules.sampling.greedy else np.maximum(tails, 0)
    assert (above >= -1e-5).all()
    assert (above <= allowed + 1e-5).all()


def test_a_batch_is_its_examples_alone(backend, load_pair, examples):
    draft = load_pair(backend).draft
    together = draft.replay(examples)
    assert [len(rows) for rows in together] == [one.num_rows for one in examples]
    for example, rows in zip(examples, together, strict=True):
        np.testing.assert_allclose(rows, draft.replay([example])[0], atol=1e-4)


LONG_RULES = {
    "greedy": Rules(Sampling(), masked_ids=tuple(range(0, 64, 2)), masked_rows=130),
    "plain": PLAIN,
    "filtered": Rules(
        Sampling(temperature=0.8, top_p=0.9), masked_ids=tuple(range(0, 64, 2)), masked_rows=130
    ),
}


@pytest.mark.parametrize("name", LONG_RULES)
def test_a_text_may_be_longer_than_a_cache(backend, reference, load_toy, name):
    """Training reads up to `max_sequence_length`, whatever the caches hold, and in pieces where it must."""
    example = random_example(LONG_RULES[name], num_prompt_tokens=400, num_rows=200, vocab_size=64)
    found, expected = (load_toy(one, **SMALL).replay([example])[0] for one in (backend, reference))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert 0 < expected.mean() < 1


def test_rows_may_have_fewer_top_tokens(backend, reference, load_toy):
    batch = [
        random_example(PLAIN, num_prompt_tokens=4, num_rows=6, vocab_size=64, num_top=n, seed=n)
        for n in (1, 32, 5)
    ]
    told = [load_toy(one, **SMALL).replay(batch) for one in (backend, reference)]
    for found, expected in zip(*told, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_text_without_an_answer_has_no_alpha(backend, load_toy, reference):
    """Beside others it takes nobody's place."""
    batch = [
        random_example(PLAIN, num_prompt_tokens=9 - rows, num_rows=rows, vocab_size=64, seed=rows)
        for rows in (3, 0, 2)
    ]
    found = load_toy(backend, **SMALL).replay(batch)
    expected = load_toy(reference, **SMALL).replay([batch[0], batch[2]])
    assert [len(rows) for rows in found] == [3, 0, 2]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-3)


def test_replay_leaves_nothing_behind(backend, load_pair, examples):
    """Between two pieces of a conversation, as the gate may come."""
    draft = load_pair(backend).draft
    cache, tokens = draft.new_cache(), random_prompt(1, 20)
    first = draft.logits(cache, tokens[:10])
    draft.replay(examples)
    found = np.concatenate([first, draft.logits(cache, tokens[10:])])
    np.testing.assert_allclose(found, draft.logits(draft.new_cache(), tokens), atol=1e-3)


def test_a_one_token_prompt_is_replayed_whole(backend, reference, load_pair, target):
    example = written_by(target, (7,), PLAIN, 8)
    found, expected = (load_pair(one).draft.replay([example])[0] for one in (backend, reference))
    assert len(found) == 8
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("widths", [(272, 256), (256, 272)], ids=["target wider", "draft wider"])
@pytest.mark.parametrize("rules", [GREEDY, PLAIN], ids=["greedy", "plain"])
def test_vocabularies_may_differ_by_padding(backend, reference, load_toy, widths, rules):
    example = example_of(
        load_toy(reference, vocab_size=widths[0]),
        (*random_prompt(4, 20), min(271, widths[0] - 1)),
        8,
        rules,
    )
    top = example.top_ids.copy()
    top[:, -1] = widths[0] - 1
    example = replace(example, top_ids=top)
    found, expected = (
        load_toy(one, vocab_size=widths[1]).replay([example])[0] for one in (backend, reference)
    )
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize(
    ("sampling", "min_tokens"),
    [
        (Sampling(), 1),
        (Sampling(), 12),
        (Sampling(temperature=1.0), 1),
        (Sampling(temperature=0.7, top_k=12, top_p=0.9), 1),
        (Sampling(temperature=1.3, top_k=8, min_p=0.02), 12),
    ],
    ids=["greedy", "greedy masked", "plain", "filtered", "filtered masked"],
)
def test_replay_tells_what_decoding_measured(backend, load_pair, sampling, min_tokens, adapted):
    """An answer's own traces, as an example: at every tested position the alpha of its round.

    At temperature 1 the trace lumps the tail together, so replay is above the measured alpha by no
    more than the tail's mass.
    """
    pair = load_pair(backend)
    if adapted:
        lora = random_lora(pair.draft.architecture, gain=0.1)
        pair.draft.set_adapter(lora, AdapterForm.UNFUSED)
    eos = frozenset(range(0, 272, 30))
    settings = DecodeSettings(sampling, 24, eos, 3, seed=2, min_tokens=min_tokens, trace=True)
    tested = 0
    for seed in range(2):
        prompt = random_prompt(seed, 8)
        rounds = rounds_of(pair, prompt, settings)
        example = example_of_traces(prompt, rounds, settings)
        replayed, start = pair.draft.replay([example])[0], 0
        for outcome in rounds:
            here = slice(start, start + len(outcome.alphas))
            above = replayed[here] - np.array(outcome.alphas)
            exact = sampling.greedy or sampling.top_k
            allowed = 0.0 if exact else example.tail_probs[here]
            assert (above >= -2e-3).all()
            assert (above <= allowed + 2e-3).all()
            tested += len(outcome.alphas)
            start += len(outcome.tokens)
    assert tested > 10
