"""The halves of a round as CUDA graphs: drafted tokens, a graph a step, and a verification with its decision.

Contract: the results of `TorchModel`'s plain loop, or None where these rules or this text need it. Nothing
waits for the device but `told`, once. Must not know how a step goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from draftloop.backends.base import Proposal
from draftloop.backends.torch.acceptance import drawn, outcome, to_device, told
from draftloop.backends.torch.cuda.graphs import Part

if TYPE_CHECKING:
    from collections.abc import Hashable

    from draftloop.backends.base import ProposeJob, VerifyJob
    from draftloop.backends.torch.cuda.graphs import GraphedSteps
    from draftloop.backends.torch.cuda.step import Step
    from draftloop.backends.torch.decoder import TorchCache
    from draftloop.types import Rules, Sampling, Verdict

_FEWEST_PLACES = 16
"""Drafted tokens that there is room for from the start; a longer draft makes room, and new graphs."""

Tensors = tuple[torch.Tensor, ...]


class RecordedDrafts:
    """One model's drafts: a graph of the first step for each number of unread tokens, and one of all others.

    So there are few to record, whatever K. Where a step's token goes, the device itself counts.

    Args:
        steps: of the model.
        vocab_size: columns of its logits.
        device: where it is.
    """

    def __init__(self, steps: GraphedSteps, vocab_size: int, device: torch.device) -> None:
        self._steps = steps
        self._vocab_size = vocab_size
        self._next = torch.zeros(1, dtype=torch.long, device=device)
        self._make_room(_FEWEST_PLACES)

    def drafted(self, cache: TorchCache, unread: torch.Tensor, job: ProposeJob) -> Proposal | None:
        """Read `unread` [T] and draft `job`'s K tokens; None: nothing was read."""
        sampling, rows, k = job.rules.sampling, len(unread), job.num_draft_tokens
        if _goes_apart(job.rules):
            return None
        if k > len(self._tokens):
            self._make_room(k)
        self._uniforms[:k].copy_(to_device(job.uniforms, unread.device))
        # Recording takes steps too; they must find a place.
        self._next.zero_()
        parts = [self._first(rows, sampling), *[self._following(sampling)] * (k - 1)]
        if self._steps.run(parts, cache, unread, inputs=(), num_read=rows + k - 1) is None:
            return None
        # The next draft writes over these.
        q = None if sampling.greedy else self._q[:k].clone()
        return Proposal(self._tokens[:k].clone(), q, k)

    def _first(self, rows: int, sampling: Sampling) -> Part:
        def body(step: Step, _: Tensors) -> Tensors:
            self._next.zero_()
            return self._draw(step, step.logits(rows)[-1:], rows, sampling)

        return Part(self._key("first", rows, sampling), body)

    def _following(self, sampling: Sampling) -> Part:
        def body(step: Step, _: Tensors) -> Tensors:
            return self._draw(step, step.logits(1), 1, sampling)

        return Part(self._key("following", 1, sampling), body)

    def _draw(self, step: Step, logits: torch.Tensor, num_read: int, sampling: Sampling) -> Tensors:
        """Launch: the next token out of logits [1, V] goes to its place, and stands to be read."""
        token, q = drawn(logits, sampling, self._uniforms.index_select(0, self._next))
        self._tokens.index_copy_(0, self._next, token)
        if q is not None:
            self._q.index_copy_(0, self._next, q)
        self._next.add_(1)
        step.follow(token, num_read)
        return ()

    def _key(self, name: str, rows: int, sampling: Sampling) -> Hashable:
        return name, rows, sampling, len(self._tokens)

    def _make_room(self, places: int) -> None:
        device = self._next.device
        self._tokens = torch.zeros(places, dtype=torch.long, device=device)
        self._uniforms = torch.zeros(places, device=device)
        self._q = torch.zeros(places, self._vocab_size, device=device)


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
    part = Part(("verify", rows, sampling, trace, None if q is None else q.shape[1]), body)
    found = steps.run((part,), cache, ids, inputs=inputs, num_read=rows)
    return None if found is None else told(found[0], job)


def _goes_apart(rules: Rules) -> bool:
    """Whether rows are changed by what no recording knows: the answer's length, or a processor."""
    return rules.processor is not None or (rules.masked_rows > 0 and bool(rules.masked_ids))


def _widened(q: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(q, (0, max(0, width - q.shape[1])))
