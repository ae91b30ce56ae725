"""The losses of `backends/numpy/objectives.py` in MLX operations, with their gradients.

Contract: pure functions of lazy arrays, float32; `R` rows, `V` vocabulary entries, `N` top tokens. The
gradient is written out rather than traced: then no array of [R, V] outlives the step that reads it. Only
operations that the Metal, CUDA and CPU builds all have. Must not know models or adapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from draftloop.backends.numpy.objectives import EPSILON, LK_DECAY
from draftloop.backends.training import Objective

if TYPE_CHECKING:
    from draftloop.backends.training import Example


class Targets(NamedTuple):
    """What R rows are compared with.

    Attributes:
        probs: p of the N top tokens and, last, of everything else, [R, N + 1] float32.
        ids: the top tokens, [R, N] int32; distinct within a row, and any of them may lie past V.
        width: one more than the greatest id.
    """

    probs: mx.array
    ids: mx.array
    width: int

    def rows(self, start: int, stop: int) -> Targets:
        """Some of them."""
        return Targets(self.probs[start:stop], self.ids[start:stop], self.width)


def targets(objective: Objective, example: Example) -> Targets:
    """The example's p; for cross-entropy a point mass on the text's token in each row."""
    if objective is Objective.CROSS_ENTROPY:
        ids = example.tokens[example.num_prompt_tokens :, None]
        probs = np.tile(np.array([1, 0], np.float32), (len(ids), 1))
    else:
        ids = example.top_ids
        probs = np.concatenate([example.top_probs, example.tail_probs[:, None]], axis=1)
    width = int(ids.max(initial=0)) + 1
    return Targets(mx.array(probs.astype(np.float32)), mx.array(ids.astype(np.int32)), width)


def losses_and_gradients(
    objective: Objective, logits: mx.array, targets: Targets, temperature: float
) -> tuple[mx.array, mx.array]:
    """The loss of each row, and its gradient with respect to the row's logits.

    Args:
        objective: which loss.
        logits: [R, V] of the draft, any float dtype.
        targets: of the same rows.
        temperature: `Example.loss_temperature`.

    Returns:
        Losses [R] in nats, and gradients [R, V], both float32.
    """
    vocab_size = logits.shape[1]
    scores = logits.astype(mx.float32) / temperature
    if targets.width > vocab_size:
        # Padding that only the target has: tokens with q = 0.
        scores = mx.pad(scores, [(0, 0), (0, targets.width - vocab_size)], constant_values=-mx.inf)
    q = mx.softmax(scores, axis=-1, precise=True)
    # 1 minus the rest would lose the tail's digits.
    others = mx.put_along_axis(q, targets.ids, mx.array(0.0), axis=-1).sum(axis=-1, keepdims=True)
    buckets = mx.concatenate([mx.take_along_axis(q, targets.ids, axis=-1), others], axis=-1)
    losses, slopes = _losses_and_slopes(objective, targets.probs, buckets)
    # The softmax's chain rule; every token outside the top ones has the slope of the last bucket.
    pulls = (slopes - (buckets * slopes).sum(axis=-1, keepdims=True)) / temperature
    of_top = buckets[:, :-1] * pulls[:, :-1]
    gradients = mx.put_along_axis(q * pulls[:, -1:], targets.ids, of_top, axis=-1)
    return losses, gradients[:, :vocab_size]


def _losses_and_slopes(objective: Objective, p: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
    """Losses [R] and their derivatives by the q of each bucket, [R, N + 1]."""
    logs = mx.log(mx.maximum(q, EPSILON))
    if objective is Objective.REVERSE_KL:
        ratios = logs - mx.log(mx.maximum(p, EPSILON))
        return (q * ratios).sum(axis=-1), ratios + (q >= EPSILON)
    if objective is Objective.TOTAL_VARIATION:
        return _variation(p, q)
    divergence = (p * (mx.log(mx.where(p > 0, p, 1.0)) - logs)).sum(axis=-1)
    slopes = mx.where(q >= EPSILON, -p / mx.maximum(q, EPSILON), 0.0)
    if objective is not Objective.LK_HYBRID:
        return divergence, slopes
    variation, variation_slopes = _variation(p, q)
    share = mx.exp(-LK_DECAY * (1 - variation))
    mixed = share[:, None] * slopes + (1 - share[:, None]) * variation_slopes
    return share * divergence + (1 - share) * variation, mixed


def _variation(p: mx.array, q: mx.array) -> tuple[mx.array, mx.array]:
    return 1 - mx.minimum(p, q).sum(axis=-1), -(q < p).astype(mx.float32)
