"""The rule of `backends/numpy/acceptance.py` in MLX operations: nothing here leaves the device.

Contract: pure functions of lazy arrays, float32; `n` sequences that are decided alike, each by numbers of its
own, `R` rows, `V` vocabulary entries, `K` draft tokens. What decides which operations there are is told apart
from those numbers, so that `mx.compile` takes any of these functions and one trace serves every temperature.
Only operations that the Metal, CUDA and CPU builds all have. Must not know models or caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from draftloop.types import TRACE_TOP_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.types import Sampling

# A flat float32 sum over 152k probabilities loses digits; sums of blocks, then within one, do not.
_BLOCK = 512


class Drafts(NamedTuple):
    """What is tested of n sequences.

    Attributes:
        tokens: [n, K] int32.
        counts: [n], how many of the K there are; what stands behind them changes nothing.
        q: [n, K, V_draft], or None for point masses on `tokens`; where the vocabularies differ, the entry
            that one side lacks has probability 0 there.
    """

    tokens: mx.array
    counts: mx.array
    q: mx.array | None


class Decision(NamedTuple):
    """What `accept` decided, on the device: m and the extra token [n], alphas and q(d_i) [n, K]."""

    accepted_tokens: mx.array
    extra_token: mx.array
    alphas: mx.array
    draft_probs: mx.array


class TopTokens(NamedTuple):
    """The head of distributions: ids and log-probabilities […, R, min(V, 32)], tail mass […, R]."""

    ids: mx.array
    logprobs: mx.array
    tail_mass: mx.array


@dataclass(frozen=True, slots=True)
class Stages:
    """Which steps a warping has."""

    greedy: bool
    top_k: bool
    top_p: bool
    min_p: bool

    @classmethod
    def of(cls, sampling: Sampling) -> Stages:
        """Those that are switched on."""
        if sampling.greedy:
            return cls(greedy=True, top_k=False, top_p=False, min_p=False)
        return cls(greedy=False, top_k=sampling.top_k > 0, top_p=sampling.top_p < 1, min_p=sampling.min_p > 0)


def numbers_of(samplings: Sequence[Sampling]) -> mx.array:
    """Temperature, top-k, top-p and min-p of each, [n, 4] float32; k is exact below 2^24."""
    numbers = [(one.temperature, one.top_k, one.top_p, one.min_p) for one in samplings]
    return mx.array(np.array(numbers, np.float32))


def barred_tokens(masked_ids: Sequence[int], width: int) -> NDArray[np.bool_]:
    """[V], true at those of the ids that lie within V."""
    barred = np.zeros(width, np.bool_)
    barred[[token for token in masked_ids if token < width]] = True
    return barred


def bar(scores: mx.array, barred: mx.array, masked_rows: mx.array) -> mx.array:
    """Scores […, R, V] without the barred tokens […, V] in the first `masked_rows` […] rows."""
    rows = mx.arange(scores.shape[-2]) < masked_rows[..., None]
    return mx.where(rows[..., None] & barred[..., None, :], -mx.inf, scores)


def warp(scores: mx.array, stages: Stages, numbers: mx.array) -> mx.array:
    """Masked logits […, R, V] → the distributions that tokens are drawn from, as the reference has it.

    Args:
        scores: float32.
        stages: what is done.
        numbers: by how much, […, 4], as `numbers_of` has them.
    """
    vocabulary = mx.arange(scores.shape[-1])
    if stages.greedy:
        best: mx.array = scores.argmax(axis=-1, keepdims=True)
        return (vocabulary == best).astype(mx.float32)
    temperature, top_k, top_p, min_p = (numbers[..., index, None, None] for index in range(4))
    probs = mx.softmax((scores - scores.max(axis=-1, keepdims=True)) / temperature, axis=-1, precise=True)
    if stages.top_k or stages.top_p:
        order = mx.argsort(-scores, axis=-1)
        ranked = mx.take_along_axis(probs, order, axis=-1)
        if stages.top_k:
            ranked = _normalize(mx.where(vocabulary < top_k, ranked, 0.0))
        if stages.top_p:
            mass_before = ranked.cumsum(axis=-1) - ranked
            ranked = mx.where(mass_before < top_p, ranked, 0.0)
        probs = mx.put_along_axis(mx.zeros_like(probs), order, ranked, axis=-1)
    if stages.min_p:
        probs = mx.where(probs < min_p * probs.max(axis=-1, keepdims=True), 0.0, probs)
    return _normalize(probs)


def draw(weights: mx.array, uniforms: mx.array) -> mx.array:
    """Inverse CDF of weights [n, V] at uniforms [n] in [0, 1): indices of positive weight, [n] int32."""
    blocks = mx.pad(weights, [(0, 0), (0, -weights.shape[1] % _BLOCK)]).reshape(len(weights), -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    cumulative = sums.cumsum(axis=-1)
    targets = uniforms * cumulative[:, -1]
    block = _first_above(cumulative, sums, targets)
    before = _at(mx.pad(cumulative, [(0, 0), (1, 0)]), block)
    inner = _at(blocks, block)
    return block * _BLOCK + _first_above(inner.cumsum(axis=-1), inner, targets - before)


def accept(p: mx.array, drafts: Drafts, accept_uniforms: mx.array, extra_uniforms: mx.array) -> Decision:
    """Keep draft tokens so that the output is distributed as p (Leviathan et al. 2023, Algorithm 1).

    Args:
        p: [n, K + 1, V_target].
        drafts: with K tokens each.
        accept_uniforms: [n, K].
        extra_uniforms: [n, K + 1].
    """
    tokens, counts, q = drafts
    (n, k), width = tokens.shape, p.shape[2]
    if k == 0:
        none = mx.zeros((n, 0))
        return Decision(mx.zeros(n, mx.int32), draw(p[:, 0], extra_uniforms[:, 0]), none, none)
    if q is None:
        draft_probs = mx.ones((n, k))
        proposed = (mx.arange(width) == tokens[..., None]).astype(mx.float32)
    else:
        draft_probs = mx.take_along_axis(q, tokens[..., None], axis=-1)[..., 0]
        proposed = _fit(q, width)
    # An id that the target lacks reads another's probability, and is then set to 0.
    inside = mx.minimum(tokens, width - 1)[..., None]
    target_probs = mx.where(tokens < width, mx.take_along_axis(p[:, :k], inside, axis=-1)[..., 0], 0.0)
    kept_so_far = (accept_uniforms * draft_probs < target_probs) & (mx.arange(k) < counts[:, None])
    kept = kept_so_far.astype(mx.int32).cumprod(axis=-1).sum(axis=-1)
    row = _at(p, kept)
    # Nothing was proposed in the row behind the last draft, so there the residual is p itself: the bonus.
    guessed = mx.where((kept < counts)[:, None], _at(proposed, mx.minimum(kept, k - 1)), 0.0)
    residual = mx.maximum(row - guessed, 0.0)
    # All zero means p == q up to rounding: a rejection is then itself a rounding error, and p is the limit.
    weights = mx.where(residual.sum(axis=-1, keepdims=True) > 0, residual, row)
    return Decision(
        accepted_tokens=kept,
        extra_token=draw(weights, _at(extra_uniforms, kept)),
        alphas=mx.minimum(p[:, :k], proposed).sum(axis=-1),
        draft_probs=draft_probs,
    )


def top_tokens(logits: mx.array) -> TopTokens:
    """The most likely tokens of each row […, V], at temperature 1 and unmasked, most likely first."""
    scores = logits.astype(mx.float32)
    logprobs = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    count = min(TRACE_TOP_TOKENS, logprobs.shape[-1])
    ids = mx.argsort(-logprobs, axis=-1)[..., :count]
    top = mx.take_along_axis(logprobs, ids, axis=-1)
    return TopTokens(ids, top, mx.maximum(1 - mx.exp(top).sum(axis=-1), 0.0))


def _first_above(cumulative: mx.array, weights: mx.array, targets: mx.array) -> mx.array:
    """The first index of positive weight whose cumulative sum exceeds the target; else the last positive.

    Sums and weights [n, V], targets and indices [n].
    """
    # A parallel scan may round so that a sum grows across a zero; hence the look at the weight itself.
    positive = weights > 0
    index = mx.arange(weights.shape[-1])
    above = positive & (cumulative > targets[:, None])
    first = mx.where(above, index, weights.shape[-1]).min(axis=-1)
    return mx.minimum(first, mx.where(positive, index, 0).max(axis=-1))


def _at(rows: mx.array, index: mx.array) -> mx.array:
    """Of each of n, the row with its own index: [n, R, …], [n] → [n, …]."""
    return rows[mx.arange(len(rows)), index]


def _normalize(weights: mx.array) -> mx.array:
    return weights / weights.sum(axis=-1, keepdims=True)


def _fit(q: mx.array, width: int) -> mx.array:
    """[…, V_draft] → […, width], cut or filled with zeros."""
    missing = max(0, width - q.shape[-1])
    return mx.pad(q[..., :width], [*[(0, 0)] * (q.ndim - 1), (0, missing)])
