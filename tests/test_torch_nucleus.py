"""The nucleus of wide rows on a CPU: looked for among few tokens, and still the one of a full sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from draftloop.backends.torch.acceptance import warp  # noqa: E402
from draftloop.types import Sampling  # noqa: E402

VOCABULARY = 3000


@given(
    st.lists(st.sampled_from([0.0, 0.3, 1.0, 3.0, 8.0]), min_size=1, max_size=4),
    st.sampled_from([0.1, 0.5, 0.9, 0.999]),
    st.sampled_from([None, 1.0, 0.25]),
    st.integers(0, 10),
)
def test_any_rows_together_have_the_nucleus_of_a_full_sort(widths, top_p, step, seed):
    """Peaked and flat rows side by side; rounded logits tie by the hundred, and ids decide."""
    random = np.random.default_rng(seed)
    logits = np.stack([width * random.standard_normal(VOCABULARY) for width in widths]).astype(np.float32)
    if step is not None:
        logits = (np.round(logits / step) * step).astype(np.float32)
    found = warp(torch.from_numpy(logits), Sampling(temperature=1.0, top_p=top_p)).numpy()
    whole = warp(torch.from_numpy(logits), Sampling(temperature=1.0)).numpy().astype(np.float64)
    for row, probs in zip(found, whole, strict=True):
        order = np.argsort(-probs, kind="stable")
        kept = order[np.cumsum(probs[order]) - probs[order] < top_p]
        assert np.flatnonzero(row).tolist() == sorted(kept[probs[kept] > 0])
        np.testing.assert_allclose(row[kept], probs[kept] / probs[kept].sum(), rtol=1e-4)


@pytest.mark.parametrize("count", [40, 700, 2500])
def test_equal_tokens_are_kept_by_their_ids(count):
    """`count` equal tokens in any of the three ways to look for them: half of them, the lower ids."""
    logits = np.full((1, VOCABULARY), -30.0, np.float32)
    logits[0, 100 : 100 + count] = 0.0
    probs = warp(torch.from_numpy(logits), Sampling(temperature=1.0, top_p=0.5 - 0.1 / count)).numpy()
    kept = np.flatnonzero(probs[0])
    assert kept.tolist() == list(range(100, 100 + count // 2))
