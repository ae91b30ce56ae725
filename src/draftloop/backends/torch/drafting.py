"""What one sequence of a batch reads next, and its proposal in the making.

Contract: each sequence by its own rules, uniforms and head, whoever drafts beside it. Must not know how a
forward pass goes.

Letters: T tokens, V vocabulary, n columns of a cut head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from draftloop.backends.base import NO_PROPOSAL, Proposal
from draftloop.backends.biases import draft_bias
from draftloop.backends.torch.acceptance import drawn, mask, to_device
from draftloop.backends.torch.decoder import TorchCache

if TYPE_CHECKING:
    from draftloop.backends.base import Cache, ProposeJob
    from draftloop.backends.torch.head import CutHead


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [T] that a sequence reads, and its head where that is cut."""

    cache: TorchCache
    ids: torch.Tensor
    head: CutHead | None = None


class Draft:
    """One sequence's proposal in the making.

    Args:
        job: what is wanted.
        unread: its tokens, on the device.
        head: its cut head; None where it is whole.
        vocab_size: V of the draft.
    """

    def __init__(self, job: ProposeJob, unread: torch.Tensor, head: CutHead | None, vocab_size: int) -> None:
        self.job = job
        self.piece = Piece(own_cache(job.cache), unread, head)
        self._rules = job.rules if head is None else head.vocabulary.rules(job.rules)
        self._uniforms = to_device(job.uniforms, unread.device)
        self._vocab_size = vocab_size
        self._tokens: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []
        self._bias: torch.Tensor | None = None

    def goes_on(self) -> bool:
        """Whether another token is wanted, and allowed. A processor is told of those before, and waits."""
        if len(self._tokens) >= self.job.num_draft_tokens:
            return False
        if self._rules.processor is None:
            return True
        head, drafted = self.piece.head, [int(token) for token in self._tokens]
        ids = None if head is None else head.vocabulary.ids
        bias = draft_bias(self.job.rules, drafted, self._vocab_size, ids)
        if bias is None:
            return False
        self._bias = to_device(bias if ids is None else bias[ids], self._uniforms.device)
        return True

    def draw(self, logits: torch.Tensor) -> None:
        """The next token, from its logits [1, V or n]; it is what the sequence reads next."""
        step, head = len(self._tokens), self.piece.head
        biased = logits if self._bias is None else logits + self._bias
        masked = mask(biased, self._rules, first_row=step)
        columns, row = drawn(masked, self._rules.sampling, self._uniforms[step : step + 1])
        self._rows += [] if row is None else [row]
        self._tokens.append(columns if head is None else head.token_ids(columns))
        self.piece = replace(self.piece, ids=self._tokens[-1])

    def proposal(self) -> Proposal:
        """All that was drawn."""
        if not self._tokens:
            return NO_PROPOSAL
        q, head = torch.cat(self._rows) if self._rows else None, self.piece.head
        if q is not None and head is not None:
            q = head.spread(q, 0.0)
        return Proposal(torch.cat(self._tokens), q, len(self._tokens))


def own_cache(cache: Cache) -> TorchCache:
    """The cache, which must be this backend's.

    Raises:
        TypeError: another backend made it.
    """
    if not isinstance(cache, TorchCache):
        raise TypeError(f"a cache of {type(cache).__name__} does not belong to this model")
    return cache
