"""The metrics of speculation, each computed here and nowhere else (design §1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from draftloop.speculation.round import Round


def acceptance_rate(accepted_tokens: int, drafted_tokens: int) -> float | None:
    """Accepted / drafted; an untested tail counts as rejected. None where nothing was drafted."""
    return accepted_tokens / drafted_tokens if drafted_tokens else None


def mean_alpha(alpha_sum: float, tested_tokens: int) -> float | None:
    """Mean of Σ_x min(p(x), q(x)) over tested positions. None where nothing was tested."""
    return alpha_sum / tested_tokens if tested_tokens else None


def tokens_per_round(completion_tokens: int, rounds: int) -> float | None:
    """Tau: tokens emitted a round, the extra one included. None before the first round."""
    return completion_tokens / rounds if rounds else None


def tokens_per_second(tokens: int, seconds: float) -> float | None:
    """Tokens over wall time; None where no time passed."""
    return tokens / seconds if seconds > 0 else None


@dataclass(slots=True)
class Tally:
    """Running sums over rounds. The metrics are derived from them when asked for."""

    rounds: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    tested_tokens: int = 0
    alpha_sum: float = field(default=0.0)

    def add(self, outcome: Round) -> None:
        """Count one round."""
        self.rounds += 1
        self.completion_tokens += len(outcome.tokens)
        self.drafted_tokens += outcome.drafted_tokens
        self.accepted_tokens += outcome.accepted_tokens
        self.tested_tokens += len(outcome.alphas)
        self.alpha_sum += sum(outcome.alphas)

    def merge(self, other: Tally) -> None:
        """Count another tally's rounds as one's own."""
        self.rounds += other.rounds
        self.completion_tokens += other.completion_tokens
        self.drafted_tokens += other.drafted_tokens
        self.accepted_tokens += other.accepted_tokens
        self.tested_tokens += other.tested_tokens
        self.alpha_sum += other.alpha_sum

    @property
    def acceptance_rate(self) -> float | None:
        """Of everything counted."""
        return acceptance_rate(self.accepted_tokens, self.drafted_tokens)

    @property
    def alpha(self) -> float | None:
        """Of everything counted."""
        return mean_alpha(self.alpha_sum, self.tested_tokens)

    @property
    def tau(self) -> float | None:
        """Of everything counted."""
        return tokens_per_round(self.completion_tokens, self.rounds)
