"""The reference of what training minimizes: five losses of one response row, and their gradients.

Contract: pure functions of arrays, in float64; R rows, V vocabulary entries, N top tokens. Other backends
compute the same on their device and are tested against this file. Must not know models or adapters.

p and q are told apart in N + 1 buckets: the target's top tokens, and one "other" that holds everything
else. q = softmax(logits / `Example.loss_temperature`), and q_other is its sum outside the top tokens. q is
warped by temperature only: top-p, top-k, min-p and masks would hide the gradient of what they cut, so that
the draft could never learn to propose it.

Sources: forward and reverse Kullback-Leibler divergence as in DistillSpec (Zhou et al. 2023); total
variation is 1 - alpha (Leviathan et al. 2023, Corollary 3.6); `lk_hybrid` is design §5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.training import Objective

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from draftloop.backends.training import Example

    Floats = NDArray[np.float64]

EPSILON = 1e-10
"""The least q inside a logarithm and the least p that q is divided by. Below it log q is flat."""

LK_DECAY = 3.0
"""`lk_hybrid` weighs its divergence by exp(-3 alpha): far from the target KL leads, near it alpha itself."""


def loss_rows(objective: Objective, logits: NDArray[np.floating], example: Example) -> Floats:
    """The loss of each response row.

    With 0 log 0 = 0 and sums over the N + 1 buckets:

    - forward_kl: Σ p log(p / q)
    - reverse_kl: Σ q log(q / p)
    - total_variation: 1 - α, α = Σ min(p, q)
    - lk_hybrid: λ · forward_kl + (1 - λ) · (1 - α), λ = exp(-3 α)
    - cross_entropy: -log q of the text's own token, over the whole vocabulary

    Args:
        objective: which one.
        logits: [R, V] of the draft; row i predicts the example's row i. An id past V has q = 0.
        example: supplies p, the text and the temperature.

    Returns:
        [R] in nats; total variation in [0, 1].
    """
    p, ids = _targets(objective, example)
    return _loss_and_slopes(objective, p, _in_buckets(_q(logits, ids, example), ids))[0]


def logit_gradients(objective: Objective, logits: NDArray[np.floating], example: Example) -> Floats:
    """The gradient of each row's loss with respect to its own logits, [R, V].

    λ of `lk_hybrid` is held constant. With g the loss's slope by q of a token's bucket, the softmax's
    chain rule gives q (g - Σ q g) / temperature.

    Args and shapes are those of `loss_rows`.
    """
    p, ids = _targets(objective, example)
    q = _q(logits, ids, example)
    slopes = _loss_and_slopes(objective, p, _in_buckets(q, ids))[1]
    by_token = np.repeat(slopes[:, -1:], q.shape[1], axis=1)
    np.put_along_axis(by_token, ids, slopes[:, :-1], axis=1)
    gradients: Floats = q * (by_token - (q * by_token).sum(axis=1, keepdims=True)) / example.loss_temperature
    return gradients[:, : logits.shape[1]]


def _targets(objective: Objective, example: Example) -> tuple[Floats, NDArray[np.int64]]:
    """The buckets' p [R, N + 1], "other" last, and the ids of the first N.

    Cross-entropy is the forward divergence from a point mass on the text's token.
    """
    if objective is Objective.CROSS_ENTROPY:
        ids = example.tokens[example.num_prompt_tokens :, None].astype(np.int64)
        return np.repeat([[1.0, 0.0]], len(ids), axis=0), ids
    p = np.concatenate([example.top_probs, example.tail_probs[:, None]], axis=1).astype(np.float64)
    return p, example.top_ids.astype(np.int64)


def _q(logits: NDArray[np.floating], ids: NDArray[np.int64], example: Example) -> Floats:
    """[R, V] or wider: ids that only the target has (padding) get columns of probability 0."""
    missing = max(0, int(ids.max(initial=0)) + 1 - logits.shape[1])
    scores = logits.astype(np.float64) / example.loss_temperature
    scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    q: Floats = weights / weights.sum(axis=1, keepdims=True)
    return q


def _in_buckets(q: Floats, ids: NDArray[np.int64]) -> Floats:
    """[R, V] → [R, N + 1]; the tail is summed, because 1 minus the rest would lose its digits."""
    others = q.copy()
    np.put_along_axis(others, ids, 0.0, axis=1)
    return np.concatenate([np.take_along_axis(q, ids, axis=1), others.sum(axis=1, keepdims=True)], axis=1)


def _loss_and_slopes(objective: Objective, p: Floats, q: Floats) -> tuple[Floats, Floats]:
    """Losses [R] and their derivatives by each bucket's q, [R, N + 1]."""
    if objective is Objective.REVERSE_KL:
        ratios = np.log(np.maximum(q, EPSILON)) - np.log(np.maximum(p, EPSILON))
        return (q * ratios).sum(axis=1), ratios + (q >= EPSILON)
    if objective is Objective.TOTAL_VARIATION:
        return 1 - np.minimum(p, q).sum(axis=1), -(q < p).astype(np.float64)
    if objective is Objective.LK_HYBRID:
        divergence, divergence_slopes = _loss_and_slopes(Objective.FORWARD_KL, p, q)
        variation, variation_slopes = _loss_and_slopes(Objective.TOTAL_VARIATION, p, q)
        share = np.exp(-LK_DECAY * (1 - variation))
        losses = share * divergence + (1 - share) * variation
        return losses, share[:, None] * divergence_slopes + (1 - share[:, None]) * variation_slopes
    clamped = np.maximum(q, EPSILON)
    entropies = p * np.log(np.where(p > 0, p, 1.0))
    return (entropies - p * np.log(clamped)).sum(axis=1), np.where(q >= EPSILON, -p / clamped, 0.0)
