"""Warping, drawing and the accept / recover / bonus rule: every backend decides as the reference decides."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from draftloop.backends.base import NO_PROPOSAL, PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.backends.numpy.acceptance import warp
from draftloop.types import Rules, Sampling, TokenKind

PROMPT = tuple(np.random.default_rng(3).integers(0, 64, 12).tolist())
LAST = 17
VOCABULARY = 64
SMALL = {
    "vocab_size": VOCABULARY,
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
}
WIDTHS = {"same": None, "wider": 96, "narrower": 48}

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
    top_p=st.sampled_from([0.05, 0.5, 0.83, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 31, 200]),
    min_p=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
)
masks = st.tuples(st.frozensets(st.integers(0, VOCABULARY - 1), max_size=40), st.integers(0, 8))
quick = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Bench:
    """One pair with both caches at `PROMPT`; every call leaves them there again."""

    def __init__(self, pair):
        self.target, self.draft = pair.target, pair.draft
        self.target_cache, self.draft_cache = self.target.new_cache(), self.draft.new_cache()
        self.target.prefill([PrefillJob(self.target_cache, PROMPT)])
        self.draft.prefill([PrefillJob(self.draft_cache, PROMPT)])

    def propose(self, rules, uniforms):
        job = ProposeJob(self.draft_cache, (LAST,), len(uniforms), rules, uniforms)
        proposal = self.draft.propose([job])[0]
        self.draft_cache.trim(self.draft_cache.position - len(PROMPT))
        return proposal

    def verify(self, rules, proposal, accept_uniforms, extra_uniforms, trace=False):
        job = VerifyJob(self.target_cache, LAST, proposal, rules, accept_uniforms, extra_uniforms, trace)
        verdict = self.target.verify([job])[0]
        self.target_cache.trim(self.target_cache.position - len(PROMPT))
        return verdict

    def round(self, rules, k, seed, trace=False, shift=0.0):
        """Propose and verify with uniforms of `seed`, all moved by `shift`."""
        values = np.random.default_rng(seed).random(3 * k + 1, dtype=np.float32)
        moved = np.clip(values + np.float32(shift), 0, np.float32(1 - 2**-24))
        proposal = self.propose(rules, moved[:k])
        return self.verify(rules, proposal, moved[k : 2 * k], moved[2 * k :], trace)

    def target_probs(self, tokens, rules):
        """[T + 1, V] the target's warped distributions behind LAST and each of `tokens`."""
        logits = self.target.logits(self.target_cache, (LAST, *tokens))
        self.target_cache.trim(len(tokens) + 1)
        return warp(logits, rules.sampling, rules.masked_ids, rules.masked_rows)


@pytest.fixture(scope="session")
def bench(backend, load_pair):
    return Bench(load_pair(backend, **SMALL))


@pytest.fixture(scope="session")
def reference_bench(reference, load_pair):
    return Bench(load_pair(reference, **SMALL))


def assert_same_verdict(found, bench, rules, k, seed):
    """Equal to the reference's; a different choice only where a uniform lies within 1e-5 of a boundary."""
    near = [bench.round(rules, k, seed, shift=shift) for shift in (0.0, -1e-5, 1e-5)]
    matching = [verdict for verdict in near if verdict.tokens == found.tokens]
    assert matching, f"{found} is none of {near}"
    assert matching[0].drafted_tokens == found.drafted_tokens
    assert found.alphas == pytest.approx(matching[0].alphas, abs=1e-3)


@given(sampling=samplings, mask=masks, k=st.integers(1, 6), seed=st.integers(0, 2**32))
@quick
def test_rounds_equal_the_references(bench, reference_bench, sampling, mask, k, seed):
    rules = Rules(sampling, tuple(sorted(mask[0])), mask[1])
    assert_same_verdict(bench.round(rules, k, seed), reference_bench, rules, k, seed)


@pytest.mark.parametrize("width", WIDTHS)
def test_vocabularies_may_differ_by_padding(backend, reference, load_pair, width):
    options = {**SMALL, "draft_vocab_size": WIDTHS[width]}
    mine, expected = Bench(load_pair(backend, **options)), Bench(load_pair(reference, **options))
    drafted = set()
    for seed in range(30):
        rules = Rules(Sampling(temperature=1.5))
        found = mine.round(rules, 3, seed)
        drafted.update(found.drafted_tokens)
        assert max(found.tokens) < VOCABULARY
        assert_same_verdict(found, expected, rules, 3, seed)
    assert (max(drafted) >= VOCABULARY) == (width == "wider")


@given(sampling=samplings, mask=masks, k=st.integers(0, 4), seed=st.integers(0, 2**32), trace=st.booleans())
@quick
def test_host_tokens_are_point_masses(bench, reference_bench, sampling, mask, k, seed, trace):
    """Guesses without q, as a suffix match makes them: d is kept with probability p(d)."""
    random = np.random.default_rng(seed)
    tokens = tuple(random.integers(0, VOCABULARY, k).tolist())
    uniforms = random.random(2 * k + 1, dtype=np.float32)
    rules = Rules(sampling, tuple(sorted(mask[0])), mask[1])
    proposal = Proposal(tokens=tokens, q=None, num_tokens=k)
    found = bench.verify(rules, proposal, uniforms[:k], uniforms[k:], trace)
    p = reference_bench.target_probs(tokens, rules)
    guessed = p[np.arange(k), list(tokens)]
    kept = int(np.cumprod(uniforms[:k] < guessed).sum())
    assert found.drafted_tokens == tokens
    assert found.accepted_tokens == kept
    assert found.alphas == pytest.approx(guessed[: min(kept + 1, k)], abs=1e-3)
    if kept < k:
        assert found.extra_token != tokens[kept]
    assert p[kept, found.extra_token] > 0


@given(sampling=samplings, mask=masks, seed=st.integers(0, 2**32))
@quick
def test_the_target_alone_draws_from_p(bench, reference_bench, sampling, mask, seed):
    """K = 0: the inverse CDF of p at the one uniform."""
    uniform = np.random.default_rng(seed).random(1, dtype=np.float32)
    rules = Rules(sampling, tuple(sorted(mask[0])), mask[1])
    found = bench.verify(rules, NO_PROPOSAL, uniform[:0], uniform)
    cumulative = reference_bench.target_probs((), rules)[0].cumsum()
    assert (found.accepted_tokens, found.alphas, found.drafted_tokens) == (0, (), ())
    assert found.kinds == (TokenKind.TARGET,)
    below = cumulative[found.extra_token - 1] if found.extra_token else 0.0
    assert below - 1e-5 <= uniform[0] <= cumulative[found.extra_token] + 1e-5


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_uniforms_never_draw_a_token_without_mass(bench, reference_bench, uniform):
    rules = Rules(Sampling(temperature=1.0, top_k=7), masked_ids=(0, 1, 62, 63), masked_rows=9)
    extremes = np.full(5, uniform, np.float32)
    found = bench.verify(rules, bench.propose(rules, extremes[:4]), extremes[:4], extremes)
    p = reference_bench.target_probs(found.tokens, rules)
    for row, token in enumerate(found.tokens):
        assert p[row, token] > 0


def test_top_p_keeps_the_token_that_crosses(bench, reference_bench):
    """Behind a top-p just below the likeliest token's mass one token is left; just above it, two."""
    plain = reference_bench.target_probs((), Rules(Sampling(temperature=1.0)))[0]
    first, second = np.argsort(-plain)[:2].tolist()
    nearly_one = np.full(1, 1 - 2**-24, np.float32)
    nothing = nearly_one[:0]
    for top_p, kept in ((plain[first] - 1e-3, {first}), (plain[first] + 1e-3, {first, second})):
        rules = Rules(Sampling(temperature=1.0, top_p=float(top_p)))
        drawn = {
            bench.verify(rules, NO_PROPOSAL, nothing, np.array([u], np.float32)).extra_token
            for u in np.linspace(0, nearly_one[0], 40)
        }
        assert drawn == kept


def test_ties_go_to_the_lower_id(backend, toy_folder, tmp_path):
    """With all weights of the head zero every token is equally likely."""
    source = toy_folder(**SMALL)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][:] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "mlx"})
    shutil.copy(source / "config.json", tmp_path)
    model = backend.load(tmp_path, max_kv_cache_tokens=32)
    cache = model.new_cache()

    def drawn(sampling):
        tokens = set()
        for uniform in np.linspace(0, 1 - 2**-24, 2 * VOCABULARY + 1).astype(np.float32):
            job = VerifyJob(cache, 3, NO_PROPOSAL, Rules(sampling), uniform[None][:0], uniform[None])
            tokens.add(model.verify([job])[0].extra_token)
            cache.trim(1)
        return tokens

    assert drawn(Sampling(temperature=0.0)) == {0}
    assert drawn(Sampling(temperature=1.0, top_k=5)) == {0, 1, 2, 3, 4}
    # 10.5 of 64 equal tokens: the eleventh crosses.
    assert drawn(Sampling(temperature=1.0, top_p=10.5 / VOCABULARY)) == set(range(11))
    assert drawn(Sampling(temperature=1.0, min_p=1.0)) == set(range(VOCABULARY))


def test_a_draft_equal_to_the_target_is_always_right(backend, load_pair):
    """p == q: alpha is 1 and nothing is rejected, whatever the uniforms."""
    twins = Bench(load_pair(backend, **SMALL, noise=0.0))
    rules = Rules(Sampling(temperature=1.0, top_p=0.9))
    for seed in range(30):
        verdict = twins.round(rules, 3, seed)
        assert verdict.accepted_tokens == 3
        assert verdict.alphas == pytest.approx((1, 1, 1), abs=1e-4)
        assert verdict.kinds[-1] is TokenKind.BONUS


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_traces_equal_the_references(bench, reference_bench, temperature):
    """At temperature 1 and unmasked, whatever the rules; only the emitted rows."""
    rules = Rules(Sampling(temperature=temperature, top_p=0.8), masked_ids=(1, 2, 3), masked_rows=9)
    for seed in range(12):
        found, expected = (b.round(rules, 4, seed, trace=True) for b in (bench, reference_bench))
        assert found.tokens == expected.tokens
        rows = len(found.tokens)
        trace, wanted = found.trace, expected.trace
        assert trace.top_ids.shape == trace.top_logprobs.shape == (rows, 32)
        assert (trace.top_ids.dtype, trace.top_logprobs.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(trace.top_ids, wanted.top_ids)
        np.testing.assert_allclose(trace.top_logprobs, wanted.top_logprobs, atol=1e-3)
        np.testing.assert_allclose(trace.tail_mass, wanted.tail_mass, atol=1e-4)
        np.testing.assert_array_equal(trace.draft_ids, wanted.draft_ids)
        np.testing.assert_allclose(trace.draft_probs, wanted.draft_probs, atol=1e-3)
        mass = np.exp(trace.top_logprobs).sum(axis=1) + trace.tail_mass
        np.testing.assert_allclose(mass, 1, atol=1e-4)
        assert (np.diff(trace.top_logprobs, axis=1) <= 0).all()


def test_a_trace_tells_what_was_proposed(bench):
    rules = Rules(Sampling(temperature=0.0))
    best = bench.verify(rules, NO_PROPOSAL, np.zeros(0, np.float32), np.zeros(1, np.float32), trace=True)
    assert best.trace.draft_ids.tolist() == [-1]
    assert best.trace.draft_probs.tolist() == [0]
    right = Proposal(tokens=(best.extra_token,), q=None, num_tokens=1)
    wrong = Proposal(tokens=((best.extra_token + 1) % VOCABULARY,), q=None, num_tokens=1)
    zeros = np.zeros(2, np.float32)
    accepted = bench.verify(rules, right, zeros[:1], zeros, trace=True)
    assert accepted.trace.draft_ids.tolist() == [best.extra_token, -1]
    assert accepted.trace.draft_probs.tolist() == [1, 0]
    rejected = bench.verify(rules, wrong, zeros[:1], zeros, trace=True)
    assert rejected.trace.draft_ids.tolist() == list(wrong.tokens)
    assert rejected.trace.draft_probs.tolist() == [1]
    assert rejected.tokens == (best.extra_token,)


def test_a_small_vocabulary_leaves_the_trace_padded(backend, toy_folder):
    model = backend.load(toy_folder(**{**SMALL, "vocab_size": 16}), max_kv_cache_tokens=32)
    zeros = np.zeros(1, np.float32)
    job = VerifyJob(model.new_cache(), 3, NO_PROPOSAL, Rules(Sampling()), zeros[:0], zeros, trace=True)
    trace = model.verify([job])[0].trace
    assert sorted(trace.top_ids[0, :16].tolist()) == list(range(16))
    assert set(trace.top_ids[0, 16:].tolist()) == {-1}
    assert np.isneginf(trace.top_logprobs[0, 16:]).all()
    assert trace.tail_mass[0] == pytest.approx(0, abs=1e-5)
