"""The trace of a wide vocabulary on a CPU: the same tokens as sorting every row gives."""

from __future__ import annotations

import numpy as np
import pytest

from draftloop.backends.base import Proposal, VerifyJob
from draftloop.types import TRACE_TOP_TOKENS, Rules, Sampling

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("width", [151_936, 10_007, 8_192, 8_191, 40])
@pytest.mark.parametrize("crowded", [True, False])
def test_the_top_tokens_are_those_of_a_whole_sort(width, crowded):
    from draftloop.backends.torch.acceptance import verdict_of

    logits = np.random.default_rng(width).standard_normal((3, width)).astype(np.float32)
    if crowded:
        # All of one row's top tokens side by side, of another's at the very end.
        logits[0, : TRACE_TOP_TOKENS + 3] += 20
        logits[1, -TRACE_TOP_TOKENS:] += 20
    guesses = [int(row.argmax()) for row in logits[:2]]
    zeros = np.zeros(3, np.float32)
    job = VerifyJob(
        None, 1, Proposal(tuple(guesses), None, 2), Rules(Sampling(temperature=0.0)), zeros[:2], zeros, True
    )
    trace = verdict_of(torch.from_numpy(logits), job).trace
    expected = np.argsort(-logits, axis=1)[:, :TRACE_TOP_TOKENS]
    np.testing.assert_array_equal(trace.top_ids, expected)
    logprobs = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(trace.top_logprobs, np.take_along_axis(logprobs, expected, 1), atol=1e-4)
