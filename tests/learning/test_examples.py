"""A stored request as an example: p as it was served, as far as the trace tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from draftloop.backends.numpy.acceptance import top_tokens, warp
from draftloop.learning.examples import example_of
from draftloop.storage.records import PairKey, RequestRecord, TraceRows
from draftloop.types import Sampling

if TYPE_CHECKING:
    from draftloop.backends.training import Example

EOS = 3
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.6]),
    top_p=st.sampled_from([1.0, 0.95, 0.8, 0.31, 0.01]),
    top_k=st.sampled_from([0, 1, 2, 5, 31, 32, 50]),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
)


def record_of(
    logits: np.ndarray, sampling: Sampling, *, min_tokens: int = 1, prompt: int = 3, answer: int | None = None
) -> RequestRecord:
    """A request whose target had `logits` [R, V]; its answer tokens are 100, 101, …"""
    rows = len(logits)
    top = top_tokens(logits)
    return RequestRecord(
        created_s=0.0,
        pair=PairKey("target", "draft"),
        adapter=None,
        domain="letters",
        source="chat",
        key=None,
        split_key="k",
        prompt_tokens=np.arange(prompt, dtype=np.int32),
        answer_tokens=np.arange(100, 100 + (rows if answer is None else answer), dtype=np.int32),
        sampling=sampling,
        min_tokens=min_tokens,
        num_draft_tokens=4,
        seed=0,
        finish_reason="length",
        rounds=rows,
        drafted_tokens=0,
        accepted_tokens=0,
        tested_tokens=0,
        alpha_sum=0.0,
        prompt_s=0.0,
        decode_s=0.0,
        traces=TraceRows(
            round_index=np.arange(rows, dtype=np.int32),
            kinds=np.full(rows, 3, np.uint8),
            draft_ids=np.full(rows, -1, np.int32),
            draft_probs=np.zeros(rows, np.float32),
            top_ids=top.ids,
            top_logprobs=top.logprobs,
            tail_mass=top.tail_mass,
        ),
    )


def example_from(logits: np.ndarray, sampling: Sampling, **options) -> Example:
    example = example_of(
        record_of(logits, sampling, **options), max_sequence_tokens=2048, eos_token_ids={EOS}
    )
    assert example is not None
    return example


def reference(logits: np.ndarray, sampling: Sampling, min_tokens: int = 1) -> np.ndarray:
    """p [R, V] as it was served; greedy requests at temperature 1."""
    return warp(logits, Sampling(temperature=1.0) if sampling.greedy else sampling, (EOS,), min_tokens - 1)


def spread(example: Example, vocab_size: int) -> np.ndarray:
    """The example's top probabilities where they belong, [R, V]."""
    probs = np.zeros((example.num_rows, vocab_size))
    np.put_along_axis(probs, example.top_ids.astype(np.int64), example.top_probs.astype(np.float64), axis=1)
    return probs


def distances(example: Example, p: np.ndarray) -> np.ndarray:
    """Total variation between the example and p [R, V], the tail as one token, [R]."""
    probs, outside = spread(example, p.shape[1]), p.copy()
    np.put_along_axis(outside, example.top_ids.astype(np.int64), 0.0, axis=1)
    inside = p - outside
    return (np.abs(probs - inside).sum(axis=1) + np.abs(example.tail_probs - outside.sum(axis=1))) / 2


def near_an_edge(logits: np.ndarray, sampling: Sampling, min_tokens: int, margin: float = 1e-5) -> bool:
    """Whether rounding decides what top-p or min-p keep."""
    if sampling.greedy:
        return False
    cut = Sampling(temperature=sampling.temperature, top_k=sampling.top_k)
    ranked = -np.sort(-warp(logits, cut, (EOS,), min_tokens - 1), axis=1)
    mass_before = ranked.cumsum(axis=1) - ranked
    return bool(
        (sampling.top_p < 1 and (np.abs(mass_before - sampling.top_p) < margin).any())
        or (sampling.min_p > 0 and (np.abs(ranked / ranked[:, :1] - sampling.min_p) < margin).any())
    )


@st.composite
def small_vocabularies(draw) -> np.ndarray:
    """Logits [R, V] with V from 4 to 32, many of them equal."""
    rows, width = draw(st.integers(1, 4)), draw(st.sampled_from([4, 5, 12, 31, 32]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    step = draw(st.sampled_from([0.01, 0.5, 2.0]))
    return (np.round(random.normal(0, 2, (rows, width)) / step) * step).astype(np.float32)


@given(small_vocabularies(), SAMPLINGS, st.integers(0, 6))
def test_a_vocabulary_within_the_trace_is_exact(logits, sampling, min_tokens):
    assume(not near_an_edge(logits, sampling, min_tokens))
    example = example_from(logits, sampling, min_tokens=min_tokens)
    np.testing.assert_allclose(
        spread(example, logits.shape[1]), reference(logits, sampling, min_tokens), atol=2e-6
    )
    np.testing.assert_array_equal(example.tail_probs, 0)


@given(small_vocabularies(), SAMPLINGS)
def test_what_is_cut_off_is_exactly_zero(logits, sampling):
    assume(not near_an_edge(logits, sampling, 1))
    example = example_from(logits, sampling)
    p = reference(logits, sampling)
    np.testing.assert_array_equal(spread(example, logits.shape[1]) > 0, p > 1e-40)


def real_looking(seed: int, rows: int = 6, width: int = 400) -> np.ndarray:
    """Logits [R, V] whose probabilities fall off as a language model's do."""
    random = np.random.default_rng(seed)
    ranks = np.argsort(random.random((rows, width)), axis=1) + 1
    decay = random.uniform(1.5, 3.0, (rows, 1))
    return (-decay * np.log(ranks) + random.normal(0, 0.3, (rows, width))).astype(np.float32)


@given(st.integers(0, 2**32), SAMPLINGS, st.integers(0, 6))
def test_every_row_is_a_distribution(seed, sampling, min_tokens):
    logits = real_looking(seed)
    example = example_from(logits, sampling, min_tokens=min_tokens)
    total = example.top_probs.sum(axis=1) + example.tail_probs
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert (example.top_probs >= 0).all()
    assert (example.tail_probs >= 0).all()
    masked = (example.top_ids == EOS) & (np.arange(len(logits)) < min_tokens - 1)[:, None]
    assert (example.top_probs[masked] == 0).all()


@given(st.integers(0, 2**32), st.sampled_from([1.0, 0.95, 0.8, 0.5]), st.sampled_from([0.0, 0.05]))
def test_at_temperature_one_a_nucleus_within_the_trace_is_exact(seed, top_p, min_p):
    """With top-p 1 and min-p 0, too: then the tail is exactly its mass."""
    logits = real_looking(seed)
    sampling = Sampling(temperature=1.0, top_p=top_p, min_p=min_p)
    assume(not near_an_edge(logits, sampling, 1))
    within = top_tokens(logits).tail_mass < 1 - top_p - 1e-4
    exact = within if top_p < 1 else np.full(len(logits), min_p == 0)
    distance = distances(example_from(logits, sampling), reference(logits, sampling))
    assert (distance[exact] < 1e-5).all()


@given(st.integers(0, 2**32))
def test_greedy_requests_keep_p_at_temperature_one(seed):
    logits = real_looking(seed)
    example = example_from(logits, Sampling(top_p=0.5, top_k=3, min_p=0.2), min_tokens=3)
    open_rows = slice(2, None)
    assert (distances(example, reference(logits, Sampling(temperature=1.0), 3))[open_rows] < 1e-5).all()


@given(st.integers(0, 2**32), st.sampled_from([0.5, 0.7, 0.9]), st.sampled_from([0.95, 0.8, 0.5]))
def test_below_temperature_one_the_tails_model_bounds_the_error(seed, temperature, top_p):
    """The modelled tail is too heavy, never too light, and by no more than the modelled tail weighs."""
    logits = real_looking(seed)
    served = Sampling(temperature=temperature, top_p=top_p)
    full = reference(logits, Sampling(temperature=temperature))
    modelled = example_from(logits, Sampling(temperature=temperature)).tail_probs.astype(np.float64)
    true = 1 - np.sort(full, axis=1)[:, -32:].sum(axis=1)
    assert (modelled >= true - 1e-6).all()
    # A nucleus of too heavy a tail may take in a few tokens more than the true one, all of them tokens that
    # lie within the tail's weight of its edge; each is at most as likely as the one that crosses the edge.
    ranked = -np.sort(-full, axis=1)
    crossing = ranked[np.arange(len(full)), (ranked.cumsum(axis=1) - ranked < top_p).sum(axis=1)]
    distance = distances(example_from(logits, served), reference(logits, served))
    assert (distance <= (modelled + crossing) / top_p + 1e-5).all()


@given(
    st.integers(0, 2**32),
    st.sampled_from([0.3, 0.7, 1.0, 1.6]),
    st.sampled_from([0, 10, 40, 70]),
    st.sampled_from([0.0, 0.01, 0.3]),
)
def test_a_tail_of_equals_is_exact_at_every_temperature(seed, temperature, top_k, min_p):
    """The tail's model is then the truth."""
    random = np.random.default_rng(seed)
    logits = np.zeros((3, 60), np.float32)
    logits[:, random.permutation(60)[:20]] = random.uniform(0.1, 3, (3, 20))
    sampling = Sampling(temperature=temperature, top_k=top_k, min_p=min_p)
    assume(not near_an_edge(logits, sampling, 1))
    assert (distances(example_from(logits, sampling), reference(logits, sampling)) < 1e-5).all()


def test_a_nucleus_that_reaches_into_the_tail_takes_what_it_needs():
    flat = np.zeros((1, 320), np.float32)
    example = example_from(flat, Sampling(temperature=1.0, top_p=0.5))
    # 32 tokens hold a tenth, the tail the other four tenths that the nucleus needs.
    assert example.tail_probs[0] == pytest.approx(0.8, abs=1e-5)
    assert example_from(flat, Sampling(temperature=1.0, top_p=0.1)).tail_probs[0] == pytest.approx(
        0, abs=1e-5
    )


def test_top_k_reaches_as_far_into_the_tail_as_it_counts():
    flat = np.zeros((2, 320), np.float32)
    example = example_from(flat, Sampling(temperature=0.7, top_k=64), min_tokens=2)
    # Row 0 has EOS masked, which is among the top 32 here: 31 of the 64 are in the trace.
    assert example.tail_probs.tolist() == pytest.approx([33 / 64, 0.5], abs=1e-5)
    assert example_from(flat, Sampling(temperature=0.7, top_k=32)).tail_probs.tolist() == [0, 0]
    assert example_from(flat, Sampling(temperature=0.7, top_k=400)).tail_probs[0] == pytest.approx(
        0.9, abs=1e-5
    )


def test_min_p_drops_the_tail_with_its_likeliest_token():
    logits = np.concatenate([[4.0], np.zeros(199)]).astype(np.float32)[None]
    kept = example_from(logits, Sampling(temperature=1.0, min_p=0.01))
    dropped = example_from(logits, Sampling(temperature=1.0, min_p=0.02))
    assert kept.tail_probs[0] == pytest.approx(168 / (np.exp(4) + 199), rel=1e-4)
    assert dropped.tail_probs[0] == 0
    assert dropped.top_probs[0, 0] == 1


@pytest.mark.parametrize(("max_sequence_tokens", "rows"), [(2048, 6), (9, 6), (8, 5), (4, 1)])
def test_a_long_request_loses_its_end(max_sequence_tokens, rows):
    record = record_of(real_looking(0), Sampling(temperature=1.0))
    whole = example_of(record, max_sequence_tokens=2048, eos_token_ids=[EOS])
    example = example_of(record, max_sequence_tokens=max_sequence_tokens, eos_token_ids=[EOS])
    assert example.num_rows == rows
    assert example.num_prompt_tokens == 3
    assert example.tokens.tolist() == [0, 1, 2, 100, 101, 102, 103, 104, 105][: 3 + rows]
    for name in ("top_ids", "top_probs", "tail_probs"):
        np.testing.assert_array_equal(getattr(example, name), getattr(whole, name)[:rows])


@pytest.mark.parametrize("max_sequence_tokens", [1, 2, 3])
def test_a_request_without_an_answer_left_is_no_example(max_sequence_tokens):
    record = record_of(real_looking(0), Sampling())
    assert example_of(record, max_sequence_tokens=max_sequence_tokens, eos_token_ids=[EOS]) is None


def test_an_empty_answer_is_no_example():
    record = record_of(np.zeros((0, 50), np.float32), Sampling())
    assert example_of(record, max_sequence_tokens=100, eos_token_ids=[EOS]) is None


def test_an_example_says_how_it_was_served_in_the_seams_types():
    sampling = Sampling(temperature=0.7, top_p=0.9)
    example = example_from(real_looking(1, width=12), sampling, min_tokens=3)
    assert example.rules.sampling == sampling
    assert (example.rules.masked_ids, example.rules.masked_rows) == ((EOS,), 2)
    assert example.top_ids.shape == example.top_probs.shape == (6, 12)
    assert [array.dtype.name for array in (example.tokens, example.top_ids)] == ["int32", "int32"]
    assert [array.dtype.name for array in (example.top_probs, example.tail_probs)] == ["float32"] * 2


@given(st.integers(0, 2**32), SAMPLINGS)
def test_log_probabilities_kept_in_sixteen_bits_will_do(seed, sampling):
    logits = real_looking(seed, width=300)
    assume(not near_an_edge(logits, sampling, 1, margin=0.01))
    record = record_of(logits, sampling)
    coarse = record.traces.top_logprobs.astype(np.float16).astype(np.float32)
    record.traces.top_logprobs[:] = coarse
    example = example_of(record, max_sequence_tokens=100, eos_token_ids=[EOS])
    exact = example_from(logits, sampling)
    np.testing.assert_allclose(example.top_probs, exact.top_probs, atol=0.01)
    np.testing.assert_allclose(example.tail_probs, exact.tail_probs, atol=0.01)
