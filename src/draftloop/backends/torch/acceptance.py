"""Warping, drawing and the accept / recover / bonus rule on the device.

Contract: the same results as the NumPy reference (`backends/numpy/acceptance.py`), with no host sync on a
GPU. Several sequences' rows stand one behind another, each one's last row behind its last guess. Must not
know a model. Letters: R rows, S sequences, V vocabulary, K draft tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from draftloop.backends.biases import target_biases
from draftloop.types import TRACE_TOP_TOKENS, Trace, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from draftloop.backends.base import Proposal, VerifyJob
    from draftloop.types import Rules, Sampling

_NUCLEUS_CANDIDATES = (64, 1024)
"""On a CPU the nucleus is looked for among so many top tokens first: a full sort of 150,000 takes fifty times
as long as finding 64 of them."""

_TOP_BLOCK = 128
"""Columns that `_top` looks at together."""

NO_GUESS = 2**31 - 1
"""In place of a guess behind the last one: no token of any vocabulary, and so kept by nobody."""


def mask(logits: torch.Tensor, rules: Rules, first_row: int = 0) -> torch.Tensor:
    """[R, V] logits with the masked ids at -inf in the rows that `rules` still masks."""
    rows = min(len(logits), rules.masked_rows - first_row)
    if rows < 1 or not rules.masked_ids:
        return logits
    masked = logits.clone()
    masked[:rows, [token for token in rules.masked_ids if token < logits.shape[1]]] = -torch.inf
    return masked


def warp(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[R, V] logits -> [R, V] float32 probabilities; temperature, top-k, top-p, min-p in this order."""
    if sampling.greedy:
        probs = torch.zeros_like(logits)
        return probs.scatter_(1, logits.argmax(dim=-1, keepdim=True), 1.0)
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    if 0 < sampling.top_k < probs.shape[1]:
        probs = _keep_top(probs, sampling.top_k)
    if sampling.top_p < 1.0:
        probs = _keep_nucleus(probs, sampling.top_p)
    if sampling.min_p > 0.0:
        floor = sampling.min_p * probs.amax(dim=-1, keepdim=True)
        probs = _normalize(torch.where(probs >= floor, probs, 0.0))
    return probs


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: the first index whose cumulative mass exceeds u; probs [R, V], uniforms [R] -> [R]."""
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Rounding may lift u·total to total itself, behind which only tokens of no mass remain.
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniforms.double().unsqueeze(1) * total, below)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def drawn(
    logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Columns [R] drawn from logits [R, V], and their distributions q [R, V]; None where they are points."""
    if sampling.greedy:
        return logits.argmax(dim=-1), None
    probs = warp(logits, sampling)
    return draw(probs, uniforms), probs


@dataclass(frozen=True, slots=True)
class Decision:
    """What `decide` found, on the device: accepted and extra are [S], alphas is [R]."""

    accepted: torch.Tensor
    extra: torch.Tensor
    alphas: torch.Tensor


def decide(
    p: torch.Tensor,
    q: torch.Tensor | None,
    guesses: torch.Tensor,
    first_rows: torch.Tensor,
    uniforms: tuple[torch.Tensor, torch.Tensor],
) -> Decision:
    """Leviathan et al. 2023, Algorithm 1, for several sequences.

    p, q: [R, V], q without mass where nothing was guessed, or None (point masses); guesses: [R], `NO_GUESS`
    in each sequence's last row; first_rows: [S]; uniforms: to keep by and to draw by, [R] each.
    """
    accept_uniforms, extra_uniforms = uniforms
    # An id past the vocabulary (the other model's padding) has no probability, and nothing to remove.
    columns, outside = guesses.clamp(max=p.shape[1] - 1).unsqueeze(1), (guesses >= p.shape[1]).unsqueeze(1)
    p_guess = p.gather(1, columns).masked_fill(outside, 0.0).squeeze(1)
    if q is None:
        kept, alphas = accept_uniforms < p_guess, p_guess
    else:
        kept = accept_uniforms * q.gather(1, columns).squeeze(1) < p_guess
        alphas = torch.minimum(p, q).sum(dim=-1)
    accepted = _accepted(kept, first_rows)
    at = first_rows + accepted
    source = p.index_select(0, at)
    if q is None:
        column, nothing = columns.index_select(0, at), outside.index_select(0, at)
        removed = torch.where(nothing, source.gather(1, column), 0.0)
        residual = source.scatter(1, column, removed)
    else:
        residual = (source - q.index_select(0, at)).clamp_(min=0.0)
    # Where rounding leaves nothing of p - q, p and q agree and p itself is the right source.
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, source)
    return Decision(accepted, draw(residual, extra_uniforms.index_select(0, at)), alphas)


def decide_greedily(logits: torch.Tensor, guesses: torch.Tensor, first_rows: torch.Tensor) -> Decision:
    """`decide` where p and q are point masses, whatever the uniforms: logits [R, V], guesses [R].

    It spares the distributions, whose making takes as long on a GPU as a small model's step.
    """
    best = logits.argmax(dim=-1)
    kept = best == guesses
    accepted = _accepted(kept, first_rows)
    return Decision(accepted, best.index_select(0, first_rows + accepted), kept.float())


def _accepted(kept: torch.Tensor, first_rows: torch.Tensor) -> torch.Tensor:
    """[R], [S] -> [S]: rows from each first one on up to the first that is not kept, as each last one is."""
    rows = first_rows.unsqueeze(1) + torch.arange(len(kept), device=kept.device)
    return kept[rows.clamp_(max=len(kept) - 1)].long().cumprod(dim=1).sum(dim=1)


def verdict_of(logits: torch.Tensor, job: VerifyJob) -> Verdict:
    """[K+1, V] float32 logits of the target -> the verdict, brought to the host in one transfer.

    A processor has to be told the guesses, so they are brought there before.
    """
    device = logits.device
    tokens, q = on_device(job.proposal, logits.shape[1], device)
    accept = torch.nn.functional.pad(to_device(job.accept_uniforms, device), (0, 1))
    uniforms = accept, to_device(job.extra_uniforms, device)
    sampling, biased = job.rules.sampling, logits
    if job.rules.processor is not None:
        biases = target_biases(job.rules.processor, tokens.tolist(), logits.shape[1])
        biased = logits + to_device(biases, device)
    found = outcome(
        logits,
        mask(biased, job.rules),
        torch.nn.functional.pad(tokens, (0, 1), value=NO_GUESS),
        None if q is None else torch.nn.functional.pad(q, (0, 0, 0, 1)),
        torch.zeros(1, dtype=torch.long, device=device),
        uniforms=uniforms,
        sampling=sampling,
        trace=job.trace,
    )
    return told(found, [job], sequences=1)[0]


def outcome(
    logits: torch.Tensor,
    masked: torch.Tensor,
    guesses: torch.Tensor,
    q: torch.Tensor | None,
    first_rows: torch.Tensor,
    *,
    uniforms: tuple[torch.Tensor, torch.Tensor],
    sampling: Sampling,
    trace: bool,
) -> torch.Tensor:
    """What `told` reads, on the device and without waiting for it: one row of float64.

    logits, masked: [R, V] float32; the others: see `decide`.
    """
    if q is None and sampling.greedy:
        decision = decide_greedily(masked, guesses, first_rows)
    else:
        p = warp(masked, sampling)
        if q is not None and q.shape[1] > p.shape[1]:
            p = torch.nn.functional.pad(p, (0, q.shape[1] - p.shape[1]))
        decision = decide(p, q, guesses, first_rows, uniforms)
    parts = [decision.accepted, decision.extra, guesses, decision.alphas]
    if trace:
        parts += _trace_parts(logits, guesses, q)
    # Ids are below 2^53, so one float64 array carries everything.
    return torch.cat([part.flatten().double() for part in parts])


def told(outcome_row: torch.Tensor, jobs: Sequence[VerifyJob], *, sequences: int) -> list[Verdict]:
    """The verdicts out of what `outcome` found for S >= len(jobs) sequences: the one transfer to the host."""
    host = outcome_row.cpu().numpy()
    accepted, extra, by_row = host[:sequences], host[sequences : 2 * sequences], host[2 * sequences :]
    width = 2 + (2 * TRACE_TOP_TOKENS + 2 if jobs[0].trace else 0)
    rows = len(by_row) // width
    guesses, alphas, traced = by_row[:rows], by_row[rows : 2 * rows], by_row[2 * rows :]
    verdicts, first = [], 0
    for job, m, token in zip(jobs, accepted.astype(int).tolist(), extra.astype(int).tolist(), strict=False):
        k = job.proposal.num_tokens
        drafted = guesses[first : first + k]
        verdicts.append(
            Verdict(
                drafted_tokens=tuple(drafted.astype(int).tolist()),
                accepted_tokens=m,
                extra_token=token,
                alphas=tuple(alphas[first : first + min(m + 1, k)].tolist()),
                trace=_trace_of(traced, drafted, rows, first, m) if job.trace else None,
            )
        )
        first += k + 1
    return verdicts


def to_device(values: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """A small host array on the device, without waiting for it."""
    return torch.from_numpy(values.copy()).to(device, non_blocking=True)


def on_device(
    proposal: Proposal, vocab_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A proposal's tokens [K] and q [K, at least V] or None, on `device`."""
    if isinstance(proposal.tokens, torch.Tensor):
        tokens = proposal.tokens
    else:
        tokens = torch.tensor(proposal.tokens, dtype=torch.long, device=device)
    q = proposal.q
    if isinstance(q, torch.Tensor) and q.shape[1] < vocab_size:
        q = torch.nn.functional.pad(q, (0, vocab_size - q.shape[1]))
    return tokens, q


def _normalize(probs: torch.Tensor) -> torch.Tensor:
    return probs / probs.sum(dim=-1, keepdim=True)


def _keep_top(probs: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` most likely of each row; of equals the lower id."""
    order = probs.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return _normalize(torch.zeros_like(probs).scatter_(1, order, probs.gather(1, order)))


def _keep_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of most likely tokens whose mass reaches `top_p` (Holtzman et al. 2020)."""
    if probs.device.type == "cpu":
        return _few_sorted(probs, top_p, _NUCLEUS_CANDIDATES)
    ids = torch.arange(probs.shape[1], device=probs.device).expand(len(probs), -1)
    return _nucleus_of(probs, *_ranked(probs, ids), top_p)


def _nucleus_of(probs: torch.Tensor, values: torch.Tensor, order: torch.Tensor, top_p: float) -> torch.Tensor:
    """Its tokens out of the most likely ones [R, n], which hold `top_p` of the mass."""
    before = values.cumsum(dim=-1, dtype=torch.float64) - values
    return _normalize(torch.zeros_like(probs).scatter_(1, order, torch.where(before < top_p, values, 0.0)))


def _few_sorted(probs: torch.Tensor, top_p: float, counts: tuple[int, ...]) -> torch.Tensor:
    """The same, looked for among few tokens first, and row by row among all that may matter last."""
    if not counts or probs.shape[1] <= counts[0]:
        if len(probs) > 1:
            return torch.cat([_few_sorted(row, top_p, ()) for row in probs.split(1)])
        # What is rarer than this holds less than 1 - top_p together.
        order = (probs[0] >= 0.99 * (1 - top_p) / probs.shape[1]).nonzero().view(1, -1)
        return _nucleus_of(probs, *_ranked(probs.gather(1, order), order), top_p)
    values, order = _top(probs, counts[0])
    # One more than is used shows whether a tie crosses the end: then ids decide, so more are looked at.
    settled = values[:, :-1].sum(dim=-1) - values[:, 0] * 1e-6 > top_p
    settled &= values[:, -2] > values[:, -1]
    # Stable by id within equal values: topk promises no order there.
    by_id = order.argsort(dim=-1)
    kept = _nucleus_of(probs, *_ranked(values.gather(1, by_id), order.gather(1, by_id)), top_p)
    (others,) = (~settled).nonzero(as_tuple=True)
    if len(others):
        kept[others] = _few_sorted(probs[others], top_p, counts[1:])
    return kept


def _ranked(values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [R, n], ids ascending, by falling values."""
    ranked = values.sort(dim=-1, descending=True, stable=True)
    return ranked.values, ids.gather(1, ranked.indices)


def _trace_parts(logits: torch.Tensor, guesses: torch.Tensor, q: torch.Tensor | None) -> list[torch.Tensor]:
    logprobs = torch.log_softmax(logits, dim=-1)
    top_values, top_ids = _top(logprobs, min(TRACE_TOP_TOKENS, logits.shape[1]))
    tail = (1.0 - top_values.double().exp().sum(dim=-1)).clamp_(min=0.0)
    if q is None:
        guessed = torch.ones_like(tail)
    else:
        guessed = q.gather(1, guesses.clamp(max=q.shape[1] - 1).unsqueeze(1)).squeeze(1)
    missing = (0, TRACE_TOP_TOKENS - top_ids.shape[1])
    ids = torch.nn.functional.pad(top_ids, missing, value=-1)
    return [ids, torch.nn.functional.pad(top_values, missing, value=-torch.inf), tail, guessed]


def _top(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row [R, V] and their columns, largest first.

    On a CPU topk reads a wide row many times over. The largest values lie in the `count` blocks with the
    largest maxima, and the columns behind the last whole block are looked at as well.
    """
    rows, width = values.shape
    whole = width // _TOP_BLOCK * _TOP_BLOCK
    if values.device.type != "cpu" or whole < 2 * count * _TOP_BLOCK:
        top = values.topk(count, dim=-1)
        return top.values, top.indices
    maxima = values[:, :whole].view(rows, -1, _TOP_BLOCK).amax(dim=-1)
    blocks = maxima.topk(count, dim=-1).indices
    columns = (blocks.unsqueeze(-1) * _TOP_BLOCK + torch.arange(_TOP_BLOCK)).view(rows, -1)
    columns = torch.cat((columns, torch.arange(whole, width).expand(rows, -1)), dim=1)
    top = values.gather(1, columns).topk(count, dim=-1)
    return top.values, columns.gather(1, top.indices)


def _trace_of(
    host: NDArray[np.float64], drafted: NDArray[np.float64], all_rows: int, first: int, accepted: int
) -> Trace:
    """Cut the flat array that `_trace_parts` became: the rows of one sequence's emitted positions."""
    width, rows = TRACE_TOP_TOKENS, slice(first, first + accepted + 1)
    split = all_rows * width
    ids, logprobs = host[:split].reshape(-1, width), host[split : 2 * split].reshape(-1, width)
    tail, guessed = host[2 * split :].reshape(2, -1)
    draft_ids, draft_probs = tail[rows] * 0 - 1, tail[rows] * 0
    tested = len(drafted[: accepted + 1])
    draft_ids[:tested], draft_probs[:tested] = drafted[:tested], guessed[rows][:tested]
    return Trace(
        top_ids=ids[rows].astype("int32"),
        top_logprobs=logprobs[rows].astype("float32"),
        tail_mass=tail[rows].astype("float32"),
        draft_ids=draft_ids.astype("int32"),
        draft_probs=draft_probs.astype("float32"),
    )
