"""Rounds that are recorded, with the recording left out: each part is run where a graph would be replayed."""

from __future__ import annotations

import numpy as np
import pytest

from draftloop.backends.base import PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.types import Rules, Sampling

torch = pytest.importorskip("torch")

from draftloop.backends.torch.cuda.graphs import GraphedSteps  # noqa: E402
from draftloop.backends.torch.cuda.shapes import MAX_ROWS, MAX_SEQUENCES, Shape  # noqa: E402

CACHE_TOKENS = 512
PROMPT = tuple(np.random.default_rng(3).integers(0, 256, 70).tolist())
UNREAD = tuple(np.random.default_rng(4).integers(0, 256, 300).tolist())
NUMBERS = np.random.default_rng(5).random(40).astype(np.float32)
SAMPLINGS = [Sampling(), Sampling(temperature=0.7, top_p=0.9)]


class EagerStep:
    """What a recorded body calls, on some caches; rows that are nobody's are zero."""

    def __init__(self, decoder, readings, tokens, sizes):
        self.decoder, self.readings, self.sizes = decoder, readings, sizes
        self.tokens = torch.zeros(MAX_ROWS, dtype=torch.long)
        self.tokens[: len(tokens)] = tokens
        self.first_rows = torch.zeros(MAX_SEQUENCES, dtype=torch.long)
        self.last_rows = torch.zeros(MAX_SEQUENCES, dtype=torch.long)
        counts = torch.tensor([one.count for one in readings])
        self.last_rows[: len(counts)] = counts.cumsum(0) - 1
        self.first_rows[: len(counts)] = counts.cumsum(0) - counts
        self.going_on = [one.steps_after for one in readings]

    def pass_over(self, caches, tokens):
        return self.decoder.head(self.decoder.forward_batch(caches, tokens))

    def read(self, shape):
        self.logits(shape)

    def logits(self, shape):
        self.sizes.append(shape)
        counts = [one.count for one in self.readings]
        found = self.pass_over(
            [one.cache for one in self.readings], self.tokens[: sum(counts)].clone().split(counts)
        )
        return torch.nn.functional.pad(found, (0, 0, 0, shape.rows - len(found)))

    def next_logits(self, shape):
        who = [i for i, steps in enumerate(self.going_on) if steps > 0]
        self.going_on = [steps - 1 for steps in self.going_on]
        found = self.pass_over(
            [self.readings[i].cache for i in who], [self.tokens[i : i + 1].clone() for i in who]
        )
        return torch.zeros(shape.sequences, found.shape[1]).index_copy(0, torch.tensor(who), found)


class EagerSteps(GraphedSteps):
    """As `GraphedSteps`, without graphs."""

    def __init__(self, decoder, max_tokens):
        super().__init__(decoder, None, max_tokens)
        self.decoder = decoder
        self.sizes = []

    def wait(self):
        pass

    def run(self, parts, readings, tokens, *, inputs):
        before = [one.cache.position for one in readings]
        step = EagerStep(self.decoder, readings, tokens, self.sizes)
        for part in parts:
            outputs = part.body(step, inputs)
        assert [one.cache.position for one in readings] == [
            start + one.num_tokens for start, one in zip(before, readings, strict=True)
        ]
        assert len({part.key for part in parts}) <= 2
        return outputs


@pytest.fixture
def models(toy_folder, monkeypatch):
    """The same toy, step by step and as if its rounds were recorded."""
    from draftloop.backends.torch import backend

    folder = toy_folder()
    plain = backend.TorchBackend("cpu").load(folder, max_kv_cache_tokens=CACHE_TOKENS)
    monkeypatch.setattr(backend, "graphed_steps", EagerSteps)
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


MASKED = tuple(range(0, 256, 2))
"""Tokens that a minimum length keeps away for some rows: so many that one row too many would be seen."""


def propose_jobs(caches, sampling):
    """Of each sequence: what is unread, K, and in how many rows tokens are masked."""
    numbers = np.random.default_rng(8).random((8, 8)).astype(np.float32)
    return [
        ProposeJob(cache, UNREAD[i : i + unread], k, Rules(sampling, MASKED, masked), numbers[i, :k])
        for i, (cache, (unread, k, masked)) in enumerate(
            zip(caches, [(1, 3, 0), (2, 5, 2), (1, 1, 9), (17, 4, 0), (2, 2, 1)], strict=True)
        )
    ]


def verify_jobs(caches, proposals, sampling, trace):
    numbers = np.random.default_rng(9).random((8, 2, 8)).astype(np.float32)
    guessed = [proposals[0], Proposal((5, 6), None, 2), proposals[1], Proposal((), None, 0), proposals[2]]
    return [
        VerifyJob(
            cache,
            UNREAD[i],
            one,
            Rules(sampling, MASKED, masked),
            numbers[i, 0, : one.num_tokens],
            numbers[i, 1, : one.num_tokens + 1],
            trace=trace,
        )
        for i, (cache, one, masked) in enumerate(zip(caches, guessed, (0, 2, 1, 0, 9), strict=True))
    ]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sequences_that_draft_together_share_steps_and_get_what_they_get_alone(models, sampling):
    plain, recorded = models
    caches = [[filled(model) for _ in range(5)] for model in models]
    alone = [plain.propose([job])[0] for job in propose_jobs(caches[0], sampling)]
    together = recorded.propose(propose_jobs(caches[1], sampling))
    for one, other in zip(together, alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        if not sampling.greedy:
            torch.testing.assert_close(one.q, other.q, atol=1e-5, rtol=1e-4)
    assert [cache.position for cache in caches[1]] == [cache.position for cache in caches[0]]
    # The fourth one's backlog is read before; then one pass of 7 rows serves all, and so does its series.
    assert recorded._steps.sizes[-1] == Shape(8, 8)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sequences_that_are_verified_together_get_the_verdicts_that_they_get_alone(models, sampling, trace):
    plain, recorded = models
    proposals = plain.propose(propose_jobs([filled(plain) for _ in range(5)], sampling))
    alone = [
        plain.verify([job])[0]
        for job in verify_jobs([filled(plain) for _ in range(5)], proposals, sampling, trace)
    ]
    jobs = verify_jobs([filled(recorded) for _ in range(5)], proposals, sampling, trace)
    recorded._steps.sizes.clear()
    together = recorded.verify(jobs)
    assert recorded._steps.sizes == [Shape(16, 8)]
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        assert one.drafted_tokens == other.drafted_tokens
        assert one.alphas == pytest.approx(other.alphas, abs=1e-5)
        assert (one.trace is None) is not trace
        if trace:
            np.testing.assert_array_equal(one.trace.top_ids[:, :8], other.trace.top_ids[:, :8])
            np.testing.assert_array_equal(one.trace.draft_ids, other.trace.draft_ids)
            np.testing.assert_allclose(one.trace.draft_probs, other.trace.draft_probs, atol=1e-5)
            np.testing.assert_allclose(one.trace.tail_mass, other.trace.tail_mass, atol=1e-4)


def test_sequences_that_are_treated_differently_take_steps_of_their_own(models):
    _, model = models
    kinds = [(SAMPLINGS[0], False), (SAMPLINGS[1], False), (SAMPLINGS[0], True), (SAMPLINGS[0], False)]
    numbers = np.zeros(1, np.float32)
    jobs = [
        VerifyJob(filled(model), i, Proposal((), None, 0), Rules(sampling), numbers[:0], numbers, trace=trace)
        for i, (sampling, trace) in enumerate(kinds)
    ]
    alone = [
        model.verify([VerifyJob(filled(model), i, *_rest(job))])[0].extra_token for i, job in enumerate(jobs)
    ]
    model._steps.sizes.clear()
    assert [one.extra_token for one in model.verify(jobs)] == alone
    assert model._steps.sizes == [Shape(2, 2), Shape(1, 1), Shape(1, 1)]


def _rest(job):
    return job.proposal, job.rules, job.accept_uniforms, job.extra_uniforms, job.trace


def test_more_sequences_than_a_step_holds_take_several(models):
    plain, model = models
    numbers = np.zeros(8, np.float32)

    def jobs(which):
        proposal = Proposal((1, 2, 3), None, 3)
        return [
            VerifyJob(filled(which), i, proposal, Rules(SAMPLINGS[0]), numbers[:3], numbers[:4])
            for i in range(MAX_SEQUENCES + 3)
        ]

    wanted, asked = [one.tokens for one in plain.verify(jobs(plain))], jobs(model)
    model._steps.sizes.clear()
    assert [one.tokens for one in model.verify(asked)] == wanted
    assert model._steps.sizes == [Shape(MAX_ROWS, MAX_SEQUENCES), Shape(16, 4)]


def test_texts_are_read_by_pieces_of_few_sizes(models):
    _, model = models
    for tokens in (UNREAD, UNREAD[:130], UNREAD[:7]):
        caches = [which.new_cache() for which in models]
        model._steps.sizes.clear()
        for which, cache in zip(models, caches, strict=True):
            which.prefill([PrefillJob(cache, tokens)])
        assert caches[1].position == len(tokens)
        copies = [cache.copy(len(tokens)) for cache in caches]
        torch.testing.assert_close(*copies, atol=1e-4, rtol=1e-4)
        assert {shape.rows for shape in model._steps.sizes} <= {2**i for i in range(8)}
