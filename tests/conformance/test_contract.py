"""The seam's bookkeeping: positions after each call, shapes of what comes back, masks, batches."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.errors import OutOfMemory
from draftloop.types import Rules, Sampling, TokenKind

PROMPT = tuple(range(20, 32))
SAMPLED = Rules(Sampling(temperature=1.0))
GREEDY = Rules(Sampling())


@pytest.fixture(scope="session")
def pair(backend, load_pair):
    return load_pair(backend)


def uniforms(count, seed=0):
    return np.random.default_rng(seed).random(count, dtype=np.float32)


def read(model, tokens=PROMPT):
    cache = model.new_cache()
    model.prefill([PrefillJob(cache, tokens)])
    return cache


@pytest.mark.parametrize("rules", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("unread", [(7,), (7, 8), (7, 8, 9, 10)])
def test_propose_reads_the_unread_and_its_own_first_tokens(pair, rules, k, unread):
    cache = read(pair.draft)
    proposal = pair.draft.propose([ProposeJob(cache, unread, k, rules, uniforms(k))])[0]
    assert cache.position == len(PROMPT) + len(unread) + k - 1
    assert proposal.num_tokens == k
    assert tuple(proposal.tokens.shape) == (k,)
    if rules is GREEDY:
        assert proposal.q is None
    else:
        assert tuple(proposal.q.shape) == (k, pair.draft.architecture.vocab_size)
        q = proposal.q.cpu() if hasattr(proposal.q, "cpu") else proposal.q
        np.testing.assert_allclose(np.array(q).sum(axis=1), 1, atol=1e-4)


def test_what_propose_read_is_the_text(pair):
    """After the guesses are trimmed the cache is as if they had never been."""
    cache = read(pair.draft)
    pair.draft.propose([ProposeJob(cache, (7, 8), 4, SAMPLED, uniforms(4))])
    cache.trim(3)
    found = pair.draft.logits(cache, (9,))
    expected = pair.draft.logits(read(pair.draft, (*PROMPT, 7, 8)), (9,))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("rules", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_verify_reads_last_and_the_proposal(pair, rules, k):
    cache = read(pair.target)
    proposal = NO_PROPOSAL
    if k:
        proposal = pair.draft.propose([ProposeJob(read(pair.draft), (7,), k, rules, uniforms(k))])[0]
    verdict = pair.target.verify([VerifyJob(cache, 7, proposal, rules, uniforms(k), uniforms(k + 1))])[0]
    assert cache.position == len(PROMPT) + k + 1
    assert len(verdict.drafted_tokens) == k
    assert 0 <= verdict.accepted_tokens <= k
    assert len(verdict.alphas) == min(verdict.accepted_tokens + 1, k)
    assert all(0 <= alpha <= 1 + 1e-5 for alpha in verdict.alphas)
    assert all(type(token) is int for token in (*verdict.tokens, *verdict.drafted_tokens))
    assert verdict.trace is None
    assert len(verdict.tokens) == verdict.accepted_tokens + 1
    # Keep what was emitted but its last token, as the core does: the cache is then the text's.
    cache.trim(k - verdict.accepted_tokens)
    text = (*PROMPT, 7, *verdict.tokens[:-1])
    np.testing.assert_allclose(
        pair.target.logits(cache, verdict.tokens[-1:]),
        pair.target.logits(read(pair.target, text), verdict.tokens[-1:]),
        atol=1e-3,
    )


def test_all_kinds_of_extra_tokens_occur(pair):
    seen = set()
    for seed in range(20):
        proposal = pair.draft.propose([ProposeJob(read(pair.draft), (7,), 1, SAMPLED, uniforms(1, seed))])[0]
        job = VerifyJob(read(pair.target), 7, proposal, SAMPLED, uniforms(1, seed + 50), uniforms(2, seed))
        seen.update(pair.target.verify([job])[0].kinds)
    assert seen == {TokenKind.ACCEPTED, TokenKind.RECOVERED, TokenKind.BONUS}


def test_a_batch_is_its_sequences_alone(pair):
    """Of different lengths and widths, by rules that some share; with and without a trace."""
    lengths, widths, traced = (3, 12, 7, 9, 5, 4), (2, 4, 1, 4, 1, 3), (True, True, False, True, True, True)
    masked = Rules(Sampling(temperature=0.7, top_p=0.9), masked_ids=(4,), masked_rows=1)
    rules = (SAMPLED, GREEDY, masked, SAMPLED, GREEDY, masked)

    def jobs(i):
        prompt = PROMPT[: lengths[i]]
        k = widths[i]
        draft_job = ProposeJob(read(pair.draft, prompt), (7,), k, rules[i], uniforms(k, i))
        return draft_job, read(pair.target, prompt)

    def verify_job(i, cache, proposal):
        k = widths[i]
        return VerifyJob(cache, 7, proposal, rules[i], uniforms(k, i), uniforms(k + 1, i), trace=traced[i])

    prepared = [jobs(i) for i in range(6)]
    proposals = pair.draft.propose([draft_job for draft_job, _ in prepared])
    together = pair.target.verify([verify_job(i, prepared[i][1], proposals[i]) for i in range(6)])
    for i in range(6):
        draft_job, cache = jobs(i)
        alone = pair.target.verify([verify_job(i, cache, pair.draft.propose([draft_job])[0])])[0]
        assert together[i].tokens == alone.tokens
        assert together[i].drafted_tokens == alone.drafted_tokens
        assert together[i].alphas == pytest.approx(alone.alphas, abs=1e-4)
        assert (together[i].trace is not None) == traced[i]
        if together[i].trace is not None:
            for found, wanted in zip(astuple(together[i].trace), astuple(alone.trace), strict=True):
                assert found.shape == wanted.shape
                np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masked_tokens_never_appear_in_masked_rows(pair, temperature):
    """Neither drafted nor drawn: masks act on q and on p, row by row."""
    vocab_size = pair.target.architecture.vocab_size
    allowed = {11, 60, 61, 200}
    masked = tuple(i for i in range(vocab_size) if i not in allowed)
    rules = Rules(Sampling(temperature=temperature), masked_ids=masked, masked_rows=2)
    later = set()
    for seed in range(20):
        job = ProposeJob(read(pair.draft), (seed,), 4, rules, uniforms(4, seed))
        proposal = pair.draft.propose([job])[0]
        verdict = pair.target.verify(
            [VerifyJob(read(pair.target), seed, proposal, rules, uniforms(4, seed), uniforms(5, seed))]
        )[0]
        assert set(verdict.drafted_tokens[:2]) <= allowed
        assert set(verdict.tokens[:2]) <= allowed
        later.update(verdict.drafted_tokens[2:])
    assert not later <= allowed


def test_masks_end_with_their_last_row(pair):
    """The greedy text's second token is masked in one row, and comes; masked in two, and does not."""
    best = pair.target.logits(read(pair.target), (7,))[-1].argmax()
    second = pair.target.logits(read(pair.target), (7, best))[-1].argmax()
    guess = Proposal(tokens=(int(best),), q=None, num_tokens=1)
    for masked_rows, comes in ((1, True), (2, False)):
        rules = Rules(Sampling(), masked_ids=(int(second),), masked_rows=masked_rows)
        job = VerifyJob(read(pair.target), 7, guess, rules, uniforms(1), uniforms(2))
        tokens = pair.target.verify([job])[0].tokens
        assert tokens[0] == best != second
        assert (tokens[1] == second) == comes


def test_a_masked_guess_from_the_host_is_rejected(pair):
    rules = Rules(Sampling(temperature=1.0), masked_ids=(9,), masked_rows=1)
    zeros = np.zeros(2, np.float32)
    guess = Proposal(tokens=(9,), q=None, num_tokens=1)
    verdict = pair.target.verify([VerifyJob(read(pair.target), 7, guess, rules, zeros[:1], zeros)])[0]
    assert (verdict.accepted_tokens, verdict.alphas) == (0, (0.0,))
    assert verdict.extra_token != 9


def test_masks_of_ids_that_the_model_lacks_do_nothing(pair):
    masked = Rules(Sampling(), masked_ids=(5000,), masked_rows=9)
    zeros = np.zeros(1, np.float32)

    def told(rules):
        return pair.target.verify([VerifyJob(read(pair.target), 7, NO_PROPOSAL, rules, zeros[:0], zeros)])[0]

    assert told(masked) == told(GREEDY)
    job = ProposeJob(read(pair.draft), (7,), 2, masked, uniforms(2))
    assert pair.draft.propose([job])[0].num_tokens == 2


def test_propose_and_verify_honour_the_cap(pair):
    cache = read(pair.target, [3] * 126)
    guess = Proposal(tokens=(1, 2), q=None, num_tokens=2)
    with pytest.raises(ValueError, match="128"):
        pair.target.verify([VerifyJob(cache, 7, guess, GREEDY, uniforms(2), uniforms(3))])
    draft_cache = read(pair.draft, [3] * 126)
    with pytest.raises(ValueError, match="128"):
        pair.draft.propose([ProposeJob(draft_cache, (7,), 4, GREEDY, uniforms(4))])


class WithoutMemory:
    """A processor for which there is none at its `calls`th call."""

    def __init__(self, width, calls):
        self.row, self.left = np.zeros(width, np.float32), calls

    def bias(self, drafted):
        self.left -= 1
        if not self.left:
            raise OutOfMemory("memory ran out", remedy="Wait.")
        return self.row


@pytest.mark.parametrize("calls", [1, 3])
def test_a_step_without_memory_can_be_made_again(pair, calls):
    """Two sequences; what was counted by then is trimmed off, and the step gives what it would have given."""
    k, width = 4, pair.target.architecture.vocab_size

    def made(calls):
        rules = [Rules(SAMPLED.sampling, processor=WithoutMemory(width, left)) for left in (0, calls)]
        drafts, targets = ([read(model) for _ in rules] for model in (pair.draft, pair.target))

        def drafted():
            jobs = zip(drafts, rules, strict=True)
            return pair.draft.propose([ProposeJob(one, (7, 8), k, own, uniforms(k)) for one, own in jobs])

        def verified(proposals):
            return pair.target.verify(
                [
                    VerifyJob(one, 8, proposal, own, uniforms(k, 1), uniforms(k + 1, 2))
                    for one, proposal, own in zip(targets, proposals, rules, strict=True)
                ]
            )

        def again(step, caches):
            held = [cache.position for cache in caches]
            if calls:
                with pytest.raises(OutOfMemory):
                    step()
            for cache, position in zip(caches, held, strict=True):
                cache.trim(cache.position - position)
            return step()

        proposals = again(drafted, drafts)
        rules[1].processor.left = calls
        verdicts = again(lambda: verified(proposals), targets)
        return [verdict.tokens for verdict in verdicts], [verdict.drafted_tokens for verdict in verdicts]

    assert made(calls) == made(0)
