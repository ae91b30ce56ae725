"""Rounds that are recorded, with the recording left out: each part is run where a graph would be replayed."""

from __future__ import annotations

import numpy as np
import pytest

from draftloop.backends.base import PrefillJob, ProposeJob, VerifyJob
from draftloop.types import Rules, Sampling

torch = pytest.importorskip("torch")

CACHE_TOKENS = 512
PROMPT = tuple(np.random.default_rng(3).integers(0, 256, 70).tolist())
UNREAD = tuple(np.random.default_rng(4).integers(0, 256, 300).tolist())
NUMBERS = np.random.default_rng(5).random(40).astype(np.float32)
SAMPLINGS = [Sampling(), Sampling(temperature=0.7, top_p=0.9)]


class EagerStep:
    """What a recorded body calls, on one cache."""

    def __init__(self, decoder, cache, tokens):
        self.decoder, self.cache = decoder, cache
        self.tokens = torch.zeros(16, dtype=torch.long)
        self.tokens[: len(tokens)] = tokens

    def logits(self, rows):
        ids = self.tokens[:rows].clone()
        return self.decoder.head(self.decoder.forward_batch([self.cache], [ids]))

    def follow(self, tokens, num_read):
        self.tokens[: len(tokens)] = tokens


class EagerSteps:
    """As `GraphedSteps`, without graphs."""

    max_rows = 16

    def __init__(self, decoder):
        self.decoder = decoder
        self.rows_read = []

    def logits(self, cache, tokens):
        self.rows_read.append(len(tokens))
        return EagerStep(self.decoder, cache, tokens).logits(len(tokens))

    def run(self, parts, cache, tokens, *, inputs, num_read):
        assert len(tokens) <= self.max_rows
        before, step = cache.position, EagerStep(self.decoder, cache, tokens)
        for part in parts:
            outputs = part.body(step, inputs)
        assert cache.position == before + num_read
        assert len({part.key for part in parts}) <= 2
        return outputs


@pytest.fixture
def models(toy_folder, monkeypatch):
    """The same toy, step by step and as if its rounds were recorded."""
    from draftloop.backends.torch import backend

    folder = toy_folder()
    plain = backend.TorchBackend("cpu").load(folder, max_kv_cache_tokens=CACHE_TOKENS)
    monkeypatch.setattr(backend, "graphed_steps", lambda decoder, _: EagerSteps(decoder))
    return plain, backend.TorchBackend("cpu").load(folder, max_kv_cache_tokens=CACHE_TOKENS)


def filled(model):
    cache = model.new_cache()
    model.prefill([PrefillJob(cache, PROMPT)])
    return cache


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("unread", [1, 2, 5, 16, 17, 40, 300])
def test_recorded_drafts_are_those_drawn_step_by_step(models, unread, sampling):
    caches = [filled(model) for model in models]
    for k in (4, 1, 20):
        jobs = [
            ProposeJob(cache, UNREAD[:unread], k, Rules(sampling), NUMBERS[:k], UNREAD) for cache in caches
        ]
        plain, recorded = (model.propose([job])[0] for model, job in zip(models, jobs, strict=True))
        assert recorded.tokens.tolist() == plain.tokens.tolist()
        assert (recorded.q is None) == (plain.q is None) == sampling.greedy
        if plain.q is not None:
            torch.testing.assert_close(recorded.q, plain.q)
        assert caches[0].position == caches[1].position
        for cache in caches:
            cache.trim(cache.position - len(PROMPT))


def test_a_proposal_outlives_the_next_one(models):
    _, model = models
    cache = filled(model)
    first, second = (
        model.propose([ProposeJob(cache, (token,), 4, Rules(SAMPLINGS[1]), NUMBERS[:4])])[0]
        for token in (5, 6)
    )
    again = filled(model)
    alone = model.propose([ProposeJob(again, (5,), 4, Rules(SAMPLINGS[1]), NUMBERS[:4])])[0]
    assert first.tokens.tolist() == alone.tokens.tolist() != second.tokens.tolist()
    torch.testing.assert_close(first.q, alone.q)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_recorded_verification_decides_as_the_plain_one(models, sampling):
    verdicts = []
    for model in models:
        proposal = model.propose([ProposeJob(filled(model), (5,), 4, Rules(sampling), NUMBERS[:4])])[0]
        job = VerifyJob(filled(model), 5, proposal, Rules(sampling), NUMBERS[4:8], NUMBERS[8:13])
        verdicts.append(model.verify([job])[0])
    plain, recorded = verdicts
    assert (recorded.drafted_tokens, recorded.accepted_tokens) == (
        plain.drafted_tokens,
        plain.accepted_tokens,
    )
    assert recorded.extra_token == plain.extra_token
    assert recorded.alphas == pytest.approx(plain.alphas, abs=1e-5)
