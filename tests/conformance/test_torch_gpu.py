"""Steps recorded as CUDA graphs: any caches, any width, the weights of the day. `--device gpu` runs them."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
from examples import random_lora

from draftloop.backends.base import PrefillJob, Proposal, ProposeJob, VerifyJob
from draftloop.backends.lora import AdapterForm
from draftloop.backends.torch.native.library import SWITCH
from draftloop.types import Rules, Sampling

TOYS = [
    {},
    {"dtype": "bfloat16", "model_type": "qwen2"},
    {"dtype": "float16"},
    {"model_type": "qwen3", "head_dim": 24},
    {"model_type": "qwen2", "quantized": True},
]
PROMPT = tuple(np.random.default_rng(3).integers(0, 256, 70).tolist())
NEXT = (5, 6, 7, 8, 9, 10, 11)


@pytest.fixture(params=TOYS, ids=str)
def model(request, pytestconfig, load_toy):
    left_out = os.environ.get(SWITCH) == "0" or find_spec("triton") is None
    if pytestconfig.getoption("--device") != "gpu" or left_out:
        pytest.skip("needs an NVIDIA GPU and Triton")
    from draftloop.backends.torch.backend import TorchBackend

    return load_toy(TorchBackend("gpu"), **request.param)


def filled(model):
    cache = model.new_cache()
    cache.values.fill_(float("nan"))
    model.prefill([PrefillJob(cache, PROMPT)])
    return cache


def plain(model, cache, tokens):
    import torch

    with torch.inference_mode():
        ids = torch.tensor(tokens, device="cuda")
        return model.decoder.head(model.decoder.forward(cache, ids)).cpu().numpy()


def tolerance(model):
    return 1e-3 if str(model.decoder.dtype) == "torch.float32" else 0.5


def test_a_recorded_step_equals_the_plain_one(model):
    cache, other = filled(model), filled(model)
    for width in (1, 2, 7, 1):
        found = model.logits(cache, NEXT[:width])
        assert np.abs(found - plain(model, other, NEXT[:width])).max() < tolerance(model)
        assert cache.position == other.position


def test_a_tokens_bits_do_not_depend_on_its_neighbours(model):
    together = model.logits(filled(model), NEXT)
    cache = filled(model)
    alone = np.concatenate([model.logits(cache, (token,)) for token in NEXT])
    np.testing.assert_array_equal(together, alone)


def test_caches_take_turns(model):
    first, second = filled(model), filled(model)
    second.trim(20)
    expected = [model.logits(cache, NEXT[:3]) for cache in (filled(model), second)]
    second.trim(3)
    assert np.abs(expected[0] - expected[1]).max() > tolerance(model)
    for start in range(3):
        for cache, logits in zip((first, second), expected, strict=True):
            found = model.logits(cache, NEXT[start : start + 1])
            np.testing.assert_array_equal(found[0], logits[start])


def of_several_lengths(model):
    """Caches of prompts of 70, 57, 44, ... tokens."""
    caches = [filled(model) for _ in range(5)]
    for i, cache in enumerate(caches):
        cache.trim(13 * i)
    return caches


def assert_same_caches(caches, others):
    """Bit for bit, and nothing was written behind the last token."""
    import torch

    for cache, other in zip(caches, others, strict=True):
        assert cache.position == other.position
        assert torch.equal(cache.copy(cache.position), other.copy(other.position))
        assert cache.values[:, :, :, max(cache.position, len(PROMPT)) :].isnan().all()


@pytest.mark.parametrize("counts", [(0, 0, 0, 0, 0), (3, 0, 1, 2, 0), (7, 6, 7, 3, 8)], ids=str)
def test_sequences_that_share_a_step_get_the_very_bits_of_each_alone(model, counts):
    together, apart = of_several_lengths(model), of_several_lengths(model)

    def jobs(caches):
        return [
            VerifyJob(
                cache,
                i,
                Proposal(NEXT[:1] * k, None, k),
                Rules(Sampling()),
                np.zeros(k),
                np.zeros(k + 1),
                True,
            )
            for i, (cache, k) in enumerate(zip(caches, counts, strict=True))
        ]

    alone = [model.verify([job])[0] for job in jobs(apart)]
    for one, other in zip(model.verify(jobs(together)), alone, strict=True):
        assert one == other
        np.testing.assert_array_equal(one.trace.top_ids, other.trace.top_ids)
        np.testing.assert_array_equal(one.trace.top_logprobs, other.trace.top_logprobs)
    assert_same_caches(together, apart)


def test_sequences_that_draft_together_get_what_each_gets_alone(model):
    import torch

    for sampling in SAMPLINGS:
        together, apart = of_several_lengths(model), of_several_lengths(model)

        def jobs(caches, sampling=sampling):
            sizes = zip(caches, ((5,), (5, 6), (7,), (8, 9), (5,)), (4, 1, 2, 6, 3), strict=True)
            return [
                ProposeJob(cache, ids, k, Rules(sampling, (3, 9), k), NUMBERS[:k]) for cache, ids, k in sizes
            ]

        alone = [model.propose([job])[0] for job in jobs(apart)]
        for one, other in zip(model.propose(jobs(together)), alone, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            if not sampling.greedy:
                torch.testing.assert_close(one.q, other.q)
        assert_same_caches(together, apart)


def test_a_step_that_does_not_fit_is_refused(model):
    cache = filled(model)
    model.logits(cache, [1] * (cache.max_tokens - cache.position))
    with pytest.raises(ValueError, match="exceed"):
        model.logits(cache, (1,))


def test_an_adapter_is_worn_at_once(model):
    cache = filled(model)
    bare = model.logits(cache, (5,))
    cache.trim(1)
    lora = random_lora(model.architecture)
    for form in model.adapter_forms:
        model.set_adapter(lora, form)
        worn = model.logits(cache, (5,))
        cache.trim(1)
        assert np.abs(worn - plain(model, cache, (5,))).max() < tolerance(model)
        cache.trim(1)
        assert np.abs(worn - bare).max() > 1e-3
    model.set_adapter(None, AdapterForm.UNFUSED)
    np.testing.assert_array_equal(model.logits(cache, (5,)), bare)


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.0, top_k=20, min_p=0.02),
]
NUMBERS = np.random.default_rng(5).random(8).astype(np.float32)


def proposed(model, cache, unread, sampling, k=4):
    return model.propose([ProposeJob(cache, unread, k, Rules(sampling), NUMBERS[:k])])[0]


def verdict(model, cache, proposal, sampling, *, trace=False):
    k = proposal.num_tokens
    return model.verify(
        [VerifyJob(cache, 5, proposal, Rules(sampling), NUMBERS[:k], NUMBERS[: k + 1], trace=trace)]
    )[0]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("unread", [(5,), (5, 6), (5, 6, 7, 8, 9)])
def test_a_recorded_draft_equals_one_drawn_step_by_step(model, sampling, unread):
    import torch

    from draftloop.backends.torch.acceptance import drawn

    for _ in range(2):
        cache, other = filled(model), filled(model)
        found = proposed(model, cache, unread, sampling)
        assert cache.position == other.position + len(unread) + 3
        if len(unread) > 2:
            model.logits(other, unread[:-1])
            unread = unread[-1:]
        rows = torch.from_numpy(model.logits(other, unread)[-1:]).cuda()
        for i in range(4):
            token, q = drawn(rows, sampling, torch.from_numpy(NUMBERS[i : i + 1]).cuda())
            assert int(found.tokens[i]) == int(token[0])
            if q is not None:
                torch.testing.assert_close(found.q[i], q[0], rtol=0, atol=0)
            rows = torch.from_numpy(model.logits(other, (int(token[0]),))).cuda()


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_recorded_verification_decides_as_the_plain_one(model, sampling, trace):
    from draftloop.backends.torch.acceptance import verdict_of

    for guesses in ((6, 7, 8), tuple(proposed(model, filled(model), (5,), sampling).tokens.tolist()), ()):
        cache, proposal = filled(model), Proposal(guesses, None, len(guesses))
        found = verdict(model, cache, proposal, sampling, trace=trace)
        import torch

        rows = torch.from_numpy(model.logits(filled(model), (5, *guesses))).cuda()
        k = len(guesses)
        job = VerifyJob(cache, 5, proposal, Rules(sampling), NUMBERS[:k], NUMBERS[: k + 1], trace=trace)
        wanted = verdict_of(rows, job)
        assert (found.accepted_tokens, found.extra_token) == (wanted.accepted_tokens, wanted.extra_token)
        assert found.alphas == pytest.approx(wanted.alphas)
        if trace:
            np.testing.assert_array_equal(found.trace.top_ids, wanted.trace.top_ids)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_round_waits_for_the_device_once(model, sampling):
    import torch

    def waits(run):
        run()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    proposal = proposed(model, filled(model), (5,), sampling)
    drafts, caches = filled(model), filled(model)
    assert waits(lambda: (proposed(model, drafts, (5,), sampling), drafts.trim(4))) == 0
    assert waits(lambda: (verdict(model, caches, proposal, sampling), caches.trim(5))) == 1
