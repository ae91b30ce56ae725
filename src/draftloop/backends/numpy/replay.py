"""The reference of replay: what acceptance would have been at each row of an example.

Contract: a pure function of arrays, by the reference's own `warp`. Other backends compute the same on their
device and are tested against this file. Must not know models or adapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.numpy.acceptance import warp

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from draftloop.backends.training import Example


def alpha_rows(logits: NDArray[np.float32], example: Example) -> NDArray[np.float32]:
    """Alpha at each response row of `example`, [R].

    Greedy: 1 where the likeliest token is the text's, else 0. Sampled: Σ min(p, q) over the target's top
    tokens, and the smaller of the two tails. That is alpha itself where p or q ends within the top tokens,
    and at most min(p_tail, q_tail) above it elsewhere: inside the tail nothing tells them apart.

    Args:
        logits: [R, V] of the draft; row i predicts the example's row i. An id past V has q = 0.
        example: with the rules that the request was served by; they warp and mask q here.
    """
    rules = example.rules
    q = warp(logits, rules.sampling, rules.masked_ids, rules.masked_rows)
    if rules.sampling.greedy:
        agree: NDArray[np.bool_] = q.argmax(axis=1) == example.tokens[example.num_prompt_tokens :]
        return agree.astype(np.float32)
    inside = example.top_ids < q.shape[1]
    top = np.where(inside, np.take_along_axis(q, np.where(inside, example.top_ids, 0), axis=1), 0.0)
    tail = np.maximum(1 - top.sum(axis=1), 0)
    alphas: NDArray[np.float64] = np.minimum(example.top_probs, top).sum(axis=1)
    alphas = alphas + np.minimum(example.tail_probs, tail)
    return alphas.astype(np.float32)
