"""The nouns that every layer shares: plain frozen data, no framework arrays, no behaviour to speak of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

TRACE_TOP_TOKENS = 32
"""How many of the target's most likely tokens a trace keeps at each position."""


class FinishReason(StrEnum):
    """Why an answer ended, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"


class TokenKind(StrEnum):
    """How an emitted token came to be."""

    ACCEPTED = "accepted"
    RECOVERED = "recovered"
    BONUS = "bonus"
    TARGET = "target"
    """The target alone: the round had no draft."""
    SUFFIX = "suffix"
    """Kept of what a suffix match proposed."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How logits become a distribution: temperature, then top-k, top-p, min-p (the order of transformers).

    Attributes:
        temperature: 0 means greedy: the distribution is a point mass on the argmax.
        top_p: nucleus (Holtzman et al. 2020); 1 switches it off.
        top_k: keep the k most likely; 0 switches it off.
        min_p: drop what is below min_p times the most likely; 0 switches it off.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def greedy(self) -> bool:
        """Whether the distribution is a point mass."""
        return self.temperature == 0.0


class Processor(Protocol):
    """What one answer adds to the logits, target's and draft's alike: penalties, a grammar."""

    def bias(self, drafted: Sequence[int]) -> NDArray[np.float32] | None:
        """What is added to the row behind the tokens `drafted` of this round, before temperature.

        Returns:
            [V] of the target's vocabulary, -inf for what is forbidden, never all of it; None adds nothing,
            which is also the answer behind a token that was forbidden itself. Not to be written to.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What turns one sequence's logits into p, and in the same way into q.

    Attributes:
        sampling: the warping.
        masked_ids: tokens with no probability in the first `masked_rows` rows (EOS while
            `min_tokens` is not reached).
        masked_rows: how many of the coming rows are masked, counted from the next token.
        processor: what is added to each row; None adds nothing.
    """

    sampling: Sampling
    masked_ids: tuple[int, ...] = ()
    masked_rows: int = 0
    processor: Processor | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """What the target said at the emitted positions of one round, at temperature 1, unmasked and unbiased.

    `R` is the number of emitted tokens (accepted ones and the extra one).

    Attributes:
        top_ids: [R, 32] int32, the target's most likely tokens, most likely first.
        top_logprobs: [R, 32] float32, their natural log-probabilities.
        tail_mass: [R] float32, the probability of everything else.
        draft_ids: [R] int32, what the draft proposed there; -1 where it proposed nothing.
        draft_probs: [R] float32, q of that token after warping; 0 where nothing was proposed.
    """

    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    tail_mass: NDArray[np.float32]
    draft_ids: NDArray[np.int32]
    draft_probs: NDArray[np.float32]

    def without_draft(self) -> Trace:
        """As if nothing had been proposed: what somebody else guessed says nothing about the draft."""
        rows = len(self.draft_ids)
        return replace(
            self,
            draft_ids=np.full(rows, -1, np.int32),
            draft_probs=np.zeros(rows, np.float32),
        )

    def head(self, rows: int) -> Trace:
        """The first `rows` positions."""
        return Trace(
            top_ids=self.top_ids[:rows],
            top_logprobs=self.top_logprobs[:rows],
            tail_mass=self.tail_mass[:rows],
            draft_ids=self.draft_ids[:rows],
            draft_probs=self.draft_probs[:rows],
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one verification decided.

    Attributes:
        drafted_tokens: the proposal as the host sees it, K ids.
        accepted_tokens: m, how many of them were kept.
        extra_token: the recovered, bonus or target token after them.
        alphas: Σ_x min(p(x), q(x)) at each *tested* position: min(m + 1, K) values. A position after
            the first rejection is untested: its context is not the text.
        trace: what the target said at the m + 1 emitted positions, where it was asked for.
    """

    drafted_tokens: tuple[int, ...]
    accepted_tokens: int
    extra_token: int
    alphas: tuple[float, ...]
    trace: Trace | None = field(default=None, compare=False)

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the round emits: the accepted draft tokens and the extra one."""
        return (*self.drafted_tokens[: self.accepted_tokens], self.extra_token)

    @property
    def kinds(self) -> tuple[TokenKind, ...]:
        """The kind of each emitted token."""
        if not self.drafted_tokens:
            extra = TokenKind.TARGET
        elif self.accepted_tokens == len(self.drafted_tokens):
            extra = TokenKind.BONUS
        else:
            extra = TokenKind.RECOVERED
        return (*(TokenKind.ACCEPTED for _ in range(self.accepted_tokens)), extra)
