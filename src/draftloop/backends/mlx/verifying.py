"""Verdicts for a batch of sequences: one forward of the target, one decision for those alike, one transfer.

Contract: the one wait for the device in a round is here. Each sequence is decided by its own rules, proposal
and uniforms, as if it were alone; those with fewer drafts than others are padded. Must not know networks.

Letters: n sequences, K draft tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from draftloop.backends.biases import target_biases
from draftloop.backends.mlx.acceptance import Drafts, Stages, accept, bar, top_tokens, warp
from draftloop.backends.mlx.parts import Part, alike, barred, in_batch_order, numbers, padded
from draftloop.backends.mlx.steps import ids
from draftloop.types import TRACE_TOP_TOKENS, Trace, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.backends.base import VerifyJob
    from draftloop.backends.mlx.cache import MlxCache
    from draftloop.backends.mlx.steps import Steps

    Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class VerifyKind:
    """What decides which operations a verdict takes.

    Attributes:
        stages: the warping's.
        masked: whether some rows have barred tokens.
        biased: whether something is added to each row.
        point_mass: whether the drafts come without q.
        trace: whether the top tokens are wanted.
    """

    stages: Stages
    masked: bool
    biased: bool
    point_mass: bool
    trace: bool


def verify(steps: Steps, vocab_size: int, batch: Sequence[VerifyJob]) -> list[Verdict]:
    """Test each job's proposal.

    Args:
        steps: of the target.
        vocab_size: V of the target.
        batch: at least one.
    """
    groups = alike([_kind(job, vocab_size) for job in batch])
    order = [index for members in groups.values() for index in members]
    parts, texts, most = [], [], max(job.proposal.num_tokens for job in batch)
    for kind, members in groups.items():
        jobs = [batch[index] for index in members]
        parts.append(_part(kind, jobs, vocab_size))
        drafts = parts[-1].inputs[0]
        missing = most - drafts.shape[1]
        texts.append(mx.pad(drafts, [(0, 0), (0, missing)]) if missing else drafts)
    last = ids([batch[index].last for index in order])[:, None]
    tokens = mx.concatenate([last, texts[0] if len(texts) == 1 else mx.concatenate(texts)], axis=1)
    widths = [batch[index].proposal.num_tokens + 1 for index in order]
    caches = [cast("MlxCache", batch[index].cache) for index in order]
    decided = [outputs[0] for outputs in steps.verify(caches, tokens, widths, parts)]
    packed = np.array(mx.concatenate([one.reshape(-1) for one in decided]))
    ends = np.cumsum([one.size for one in decided])[:-1]
    rows = [
        row
        for part, flat in zip(parts, np.split(packed, ends), strict=True)
        for row in flat.reshape(part.count, -1)
    ]
    most_of = [part.rows - 1 for part in parts for _ in range(part.count)]
    verdicts = [
        _verdict(row, batch[index], most, vocab_size)
        for row, index, most in zip(rows, order, most_of, strict=True)
    ]
    return in_batch_order(verdicts, order)


def _kind(job: VerifyJob, vocab_size: int) -> VerifyKind:
    rules = job.rules
    return VerifyKind(
        stages=Stages.of(rules.sampling),
        masked=rules.masked_rows > 0 and any(token < vocab_size for token in rules.masked_ids),
        biased=rules.processor is not None,
        point_mass=job.proposal.q is None,
        trace=job.trace,
    )


def _part(kind: VerifyKind, jobs: Sequence[VerifyJob], vocab_size: int) -> Part:
    """Their drafts [n, K], filled to the most among them, come first of the inputs."""
    rules, counts = [job.rules for job in jobs], [job.proposal.num_tokens for job in jobs]
    most = max(counts)
    inputs = [
        mx.stack([_filled(_drafts(job), most) for job in jobs]),
        ids(counts),
        numbers(rules),
        padded([job.accept_uniforms for job in jobs], most),
        padded([job.extra_uniforms for job in jobs], most + 1),
    ]
    if kind.biased:
        inputs.append(mx.array(np.stack([_biases(job, most + 1, vocab_size) for job in jobs])))
    if kind.masked:
        inputs += [barred(rules, vocab_size), ids([one.masked_rows for one in rules])]
    if not kind.point_mass:
        inputs.append(mx.stack([_filled(cast("mx.array", job.proposal.q), most) for job in jobs]))
    return Part(kind, partial(_decide, kind), inputs, len(jobs), rows=most + 1)


def _drafts(job: VerifyJob) -> mx.array:
    tokens = job.proposal.tokens
    return tokens if isinstance(tokens, mx.array) else ids(tokens)


def _filled(rows: mx.array, count: int) -> mx.array:
    """[K, …] → [count, …]."""
    missing = count - len(rows)
    return mx.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)]) if missing else rows


def _biases(job: VerifyJob, rows: int, vocab_size: int) -> Floats:
    """[rows, V]; nothing is added to those that are not the job's."""
    if job.rules.processor is None:
        raise ValueError("nothing is added where there is no processor")
    own = target_biases(job.rules.processor, np.array(_drafts(job)).tolist(), vocab_size)
    return np.pad(own, ((0, rows - len(own)), (0, 0)))


def _decide(
    kind: VerifyKind,
    logits: mx.array,
    *inputs: mx.array,
) -> list[mx.array]:
    """Logits [n, K + 1, V] → all of each verdict in one row of float32.

    Ids travel as float32 too, which is exact below 2^24.
    """
    drafts, counts, own_numbers, accept_uniforms, extra_uniforms, *rest = inputs
    scores = logits.astype(mx.float32)
    if kind.biased:
        scores, rest = scores + rest[0], rest[1:]
    if kind.masked:
        scores = bar(scores, rest[0], rest[1])
    q = None if kind.point_mass else rest[-1]
    p = warp(scores, kind.stages, own_numbers)
    decision = accept(p, Drafts(drafts, counts, q), accept_uniforms, extra_uniforms)
    parts = [
        decision.accepted_tokens,
        decision.extra_token,
        drafts,
        decision.alphas,
        decision.draft_probs,
        *(top_tokens(logits) if kind.trace else ()),
    ]
    return [mx.concatenate([part.astype(mx.float32).reshape(len(logits), -1) for part in parts], axis=1)]


def _verdict(row: Floats, job: VerifyJob, most: int, vocab_size: int) -> Verdict:
    """Read what `_decide` packed for one sequence, whose K is filled to `most`, on the host."""
    k, columns = job.proposal.num_tokens, min(TRACE_TOP_TOKENS, vocab_size)
    top_sizes = ((most + 1) * columns, (most + 1) * columns, most + 1) if job.trace else ()
    sizes = [1, 1, most, most, most, *top_sizes]
    accepted, extra, drafts, alphas, draft_probs, *top = np.split(row, np.cumsum(sizes)[:-1])
    tokens, kept = tuple(int(token) for token in drafts[:k]), int(accepted[0])
    trace = _trace(top, tokens, draft_probs[:k], kept + 1) if job.trace else None
    tested = alphas[: min(kept + 1, k)]
    return Verdict(tokens, kept, int(extra[0]), tuple(float(alpha) for alpha in tested), trace)


def _trace(top: Sequence[Floats], tokens: tuple[int, ...], draft_probs: Floats, rows: int) -> Trace:
    """The first `rows` rows of the target's top tokens, beside what was proposed there."""
    top_ids, logprobs, tail_mass = top
    columns = top_ids.size // tail_mass.size
    missing = ((0, 0), (0, TRACE_TOP_TOKENS - columns))
    return Trace(
        top_ids=np.pad(top_ids.reshape(-1, columns)[:rows], missing, constant_values=-1).astype(np.int32),
        top_logprobs=np.pad(logprobs.reshape(-1, columns)[:rows], missing, constant_values=-np.inf),
        tail_mass=tail_mass[:rows].copy(),
        # The bonus row has no draft token: -1, with probability 0.
        draft_ids=np.array((*tokens, -1)[:rows], np.int32),
        draft_probs=np.append(draft_probs, np.float32(0))[:rows],
    )
