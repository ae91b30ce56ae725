"""The metrics of speculation, each computed here and nowhere else (design §1)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.speculation.round import Round


def acceptance_rate(accepted_tokens: float, drafted_tokens: float) -> float | None:
    """Accepted / drafted; an untested tail counts as rejected. None where nothing was drafted."""
    return accepted_tokens / drafted_tokens if drafted_tokens else None


def constant_acceptance_rate(alpha: float, num_draft_tokens: int) -> float:
    """Σ α^i / K: the rate of full rounds of K >= 1 drafts, were each accepted with probability alpha."""
    return sum(alpha**i for i in range(1, num_draft_tokens + 1)) / num_draft_tokens


def mean_alpha(alpha_sum: float, tested_tokens: float) -> float | None:
    """Mean of Σ_x min(p(x), q(x)) over tested positions. None where nothing was tested."""
    return alpha_sum / tested_tokens if tested_tokens else None


def tokens_per_round(completion_tokens: float, rounds: float) -> float | None:
    """Tau: tokens emitted a round, the extra one included. None before the first round."""
    return completion_tokens / rounds if rounds else None


def tokens_per_second(tokens: float, seconds: float) -> float | None:
    """Tokens over wall time; None where no time passed."""
    return tokens / seconds if seconds > 0 else None


def expected_rounds(alphas: Sequence[float], num_draft_tokens: int) -> float:
    """Rounds that an answer would need, were position i accepted with probability alphas[i], independently.

    A round at position t drafts k = min(K, R - t - 1) tokens (`round.draft_budget`) and emits m + 1 of them
    with probability α_t ⋯ α_{t+m-1} · (1 - α_{t+m}) for m < k, and α_t ⋯ α_{t+k-1} for m = k. Where every
    alpha is 0 or 1 this counts the rounds of the one walk there is, which is greedy decoding's, whether EOS
    or `max_tokens` ended the answer: whoever emits the last token, the round is the same. Sampled, a token
    and its acceptance depend on each other, which alphas leave out.

    Args:
        alphas: [R], alpha of each position of the answer.
        num_draft_tokens: K >= 0.

    Returns:
        0 for an empty answer; R where K is 0.
    """
    return _expected_walk(alphas, num_draft_tokens)[0]


def expected_acceptance_rate(alphas: Sequence[float], num_draft_tokens: int) -> float | None:
    """Expected accepted over expected drafted tokens of the same walk; None where nothing is drafted.

    As for an answer that `max_tokens` ended: each round adds one token to the accepted ones, the last one
    too. Where EOS ended it, serving also counts the guesses at EOS and, if that one was wrong, behind it.
    """
    rounds, drafted_tokens = _expected_walk(alphas, num_draft_tokens)
    return acceptance_rate(len(alphas) - rounds, drafted_tokens)


def _expected_walk(alphas: Sequence[float], num_draft_tokens: int) -> tuple[float, float]:
    """Expected rounds and drafted tokens from the first position on."""
    length = len(alphas)
    chances = [float(alpha) for alpha in alphas]
    # Entry t: from position t to the end. What follows m accepted tokens is folded from the last m on.
    rounds, drafted = [0.0] * (length + 1), [0.0] * (length + 1)
    for t in range(length - 1, -1, -1):
        k = min(num_draft_tokens, length - t - 1)
        later_rounds, later_drafted = rounds[t + k + 1], drafted[t + k + 1]
        for i in range(t + k - 1, t - 1, -1):
            chance = chances[i]
            later_rounds = rounds[i + 1] + chance * (later_rounds - rounds[i + 1])
            later_drafted = drafted[i + 1] + chance * (later_drafted - drafted[i + 1])
        rounds[t], drafted[t] = 1 + later_rounds, k + later_drafted
    return rounds[0], drafted[0]


@dataclass(slots=True)
class Tally:
    """Running sums over rounds. The metrics are derived from them when asked for.

    Attributes:
        rounds, completion_tokens: all of them.
        drafted_tokens, accepted_tokens, tested_tokens, alpha_sum: the draft model's.
        suffix_rounds, suffix_tokens, suffix_s: rounds that a suffix match proposed in, what they emitted, and
            what they took; all three are counted above as well.
        suffix_drafted_tokens, suffix_accepted_tokens: what the matches proposed, and what was kept of it.
    """

    rounds: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    tested_tokens: int = 0
    alpha_sum: float = field(default=0.0)
    suffix_rounds: int = 0
    suffix_tokens: int = 0
    suffix_drafted_tokens: int = 0
    suffix_accepted_tokens: int = 0
    suffix_s: float = field(default=0.0, compare=False)

    def add(self, outcome: Round) -> None:
        """Count one round."""
        self.rounds += 1
        self.completion_tokens += len(outcome.tokens)
        self.drafted_tokens += outcome.drafted_tokens
        self.accepted_tokens += outcome.accepted_tokens
        self.tested_tokens += len(outcome.alphas)
        self.alpha_sum += sum(outcome.alphas)
        if outcome.from_suffix:
            self.suffix_rounds += 1
            self.suffix_tokens += len(outcome.tokens)
            self.suffix_drafted_tokens += outcome.suffix_drafted_tokens
            self.suffix_accepted_tokens += outcome.suffix_accepted_tokens
            self.suffix_s += outcome.seconds or 0.0

    def merge(self, other: Tally) -> None:
        """Count another tally's rounds as one's own."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

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
        """Of everything counted, suffix matches included."""
        return tokens_per_round(self.completion_tokens, self.rounds)

    @property
    def draft_tau(self) -> float | None:
        """Of the rounds without suffix matches: what the draft is worth."""
        return tokens_per_round(self.completion_tokens - self.suffix_tokens, self.rounds - self.suffix_rounds)
