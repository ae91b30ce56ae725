"""Steps recorded as CUDA graphs: any cache, any width, the weights of the day. `--device gpu` runs them."""

from __future__ import annotations

import os
from importlib.util import find_spec

import numpy as np
import pytest
from examples import random_lora

from draftloop.backends.base import PrefillJob
from draftloop.backends.lora import AdapterForm
from draftloop.backends.torch.native.library import SWITCH

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
