"""The losses of response rows, and their gradient with respect to the hidden states.

Contract: the losses of the NumPy reference (`backends/numpy/objectives.py`). Every loss is a function of
few numbers a row: the logits of N chosen tokens, and the log-sum-exp of all others. So the gradient of the
others' logits is their softmax times one number, and logits are neither kept for autograd nor held in
float32. Must not know a model but for its output head.

Letters: R rows, r rows of a chunk, N chosen tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from draftloop.backends.training import Objective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.torch.frozen import FrozenHead
    from draftloop.backends.training import Example

EPSILON = 1e-10
"""The least q inside a logarithm and the least p that q is divided by, as in the reference."""

LK_DECAY = 3.0
"""`lk_hybrid` weighs its divergence by exp(-3 alpha), as in the reference."""

_LOGIT_BYTES = {"cpu": 160 << 20, "cuda": 1 << 30}
"""What the logits of a chunk of rows may take. Each chunk makes the whole head dense twice."""
_ROW_MULTIPLE = 64
_BLOCK_COLUMNS = 8192
"""Logits that are float32 at a time."""


@dataclass(frozen=True, slots=True)
class LossRows:
    """What the loss knows of each row, on the device.

    ids: [R, N] the chosen tokens; probs: [R, N + 1] float32, p of them and of all others;
    inverse_temperatures: [R, 1] float32.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    inverse_temperatures: torch.Tensor

    def chunk(self, rows: slice) -> LossRows:
        """Some of the rows."""
        return LossRows(self.ids[rows], self.probs[rows], self.inverse_temperatures[rows])


def loss_rows_of(objective: Objective, batch: Sequence[Example], device: torch.device) -> LossRows:
    """Bring the rows of all examples to the device; narrower ones are filled up with tokens of no mass.

    Cross-entropy is the forward divergence from a point mass on the text's token.
    """
    width = 1 if objective is Objective.CROSS_ENTROPY else max(e.top_ids.shape[1] for e in batch)
    ids, probs, temperatures = [], [], []
    for example in batch:
        if objective is Objective.CROSS_ENTROPY:
            tokens = torch.tensor(example.tokens[example.num_prompt_tokens :], dtype=torch.long)
            ids.append(tokens.unsqueeze(1))
            probs.append(torch.tensor([[1.0, 0.0]]).expand(len(tokens), 2))
        else:
            missing = (0, width - example.top_ids.shape[1])
            top = torch.tensor(example.top_ids, dtype=torch.long)
            ids.append(torch.nn.functional.pad(top, missing, value=_NO_TOKEN))
            top_probs = torch.nn.functional.pad(torch.tensor(example.top_probs), missing)
            probs.append(torch.cat((top_probs, torch.tensor(example.tail_probs).unsqueeze(1)), dim=1))
        temperatures += [example.loss_temperature] * example.num_rows
    return LossRows(
        ids=torch.cat(ids).to(device, non_blocking=True),
        probs=torch.cat(probs).float().to(device, non_blocking=True),
        inverse_temperatures=torch.tensor(temperatures)
        .reciprocal()
        .unsqueeze(1)
        .to(device, non_blocking=True),
    )


_LOWEST = torch.finfo(torch.float32).min
"""Stands in for the log of nothing, where -inf would become not a number."""

_NO_TOKEN = 2**31 - 1
"""An id that no vocabulary has."""


def bucket_losses(objective: Objective, p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Loss of each row over the N + 1 buckets: p and log_q [r, N + 1] -> [r]; differentiable by log_q."""
    q, clamped = log_q.exp(), log_q.clamp(min=math.log(EPSILON))
    if objective is Objective.REVERSE_KL:
        surplus: torch.Tensor = (q * (clamped - p.clamp(min=EPSILON).log())).sum(dim=-1)
        return surplus
    variation: torch.Tensor = 1 - torch.where(q < p, q, p).sum(dim=-1)
    if objective is Objective.TOTAL_VARIATION:
        return variation
    divergence: torch.Tensor = (torch.special.xlogy(p, p) - p * clamped).sum(dim=-1)
    if objective is Objective.LK_HYBRID:
        share = torch.exp(-LK_DECAY * (1 - variation.detach()))
        return share * divergence + (1 - share) * variation
    return divergence


class HeadLoss:
    """The output head and the loss behind it.

    Args:
        head: the frozen output head.
        objective: the loss.
    """

    def __init__(self, head: FrozenHead, objective: Objective) -> None:
        self._head = head
        self._objective = objective
        # At least one column more than the vocabulary, for tokens that this model lacks; rows stay aligned.
        self._columns = (head.vocab_size // _ROW_MULTIPLE + 1) * _ROW_MULTIPLE

    def chunk_rows(self, hidden: torch.Tensor) -> int:
        """How many rows' logits are in memory at once."""
        return max(1, _LOGIT_BYTES[hidden.device.type] // (self._columns * hidden.element_size()))

    def __call__(self, hidden: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [R, D] -> the sum of the rows' losses, and its gradient [R, D] float32."""
        total = torch.zeros((), device=hidden.device)
        gradients = []
        step = self.chunk_rows(hidden)
        for start in range(0, len(hidden), step):
            span = slice(start, start + step)
            loss, gradient = self._chunk(hidden[span], rows.chunk(span))
            total += loss
            gradients.append(gradient)
        return total, torch.cat(gradients)

    def _chunk(self, hidden: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._head.logits(hidden, self._columns)
        ids, scale = rows.ids.clamp(max=self._head.vocab_size), rows.inverse_temperatures
        # Flat places, because scattering along a dimension copies all logits on a CPU.
        flat = logits.view(-1)
        places = (torch.arange(len(ids), device=ids.device).unsqueeze(1) * self._columns + ids).flatten()
        chosen = flat[places].view(ids.shape).float() * scale
        flat.index_fill_(0, places, -torch.inf)
        blocks = logits.split(_BLOCK_COLUMNS, dim=1)
        tops, sums = zip(*(_exponentiate(block, scale) for block in blocks), strict=True)
        top, total = torch.cat(tops, dim=1), torch.cat(sums, dim=1)
        others = torch.logsumexp(top + total.log(), dim=1, keepdim=True).clamp_(min=_LOWEST)
        loss, slopes = self._slopes(torch.cat((chosen, others), dim=1), rows.probs)
        slopes *= scale
        for block, factor in zip(
            blocks, ((top - others).exp_() * slopes[:, -1:]).split(1, dim=1), strict=True
        ):
            block.mul_(factor)
        flat.index_copy_(0, places, slopes[:, :-1].to(logits.dtype).flatten())
        return loss, self._head.backward(logits)

    def _slopes(self, scores: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses, and their derivatives by each bucket's score [r, N + 1]."""
        with torch.enable_grad():
            scores = scores.detach().requires_grad_()
            loss = bucket_losses(self._objective, p, torch.log_softmax(scores, dim=-1)).sum()
            (slopes,) = torch.autograd.grad(loss, scores)
        return loss.detach(), slopes


def _exponentiate(block: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place, logits [r, columns] -> exp(scaled logit - their row's largest); that one and the sum, [r, 1].

    Float32 while it is done: one pass over the logits serves the log-sum-exp and the softmax.
    """
    scores = block.float().mul_(scale)
    top = scores.amax(dim=1, keepdim=True).clamp_(min=_LOWEST)
    block.copy_(scores.sub_(top).exp_())
    return top, scores.sum(dim=1, keepdim=True)
