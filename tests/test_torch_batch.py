"""PyTorch's packed passes: one for all sequences, and with the C kernels the very bits of each one alone."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from draftloop.backends.base import PrefillJob, Proposal, ProposeJob, VerifyJob  # noqa: E402
from draftloop.backends.registry import open_backend  # noqa: E402
from draftloop.backends.torch.decoder import Decoder  # noqa: E402
from draftloop.backends.torch.native import library  # noqa: E402
from draftloop.backends.torch.native.operations import NativeOperations  # noqa: E402
from draftloop.types import Rules, Sampling  # noqa: E402

GUESSES = ((), (5,), (7, 8, 9, 3), (30, 31))
PROMPTS = tuple(tuple(range(first, first + length)) for first, length in ((3, 1), (40, 9), (90, 30), (10, 2)))
GREEDY = Rules(Sampling())


@pytest.fixture(scope="module")
def model(toy_folder):
    folder = toy_folder(quantized=True, dtype="bfloat16", head_dim=32, model_type="qwen3")
    return open_backend("torch", device="cpu").load(folder, max_kv_cache_tokens=64)


def caches_of(model):
    caches = [model.new_cache() for _ in PROMPTS]
    for cache, prompt in zip(caches, PROMPTS, strict=True):
        model.prefill([PrefillJob(cache, prompt)])
    return caches


def verify_jobs(caches):
    return [
        VerifyJob(
            cache=cache,
            last=17,
            proposal=Proposal(guesses, None, len(guesses)),
            rules=GREEDY,
            accept_uniforms=np.zeros(len(guesses), np.float32),
            extra_uniforms=np.zeros(len(guesses) + 1, np.float32),
            trace=True,
        )
        for cache, guesses in zip(caches, GUESSES, strict=True)
    ]


def propose_jobs(caches):
    return [
        ProposeJob(cache, (17,) * unread, k, GREEDY, np.zeros(k, np.float32))
        for cache, unread, k in zip(caches, (1, 3, 2, 1), (2, 4, 1, 3), strict=True)
    ]


@pytest.mark.skipif(library.why_not() is not None, reason=f"no kernels here: {library.why_not()}")
def test_a_batch_gives_the_very_bits_of_each_sequence_alone(model):
    assert isinstance(model.decoder.operations, NativeOperations)
    together, apart = caches_of(model), caches_of(model)
    verdicts = model.verify(verify_jobs(together))
    for verdict, job in zip(verdicts, verify_jobs(apart), strict=True):
        (alone,) = model.verify([job])
        assert verdict == alone
        np.testing.assert_array_equal(verdict.trace.top_logprobs, alone.trace.top_logprobs)
    for one, other in zip(together, apart, strict=True):
        assert one.position == other.position
        assert torch.equal(one.copy(one.position), other.copy(other.position))


def test_prompts_read_together_fill_each_cache_as_alone(model):
    together, apart = [model.new_cache() for _ in PROMPTS], caches_of(model)
    model.prefill([PrefillJob(cache, prompt) for cache, prompt in zip(together, PROMPTS, strict=True)])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.copy(one.position), other.copy(other.position))


def test_the_weights_are_read_once_for_all(model, monkeypatch):
    passes = []
    forward = Decoder.forward_batch
    monkeypatch.setattr(
        Decoder,
        "forward_batch",
        lambda *given: (passes.append([len(ids) for ids in given[2]]), forward(*given))[1],
    )
    caches = caches_of(model)
    passes.clear()
    model.verify(verify_jobs(caches))
    assert passes == [[1, 2, 5, 3]]
    passes.clear()
    proposals = model.propose(propose_jobs(caches))
    # A sequence that wants no more tokens takes no part.
    assert passes == [[1, 3, 2, 1], [1, 1, 1], [1, 1], [1]]
    assert [len(one.tokens) for one in proposals] == [2, 4, 1, 3]
