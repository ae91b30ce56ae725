"""The halves of a round as one CUDA graph each: K drafted tokens, and a verification with its decision.

Contract: the results of `TorchModel`'s plain loop, or None where these rules or this text need it. Nothing
waits for the device but `told`, once. Must not know how a step goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from draftloop.backends.base import Proposal
from draftloop.backends.torch.acceptance import drawn, outcome, to_device, told

if TYPE_CHECKING:
    from draftloop.backends.base import ProposeJob, VerifyJob
    from draftloop.backends.torch.cuda.graphs import GraphedSteps
    from draftloop.backends.torch.cuda.step import Step
    from draftloop.backends.torch.decoder import TorchCache
    from draftloop.types import Rules, Verdict

MOST_UNREAD = 2
"""Tokens that a draft lags behind from round to round; for other numbers no graph is recorded."""

Tensors = tuple[torch.Tensor, ...]


def drafted(steps: GraphedSteps, cache: TorchCache, unread: torch.Tensor, job: ProposeJob) -> Proposal | None:
    """Read `unread` [T] and draft `job`'s K tokens; None: nothing was read."""
    sampling, rows, k = job.rules.sampling, len(unread), job.num_draft_tokens
    if _goes_apart(job.rules) or rows > MOST_UNREAD:
        return None

    def body(step: Step, inputs: Tensors) -> Tensors:
        logits = step.logits(rows)[-1:]
        tokens: list[torch.Tensor] = []
        distributions: list[torch.Tensor] = []
        for i in range(k):
            if i:
                step.follow(tokens[-1], rows if i == 1 else 1)
                logits = step.logits(1)
            token, q = drawn(logits, sampling, inputs[0][i : i + 1])
            tokens.append(token)
            distributions += [] if q is None else [q]
        return (torch.cat(tokens), *([torch.cat(distributions)] if distributions else []))

    uniforms = (to_device(job.uniforms, unread.device),)
    found = steps.run(("draft", k, sampling), body, cache, unread, inputs=uniforms, num_read=rows + k - 1)
    if found is None:
        return None
    # The next draft writes over the graph's own results.
    return Proposal(found[0].clone(), found[1].clone() if len(found) > 1 else None, k)


def verified(steps: GraphedSteps, cache: TorchCache, ids: torch.Tensor, job: VerifyJob) -> Verdict | None:
    """Read `ids` [K+1], the last token and the guesses, and decide; None: nothing was read."""
    sampling, rows, trace = job.rules.sampling, len(ids), job.trace
    if _goes_apart(job.rules):
        return None
    q = job.proposal.q
    uniforms = to_device(job.accept_uniforms, ids.device), to_device(job.extra_uniforms, ids.device)

    def body(step: Step, inputs: Tensors) -> Tensors:
        logits = step.logits(rows)
        accept, extra, *rest = inputs
        q = _widened(rest[0], logits.shape[1]) if rest else None
        guesses = step.tokens[1:rows]
        return (
            outcome(logits, logits, guesses, q, uniforms=(accept, extra), sampling=sampling, trace=trace),
        )

    inputs = uniforms if q is None else (*uniforms, q)
    key = "verify", sampling, trace, None if q is None else q.shape[1]
    found = steps.run(key, body, cache, ids, inputs=inputs, num_read=rows)
    return None if found is None else told(found[0], job)


def _goes_apart(rules: Rules) -> bool:
    """Whether rows are changed by what no recording knows: the answer's length, or a processor."""
    return rules.processor is not None or (rules.masked_rows > 0 and bool(rules.masked_ids))


def _widened(q: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(q, (0, max(0, width - q.shape[1])))
