"""A stored request as the draft learns from it: the target's distribution, warped as it was served.

Contract: pure; needs neither model. What a trace cannot tell (the shape of p behind its 32 top tokens) is
modelled in one place, `_weights`. Must not know the store or a backend. R response rows, N <= 32 top tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.training import Example
from draftloop.types import Rules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from draftloop.storage.records import RequestRecord
    from draftloop.types import Sampling

    Floats = NDArray[np.float64]

_NO_TAIL = 1e-6
"""A stored tail mass below this is what rounding leaves of 1 minus a sum of float32 probabilities."""


def example_of(
    record: RequestRecord, *, max_sequence_tokens: int, eos_token_ids: Iterable[int]
) -> Example | None:
    """The request as an example; None where no answer token is left to learn from.

    p goes through mask, temperature, top-k, top-p and min-p in the order of `backends/numpy/acceptance.py`,
    ties in the trace's order. It is exact where the vocabulary has at most 32 tokens, and at temperature 1
    where the nucleus ends within the trace; else within the error of the tail's model (`_weights`). Greedy
    requests keep p at temperature 1, with the mask alone.

    Args:
        record: as stored.
        max_sequence_tokens: longer ones lose their end; positions stay those of serving.
        eos_token_ids: without probability while `min_tokens` was not reached.
    """
    length = min(len(record.prompt_tokens) + len(record.answer_tokens), max_sequence_tokens)
    num_rows = length - len(record.prompt_tokens)
    if num_rows < 1:
        return None
    traces = record.traces
    num_top = int((traces.top_ids[:num_rows] >= 0).sum(axis=1).min())
    ids = np.ascontiguousarray(traces.top_ids[:num_rows, :num_top])
    rules = Rules(
        sampling=record.sampling,
        masked_ids=tuple(sorted(set(eos_token_ids))),
        masked_rows=max(0, record.min_tokens - 1),
    )
    # Fewer real tokens than a trace has room for are the whole vocabulary.
    whole = num_top < traces.top_ids.shape[1]
    tail_mass = traces.tail_mass[:num_rows].astype(np.float64) * (0.0 if whole else 1.0)
    masked = np.isin(ids, rules.masked_ids) & (np.arange(num_rows) < rules.masked_rows)[:, None]
    logprobs = traces.top_logprobs[:num_rows, :num_top].astype(np.float64)
    top, tail = _warp(logprobs, tail_mass, masked, record.sampling)
    return Example(
        tokens=np.concatenate([record.prompt_tokens, record.answer_tokens])[:length].astype(np.int32),
        num_prompt_tokens=len(record.prompt_tokens),
        top_ids=ids.astype(np.int32),
        top_probs=top.astype(np.float32),
        tail_probs=tail.astype(np.float32),
        rules=rules,
    )


def _warp(
    logprobs: Floats, tail_mass: Floats, masked: NDArray[np.bool_], sampling: Sampling
) -> tuple[Floats, Floats]:
    """Traces at temperature 1 -> p of the top tokens [R, N] and of everything else [R]."""
    top, tail_tokens, tail_token = _weights(
        logprobs, tail_mass, masked, 1.0 if sampling.greedy else sampling.temperature
    )
    if sampling.greedy:
        return _normalized(top, tail_tokens * tail_token)
    if sampling.top_k > 0:
        rank = np.cumsum(~masked, axis=1)
        top[rank > sampling.top_k] = 0
        tail_tokens = np.minimum(tail_tokens, np.maximum(sampling.top_k - rank[:, -1], 0))
    top, tail = _normalized(top, tail_tokens * tail_token)
    share = np.divide(tail, tail_tokens, out=np.zeros_like(tail), where=tail_tokens > 0)
    if sampling.top_p < 1:
        # The tail is last: the nucleus takes of it what it still needs.
        tail = np.minimum(tail, np.maximum(sampling.top_p - top.sum(axis=1), 0))
        mass_before = top.cumsum(axis=1) - top
        top[mass_before >= sampling.top_p] = 0
    if sampling.min_p > 0:
        floor = sampling.min_p * top.max(axis=1)
        top[top < floor[:, None]] = 0
        tail[share < floor] = 0
    return _normalized(top, tail)


def _weights(
    logprobs: Floats, tail_mass: Floats, masked: NDArray[np.bool_], temperature: float
) -> tuple[Floats, Floats, Floats]:
    """p^(1/temperature) up to a factor: of the top tokens [R, N], how many tail tokens [R], of each [R].

    Of the tail only its mass at temperature 1 is known. It is taken for tail_mass / p_N tokens as likely as
    the least likely top token. No tail token is likelier, so below temperature 1 this is the most that the
    tail can weigh, at temperature 1 it is exact, and above it is the least.
    """
    alive = np.where(masked, -np.inf, logprobs)
    peak = alive.max(axis=1)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    last = np.where(np.isfinite(logprobs), logprobs, np.inf).min(axis=1)
    tail_tokens = np.where(tail_mass < _NO_TAIL, 0.0, tail_mass) / np.exp(last)
    top = np.exp((alive - peak[:, None]) / temperature)
    return top, tail_tokens, np.exp((last - peak) / temperature)


def _normalized(top: Floats, tail: Floats) -> tuple[Floats, Floats]:
    total = top.sum(axis=1) + tail
    return top / total[:, None], tail / total
