"""PyTorch reads several texts in a pass and what they share once, and each as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from draftloop.backends.registry import open_backend  # noqa: E402
from draftloop.backends.torch.decoder import Decoder  # noqa: E402
from draftloop.backends.torch.native import library  # noqa: E402
from draftloop.backends.torch.native.operations import NativeOperations  # noqa: E402
from draftloop.backends.training import Example  # noqa: E402
from draftloop.types import Rules, Sampling  # noqa: E402

SHAPES = {
    "native": {"quantized": True, "dtype": "bfloat16", "head_dim": 32, "model_type": "qwen3"},
    "eager": {},
}
BEGINNING = tuple(range(100, 120))


def text(own_prompt_tokens, rows, seed, beginning=BEGINNING):
    random = np.random.default_rng(seed)
    own = random.integers(0, 256, own_prompt_tokens + rows)
    return Example(
        tokens=np.array([*beginning, *own], np.int32),
        num_prompt_tokens=len(beginning) + own_prompt_tokens,
        top_ids=np.stack([random.choice(256, 8, replace=False) for _ in range(rows)]).astype(np.int32),
        top_probs=np.full((rows, 8), 0.1, np.float32),
        tail_probs=np.full(rows, 0.2, np.float32),
        rules=Rules(Sampling(temperature=1.0)),
    )


TEXTS = [text(3, 9, 0), text(40, 30, 1), text(8, 20, 2, beginning=()), text(1, 1, 3), text(150, 500, 4)]


@pytest.fixture(params=SHAPES)
def model(request, toy_folder):
    folder = toy_folder(**SHAPES[request.param])
    return open_backend("torch", device="cpu").load(folder, max_kv_cache_tokens=64)


@pytest.fixture
def passes(monkeypatch):
    """Tokens of each text in each pass."""
    told, forward = [], Decoder.forward_batch
    monkeypatch.setattr(
        Decoder,
        "forward_batch",
        lambda *given: (told.append([len(ids) for ids in given[2]]), forward(*given))[1],
    )
    return told


def test_texts_share_passes_and_their_beginning_is_read_once(model, passes):
    alphas = model.replay(TEXTS)
    assert [len(rows) for rows in alphas] == [9, 30, 20, 1, 500]
    # Four of them begin alike.
    assert sum(map(sum, passes)) == sum(len(one.tokens) - 1 for one in TEXTS) - 3 * len(BEGINNING)
    assert passes.count([len(BEGINNING)]) == 1
    assert max(map(sum, passes)) == 512
    # Two for the long text by itself, and the others share two.
    assert sorted(map(len, passes)) == [1, 1, 1, 2, 2]


def test_each_is_as_alone(model):
    exact = isinstance(model.decoder.operations, NativeOperations)
    for one, together in zip(TEXTS, model.replay(TEXTS), strict=True):
        np.testing.assert_allclose(together, model.replay([one])[0], rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.skipif(library.why_not() is not None, reason=f"no kernels here: {library.why_not()}")
def test_the_kernels_of_our_own_are_among_them(toy_folder):
    folder = toy_folder(**SHAPES["native"])
    model = open_backend("torch", device="cpu").load(folder, max_kv_cache_tokens=64)
    assert isinstance(model.decoder.operations, NativeOperations)


def test_no_texts_are_no_passes(model, passes):
    assert model.replay([]) == []
    assert not passes
