"""The peers that are frameworks: the same weights, the same tokens, and rounds told right."""

from __future__ import annotations

import numpy as np
import pytest

from draftloop.backends.registry import open_backend
from draftloop.benchmarking.child import PeerSetup
from draftloop.benchmarking.contenders import Job
from draftloop.benchmarking.frameworks import open_mlx_lm, open_transformers
from draftloop.types import Sampling

PROMPT = (40, 41, 42, 43, 44, 45)
MAX_TOKENS = 24
K = 3
NEVER = 9999
"""An EOS that no answer ends with."""


def setup_of(target, draft):
    return PeerSetup(
        target=target,
        draft=draft,
        num_draft_tokens=K,
        max_context_tokens=256,
        threads=1,
        device="cpu",
        eos_token_ids=(NEVER,),
    )


@pytest.mark.parametrize("options", [{}, {"quantized": True}, {"tied": True, "model_type": "qwen2"}])
def test_transformers_computes_with_the_weights_of_the_folder(toy_folder, options):
    torch = pytest.importorskip("torch")
    from draftloop.backends.torch.peer import load_dense

    folder = toy_folder(**options)
    ours = open_backend("numpy").load(folder, max_kv_cache_tokens=64)
    expected = ours.logits(ours.new_cache(), PROMPT)
    with torch.no_grad():
        got = load_dense(folder, "cpu").float()(torch.tensor([PROMPT])).logits[0].numpy()
    # Weights in bfloat16 have 8 bits: the logits agree to a few hundredths, far from the next token's.
    assert np.abs(got - expected).max() < 0.15 * expected.std()
    assert (got.argmax(axis=-1) == expected.argmax(axis=-1)).mean() > 0.6


@pytest.mark.parametrize("program", ["transformers", "mlx-lm"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_perfect_draft_gives_full_rounds_and_none_gives_rounds_of_one(toy_folder, program, temperature):
    pytest.importorskip({"transformers": "torch", "mlx-lm": "mlx_lm"}[program])
    open_program = {"transformers": open_transformers, "mlx-lm": open_mlx_lm}[program]
    folder = toy_folder()
    job = Job(PROMPT, MAX_TOKENS, Sampling(temperature=temperature), 0)
    alone = open_program(setup_of(folder, None)).answer(job)
    assert (alone.tokens, alone.rounds) == (MAX_TOKENS - 1, MAX_TOKENS - 1)
    program = open_program(setup_of(folder, folder))
    assert f"{K} draft tokens" in program.description
    drafted = program.answer(job)
    assert drafted.rounds < alone.rounds
    assert drafted.tokens > drafted.rounds
    assert drafted.tokens <= drafted.rounds * (K + 1)
    assert drafted.seconds > 0
