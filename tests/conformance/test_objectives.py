"""What training minimizes: the reference by itself, and every backend's trainer beside it.

The reference's losses are held to their definitions, written out a bucket at a time, and its gradients to
central differences. A trainer shows its loss in `StepResult` and its gradient in Adam's first moment, which
after one step is a tenth of it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from examples import (
    ALL_MODULES,
    MASKED,
    PLAIN,
    RULES,
    SPEC,
    ReferenceDraft,
    assert_slopes,
    example_of,
    gradients_of,
    one_of_each,
    open_trainer,
    random_lora,
    random_prompt,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from draftloop.backends.numpy.acceptance import warp
from draftloop.backends.numpy.objectives import logit_gradients, loss_rows
from draftloop.backends.numpy.replay import alpha_rows
from draftloop.backends.training import Example, Objective, TrainerSettings
from draftloop.types import Rules, Sampling

BUCKETED = (Objective.FORWARD_KL, Objective.REVERSE_KL, Objective.TOTAL_VARIATION, Objective.LK_HYBRID)
EPSILON = 1e-10
MODEL_TYPES = ("llama", "qwen2", "qwen3")
quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def rows(draw):
    """Logits [R, V] and an example that they could be of: some p are 0, some q are next to nothing."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_rows, vocab_size = draw(st.integers(1, 3)), draw(st.integers(3, 9))
    num_top = draw(st.integers(1, vocab_size))
    logits = random.standard_normal((num_rows, vocab_size)) * draw(st.sampled_from([0.5, 3.0, 12.0]))
    p = random.dirichlet(np.full(num_top + 1, draw(st.sampled_from([0.3, 2.0]))), num_rows)
    if draw(st.booleans()):
        p[:, draw(st.integers(0, num_top))] = 0
        assume(p.sum(axis=1).min() > 0)
    p /= p.sum(axis=1, keepdims=True)
    sampling = draw(st.sampled_from([Sampling(), Sampling(0.6), Sampling(1.0, top_p=0.5), Sampling(1.8)]))
    example = Example(
        tokens=random.integers(0, vocab_size, num_rows + 2).astype(np.int32),
        num_prompt_tokens=2,
        top_ids=np.stack([random.permutation(vocab_size)[:num_top] for _ in range(num_rows)]).astype(
            np.int32
        ),
        top_probs=p[:, :-1].astype(np.float32),
        tail_probs=p[:, -1].astype(np.float32),
        rules=Rules(sampling),
    )
    return logits, example


def buckets_of(logits, example, row):
    """p and q of one row as lists, the tail last, in plain arithmetic."""
    temperature = example.rules.sampling.temperature or 1.0
    weights = [math.exp(value / temperature) for value in logits[row]]
    q = [weight / sum(weights) for weight in weights]
    ids = example.top_ids[row].tolist()
    tail = sum(value for token, value in enumerate(q) if token not in ids)
    p = [*map(float, example.top_probs[row]), float(example.tail_probs[row])]
    return p, [*(q[token] for token in ids), tail], q[example.tokens[example.num_prompt_tokens + row]]


def defined_loss(objective, p, q, q_token):
    overlap = sum(map(min, p, q))
    forward = sum(a * math.log(a / max(b, EPSILON)) for a, b in zip(p, q, strict=True) if a > 0)
    if objective is Objective.FORWARD_KL:
        return forward
    if objective is Objective.REVERSE_KL:
        return sum(b * math.log(max(b, EPSILON) / max(a, EPSILON)) for a, b in zip(p, q, strict=True))
    if objective is Objective.TOTAL_VARIATION:
        return 1 - overlap
    if objective is Objective.LK_HYBRID:
        share = math.exp(-3 * overlap)
        return share * forward + (1 - share) * (1 - overlap)
    return -math.log(max(q_token, EPSILON))


class TestTheReference:
    """No model and no backend: arrays alone."""

    @pytest.mark.parametrize("objective", Objective)
    @given(case=rows())
    @quick
    def test_losses_are_as_defined(self, objective, case):
        logits, example = case
        found = loss_rows(objective, logits, example)
        expected = [defined_loss(objective, *buckets_of(logits, example, r)) for r in range(len(logits))]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("objective", [o for o in Objective if o is not Objective.LK_HYBRID])
    @given(case=rows())
    @quick
    def test_gradients_are_central_differences(self, objective, case):
        logits, example = case
        for row in range(len(logits)):
            p, q, q_token = buckets_of(logits, example, row)
            # min() and the clamp have kinks, where no derivative is.
            assume(min(abs(a - b) for a, b in zip(p, q, strict=True)) > 1e-5)
            assume(min(abs(b - EPSILON) for b in (*q, q_token)) > EPSILON / 100)
        found, step = logit_gradients(objective, logits, example), 1e-6
        for token in range(logits.shape[1]):
            ahead, behind = logits.copy(), logits.copy()
            ahead[:, token] += step
            behind[:, token] -= step
            rise = loss_rows(objective, ahead, example) - loss_rows(objective, behind, example)
            np.testing.assert_allclose(found[:, token], rise / (2 * step), rtol=1e-5, atol=1e-7)

    @given(case=rows())
    @quick
    def test_the_hybrid_mixes_two_gradients_with_its_share_held(self, case):
        forward, variation, found = (
            logit_gradients(objective, *case)
            for objective in (Objective.FORWARD_KL, Objective.TOTAL_VARIATION, Objective.LK_HYBRID)
        )
        share = np.exp(-3 * (1 - loss_rows(Objective.TOTAL_VARIATION, *case)))[:, None]
        np.testing.assert_allclose(found, share * forward + (1 - share) * variation, atol=1e-12)

    @given(case=rows(), masked_rows=st.integers(0, 4), stranger=st.booleans())
    @quick
    def test_alphas_are_as_defined(self, case, masked_rows, stranger):
        """Bucket by bucket, with q filtered and masked as the request was served."""
        logits, example = case
        example = replace(example, rules=replace(example.rules, masked_ids=(0,), masked_rows=masked_rows))
        if stranger:
            # A token that only the target has.
            example.top_ids[0, 0] = logits.shape[1] + 5
        rules, found = example.rules, alpha_rows(logits.astype(np.float32), example)
        q = warp(logits.astype(np.float32), rules.sampling, rules.masked_ids, rules.masked_rows)
        for row, alpha in enumerate(found):
            if rules.sampling.greedy:
                expected = float(q[row].argmax() == example.tokens[example.num_prompt_tokens + row])
            else:
                ids = example.top_ids[row].tolist()
                top = [q[row, token] if token < len(q[row]) else 0.0 for token in ids]
                expected = sum(map(min, example.top_probs[row].tolist(), top))
                tail = sum(value for token, value in enumerate(q[row]) if token not in ids)
                expected += min(float(example.tail_probs[row]), tail)
            assert alpha == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("objective", BUCKETED)
    @given(case=rows())
    @quick
    def test_a_draft_that_is_right_has_nothing_to_learn(self, objective, case):
        logits, example = case
        told = np.array([buckets_of(logits, example, row)[1] for row in range(len(logits))])
        right = replace(example, top_probs=told[:, :-1], tail_probs=told[:, -1])
        np.testing.assert_allclose(loss_rows(objective, logits, right), 0, atol=1e-6)
        if objective in (Objective.FORWARD_KL, Objective.REVERSE_KL):
            np.testing.assert_allclose(logit_gradients(objective, logits, right), 0, atol=1e-6)
        assert (loss_rows(objective, logits, example) >= -1e-7).all()

    @pytest.mark.parametrize("objective", Objective)
    @given(case=rows())
    @quick
    def test_q_is_warped_by_temperature_alone(self, objective, case):
        """Filters and masks would hide the gradient of what they cut; greedy requests learn at 1."""
        logits, example = case
        sampling = example.rules.sampling
        filtered = replace(sampling, top_k=1, top_p=0.1, min_p=0.9)
        cut = replace(example, rules=Rules(filtered, tuple(range(logits.shape[1] - 1)), masked_rows=9))
        np.testing.assert_array_equal(
            loss_rows(objective, logits, cut), loss_rows(objective, logits, example)
        )
        temperature = 1.0 if sampling.greedy else sampling.temperature
        plain = replace(example, rules=Rules(Sampling(1.0)))
        for function, scale in ((loss_rows, 1.0), (logit_gradients, temperature)):
            np.testing.assert_allclose(
                function(objective, logits, example) * scale,
                function(objective, logits / temperature, plain),
                atol=1e-12,
            )

    @pytest.mark.parametrize("objective", Objective)
    @given(case=rows())
    @quick
    def test_tokens_that_only_the_target_has_are_never_proposed(self, objective, case):
        """Padding of a wider target: as if the draft's head had more rows and left them without weight."""
        logits, example = case
        wider = logits.shape[1] + 3
        ids, tokens = example.top_ids.copy(), example.tokens.copy()
        ids[0, 0], tokens[-1] = wider - 1, wider - 2
        odd = replace(example, top_ids=ids, tokens=tokens)
        padded = np.pad(logits, ((0, 0), (0, 3)), constant_values=-1e9)
        np.testing.assert_allclose(
            loss_rows(objective, logits, odd), loss_rows(objective, padded, odd), atol=1e-12
        )
        found = logit_gradients(objective, logits, odd)
        np.testing.assert_allclose(
            found, logit_gradients(objective, padded, odd)[:, : logits.shape[1]], atol=1e-12
        )
        assert np.isfinite(found).all()

    @pytest.mark.parametrize("objective", Objective)
    def test_whole_certainty_of_something_else_is_finite(self, objective):
        example = Example(
            tokens=np.array([0, 1], np.int32),
            num_prompt_tokens=1,
            top_ids=np.array([[1]], np.int32),
            top_probs=np.ones((1, 1), np.float32),
            tail_probs=np.zeros(1, np.float32),
            rules=PLAIN,
        )
        logits = np.array([[500.0, -500.0, 0.0]])
        loss = loss_rows(objective, logits, example)[0]
        assert 0 < loss <= -math.log(EPSILON) * (1 + 1e-9)
        assert np.isfinite(logit_gradients(objective, logits, example)).all()


@pytest.fixture(scope="session")
def target(reference, load_pair):
    """The reference's toy target."""
    return load_pair(reference).target


@pytest.fixture(scope="session")
def examples(target):
    """One text for each kind of rules."""
    return one_of_each(target)


@pytest.fixture
def observed(backend, toy_pair):
    """`observed(objective, examples, spec, **options)`: loss and gradients by tensor, out of one step.

    They come with the draft in float64 and the adapter that they are of.
    """

    def observe(objective, examples, spec=SPEC, **options):
        folder = toy_pair(**options)[1]
        draft = ReferenceDraft.of(folder)
        lora = random_lora(draft.architecture, spec, gain=0.2)
        # A gradient that is cut would tell its direction alone.
        plan = TrainerSettings(objective, gradient_checkpointing=False, max_gradient_norm=1e9)
        trainer = open_trainer(backend, folder, lora, plan)
        result = trainer.step([examples], 1e-4)
        return result, gradients_of(trainer.state().moments), draft, lora

    return observe


class TestTrainers:
    """A trainer's loss and gradient are the reference's."""

    @pytest.mark.parametrize("objective", Objective)
    def test_the_loss_is_the_mean_over_all_rows(self, observed, examples, objective):
        for batch in (*([one] for one in examples), examples):
            result, _, draft, lora = observed(objective, batch)
            assert result.loss == pytest.approx(draft.loss(lora, objective, batch), rel=1e-3, abs=1e-5)
            assert result.rows == sum(one.num_rows for one in batch)
            assert result.applied

    @pytest.mark.parametrize("objective", Objective)
    def test_every_gradient_is_the_references(self, observed, examples, objective):
        assert_gradients(observed(objective, examples[:3]), objective, examples[:3], 2e-3)

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    @pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
    def test_gradients_through_every_kind_of_base(self, observed, examples, model_type, packed, rounding):
        options = {"model_type": model_type, "quantized": packed, "tied": model_type == "qwen2"}
        batch = [examples[1], examples[2]]
        told = observed(Objective.FORWARD_KL, batch, **options)
        tolerance = rounding(5e-2 if packed else 2e-3, 0.15, **options)
        assert_gradients(told, Objective.FORWARD_KL, batch, tolerance)

    @pytest.mark.parametrize("name", ALL_MODULES)
    def test_gradients_of_one_module_alone(self, observed, examples, name):
        """What is between it and the loss has no adapter of its own."""
        batch, spec = [examples[3]], replace(SPEC, rank=3, alpha=1.5, target_modules=(name,))
        told = observed(Objective.LK_HYBRID, batch, spec)
        assert {key.split(".")[-2] for key in told[1]} == {name}
        assert_gradients(told, Objective.LK_HYBRID, batch, 2e-3)

    @pytest.mark.parametrize("objective", Objective)
    def test_tokens_that_only_the_target_has(self, observed, target, objective):
        """Ids past the draft's head among the top tokens and in the text: q is 0, the rest goes on."""
        example = example_of(target, random_prompt(6, 16), 5, PLAIN)
        top, tokens = example.top_ids.copy(), example.tokens.copy()
        top[::2, -1], tokens[9] = 271, 270
        batch = [replace(example, top_ids=top, tokens=tokens)]
        options = {"draft_vocab_size": 262}
        result, *_, draft, lora = told = observed(objective, batch, **options)
        assert result.loss == pytest.approx(draft.loss(lora, objective, batch), rel=1e-3)
        assert_gradients(told, objective, batch, 2e-3)

    @pytest.mark.parametrize("objective", Objective)
    def test_filters_and_masks_do_not_act_in_the_loss(self, observed, examples, objective):
        example = examples[list(RULES).index("masked")]
        bare = Rules(Sampling(temperature=MASKED.sampling.temperature))
        found, expected = (observed(objective, [one])[0] for one in (example, replace(example, rules=bare)))
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def assert_gradients(told, objective, examples, tolerance):
    result, gradients, draft, lora = told
    assert_slopes(draft, lora, objective, examples, gradients, tolerance)
    total = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    assert result.gradient_norm == pytest.approx(total, rel=1e-3)
