"""The reference of the rule: how logits become distributions, and which tokens a round keeps.

Contract: pure functions of arrays, in float64; `R` rows, `V` vocabulary entries, `K` draft tokens. Other
backends compute the same on their device and are tested against this file. Must not know models, caches
or where a draft token came from.

Sources: Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via Speculative Decoding",
Algorithm 1 (accept and recover); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from draftloop.types import TRACE_TOP_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.types import Sampling

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Decision:
    """What `accept` decided.

    Attributes:
        accepted_tokens: m.
        extra_token: the recovered or bonus token.
        alphas: Σ_x min(p(x), q(x)) of the min(m + 1, K) tested positions.
    """

    accepted_tokens: int
    extra_token: int
    alphas: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The head of R distributions at temperature 1: ids and log-probabilities [R, 32], tail mass [R]."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_mass: NDArray[np.float32]


def warp(
    logits: NDArray[np.float32], sampling: Sampling, masked_ids: Sequence[int] = (), masked_rows: int = 0
) -> Floats:
    """Turn logits into the distributions that tokens are drawn from.

    The order is mask, temperature, top-k, top-p, min-p. Ties go to the lower token id. Top-p keeps the
    smallest set whose mass reaches it, the token that crosses included; greedy is a point mass.

    Args:
        logits: [R, V].
        sampling: the warping.
        masked_ids: tokens without probability in the first `masked_rows` rows.
        masked_rows: how many rows are masked; may exceed R.

    Returns:
        [R, V] probabilities; each row sums to 1.
    """
    scores = logits.astype(np.float64)
    if masked_rows > 0:
        scores[:masked_rows, [token for token in masked_ids if token < scores.shape[1]]] = -np.inf
    if sampling.greedy:
        probs = np.zeros_like(scores)
        np.put_along_axis(probs, scores.argmax(axis=-1, keepdims=True), 1.0, axis=-1)
        return probs
    scores = (scores - scores.max(axis=-1, keepdims=True)) / sampling.temperature
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = _softmax(np.take_along_axis(scores, order, axis=-1))
    if sampling.top_k > 0:
        ranked[:, sampling.top_k :] = 0
        ranked /= ranked.sum(axis=-1, keepdims=True)
    if sampling.top_p < 1:
        mass_before = ranked.cumsum(axis=-1) - ranked
        ranked[mass_before >= sampling.top_p] = 0
    if sampling.min_p > 0:
        ranked[ranked < sampling.min_p * ranked[:, :1]] = 0
    probs = np.zeros_like(ranked)
    np.put_along_axis(probs, order, ranked / ranked.sum(axis=-1, keepdims=True), axis=-1)
    return probs


def draw(weights: Floats, uniform: float) -> int:
    """Inverse CDF: the first index whose cumulative sum exceeds `uniform` times the total.

    Args:
        weights: [V], not negative, not all zero; need not sum to 1.
        uniform: in [0, 1).

    Returns:
        An index of positive weight.
    """
    cumulative = weights.cumsum()
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # A uniform next to 1 may round up to the total; the last token with any weight is then the one.
    return min(index, int(np.flatnonzero(weights)[-1]))


def accept(
    p: Floats,
    q: Floats | None,
    tokens: Sequence[int],
    accept_uniforms: NDArray[np.float32],
    extra_uniforms: NDArray[np.float32],
) -> Decision:
    """Keep draft tokens so that the output is distributed as p (Leviathan et al. 2023, Algorithm 1).

    Token d_i is kept where u_i · q_i(d_i) < p_i(d_i), that is with probability min(1, p/q). The first
    rejected one is replaced by a draw from norm(max(p − q, 0)); if none is rejected, a bonus token is
    drawn from the last row of p.

    Args:
        p: [K + 1, V_target].
        q: [K, V_draft]; None means point masses on `tokens`. The vocabularies may differ by padding:
            an entry that one side lacks has probability 0 there.
        tokens: K draft tokens.
        accept_uniforms: [K].
        extra_uniforms: [K + 1]; row m's draws the extra token.
    """
    width = p.shape[1]
    proposed = _point_masses(tokens, width) if q is None else q
    kept = 0
    for i, token in enumerate(tokens):
        p_token = p[i, token] if token < width else 0.0
        q_token = 1.0 if q is None else q[i, token]
        if not float(accept_uniforms[i]) * q_token < p_token:
            break
        kept += 1
    common = min(width, proposed.shape[1])
    tested = min(kept + 1, len(tokens))
    alphas = np.minimum(p[:tested, :common], proposed[:tested, :common]).sum(axis=-1)
    weights = p[kept].copy()
    if kept < len(tokens):
        weights[:common] -= np.minimum(weights[:common], proposed[kept, :common])
        if not weights.any():
            # p == q up to rounding: a rejection is then itself a rounding error, and p is the limit.
            weights = p[kept]
    return Decision(kept, draw(weights, float(extra_uniforms[kept])), tuple(alphas.tolist()))


def top_tokens(logits: NDArray[np.float32]) -> TopTokens:
    """The 32 most likely tokens of each row [R, V], at temperature 1 and unmasked, most likely first.

    Where V < 32 the rest is filled with id -1 and log-probability -inf.
    """
    scores = logits.astype(np.float64)
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :TRACE_TOP_TOKENS]
    logprobs = np.log(_softmax(scores))
    top = np.take_along_axis(logprobs, order, axis=-1)
    missing = ((0, 0), (0, TRACE_TOP_TOKENS - order.shape[1]))
    return TopTokens(
        ids=np.pad(order, missing, constant_values=-1).astype(np.int32),
        logprobs=np.pad(top, missing, constant_values=-np.inf).astype(np.float32),
        tail_mass=np.maximum(1 - np.exp(top).sum(axis=-1), 0).astype(np.float32),
    )


def _softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    normalized: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return normalized


def _point_masses(tokens: Sequence[int], width: int) -> Floats:
    masses = np.zeros((len(tokens), max(width - 1, *tokens, 0) + 1))
    masses[np.arange(len(tokens)), list(tokens)] = 1
    return masses
