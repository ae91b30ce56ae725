"""How many tokens a round drafts, so that speculation is never slower than the target alone (design §6).

Contract: deterministic given what it is told; time is passed in. A choice depends on past rounds only, so the
output stays exact. Must not know models, caches, random numbers or settings.

The best K has the most expected tokens a second, (1 + Σ_{i<=K} Π_{j<=i} α_j) / round_s(K); K = 0 is the
target alone. Source of the numerator: Leviathan et al. 2023, eq. 1, with α by position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from draftloop.speculation.costs import LiveCosts, Prices, RoundCosts
from draftloop.speculation.expectation import PositionAcceptance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PROBE_SHARE = 0.03
"""Of the time of rounds without drafts, so much may be lost to probes."""
FIRST_ALLOWANCE_ROUNDS = 8
"""Before any such time has passed, probes may cost as much as so many of these rounds."""
PROBE_ROUNDS = 4
"""One round says little; the catching up is paid once for all of them."""
SHORTEST_GAP_ROUNDS, LONGEST_GAP_ROUNDS = 8, 512
ALONE_EVERY_ROUNDS = 100
"""Where the draft is worth it, one round in so many asks the target alone, to know what that costs now."""
HORIZON_TOKENS = 128
"""An answer seldom is as long as it may be: catching up must pay within so many tokens."""


@dataclass(frozen=True, slots=True)
class Choice:
    """K, and the tokens a second that it is expected to bring."""

    num_draft_tokens: int
    tokens_per_s: float


def expected_tokens(chances: Sequence[float]) -> float:
    """Tokens that a round emits, the extra one included; chances as in `PositionAcceptance`."""
    total = kept = 1.0
    for chance in chances:
        kept *= chance
        total += kept
    return total


def best_choice(prices: Prices, chances: Sequence[float], *, by_model: bool = True, least: int = 0) -> Choice:
    """The K in `least`..len(chances) with the most expected tokens a second; the smallest of equals."""
    choices = [
        Choice(k, expected_tokens(chances[:k]) / prices.round_s(k, by_model=by_model))
        for k in range(least, len(chances) + 1)
    ]
    return max(choices, key=lambda choice: choice.tokens_per_s)


@dataclass(frozen=True, slots=True)
class Timed:
    """One round of a stream, looked back on.

    Attributes:
        num_draft_tokens: K.
        by_model: whether the draft model drafted them.
        backlog_tokens: what the draft had to read first, beyond what it always reads.
        alphas: of the tested positions.
        seconds: the whole round; None where others shared it.
        together: K was chosen for several streams at once.
    """

    num_draft_tokens: int
    by_model: bool
    backlog_tokens: int
    alphas: tuple[float, ...]
    seconds: float | None
    together: bool = False


class Pace(Protocol):
    """Tells one answer how many tokens to draft next."""

    @property
    def apart(self) -> bool:
        """Whether K is chosen here also in a round that others share."""
        ...

    def chances(self, count: int) -> list[float]:
        """Of the draft model's first `count` drafts: i is kept with chances[i] if those before it were."""
        ...

    def choose(self, cap: int, backlog_tokens: int, remaining_tokens: int) -> Choice:
        """K for the draft model.

        Args:
            cap: the most that may be drafted.
            backlog_tokens: what the draft would have to read first.
            remaining_tokens: how many may still come.
        """
        ...

    def choose_free(self, chances: Sequence[float]) -> Choice:
        """K for a drafter that is no model, whose draft i is kept with chances[i] if those before it were."""
        ...

    def reads_along(self, backlog_tokens: int, remaining_tokens: int) -> bool:
        """Whether the draft shall read the prompt at once, of which it lacks so many tokens."""
        ...

    def observe(self, timed: Timed) -> None:
        """A round is over."""
        ...


class FixedPace:
    """K is constant: always the cap. Whatever drafts more than the draft model could goes before it."""

    apart = True

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_draft_tokens = num_draft_tokens

    def chances(self, count: int) -> list[float]:
        """See `Pace`."""
        return [1.0] * count

    def choose(self, cap: int, backlog_tokens: int, remaining_tokens: int) -> Choice:  # noqa: ARG002
        """See `Pace`. Every round counts as a second, and every draft as kept."""
        k = min(cap, self._num_draft_tokens)
        return Choice(k, k + 1.0)

    def choose_free(self, chances: Sequence[float]) -> Choice:
        """See `Pace`."""
        return Choice(len(chances), expected_tokens(chances))

    def reads_along(self, backlog_tokens: int, remaining_tokens: int) -> bool:  # noqa: ARG002
        """See `Pace`."""
        return self._num_draft_tokens > 0

    def observe(self, timed: Timed) -> None:
        """Nothing is learnt."""


class Probes:
    """When the draft is asked although that is expected to lose time, to see whether it still does.

    What probes lose is paid from an allowance that grows with the time of rounds without drafts, so their
    share is bounded; between fruitless ones the gap doubles.
    """

    def __init__(self, alone_s: float) -> None:
        self._allowance_s = FIRST_ALLOWANCE_ROUNDS * alone_s
        self._gap = self._rounds = 0
        self._left = self._drafting_rounds = 0
        self._granted_s = self._unread_s = 0.0

    def due(self, backlog_s: float, loss_s: float, hopeless: Callable[[], bool] = lambda: False) -> bool:
        """Whether to probe now.

        A probe that was postponed pays for what the backlog has grown meanwhile; where the allowance lacks
        that, it is dropped.

        Args:
            backlog_s: what the draft's catching up takes.
            loss_s: what each of the probe's rounds is expected to lose.
            hopeless: whether even a far better draft would lose, unless costs are other than believed. Then
                it is asked as seldom as any.
        """
        paid_s, self._unread_s = self._unread_s, 0.0
        if self._left:
            grown_s = max(0.0, backlog_s - paid_s)
            if grown_s <= self._allowance_s:
                self._allowance_s -= grown_s
                self._left, self._granted_s = self._left - 1, backlog_s
                return True
            self._allowance_s, self._left = self._allowance_s + paid_s, 0
        price_s = backlog_s + PROBE_ROUNDS * loss_s
        if self._rounds < self._gap or self._allowance_s < price_s:
            return False
        if self._rounds < LONGEST_GAP_ROUNDS and hopeless():
            self._gap = self._rounds + SHORTEST_GAP_ROUNDS
            return False
        self._allowance_s -= price_s
        self._gap = min(max(2 * self._gap, SHORTEST_GAP_ROUNDS), LONGEST_GAP_ROUNDS)
        self._rounds, self._left, self._granted_s = 0, PROBE_ROUNDS - 1, backlog_s
        return True

    def postpone(self) -> None:
        """The round that `due` gave a probe went to somebody else: it takes a later one.

        The backlog that it was charged for is still to be read.
        """
        self._left, self._unread_s = self._left + 1, self._granted_s

    @property
    def alone_due(self) -> bool:
        """Whether the target alone was not asked for so long that its cost must be looked at."""
        return self._drafting_rounds >= ALONE_EVERY_ROUNDS

    def passed_drafting(self) -> None:
        """A round with drafts went by."""
        self._drafting_rounds += 1

    def passed_alone(self, seconds: float) -> None:
        """A round without drafts went by."""
        self._rounds, self._drafting_rounds = self._rounds + 1, 0
        most_s = FIRST_ALLOWANCE_ROUNDS / PROBE_SHARE * seconds
        self._allowance_s = min(self._allowance_s + PROBE_SHARE * seconds, most_s)

    def abandon(self) -> None:
        """Another text begins: what is left of a probe was paid for the one before."""
        self._left, self._unread_s = 0, 0.0

    def soon(self) -> None:
        """The draft was worth asking, or is another one: what was fruitless before says nothing now."""
        self._gap = self._left = 0
        self._unread_s = 0.0


class Schedule:
    """What all answers share: costs, recent acceptance, and the probes' allowance.

    Args:
        calibrated: of this pair on this machine.
    """

    def __init__(self, calibrated: RoundCosts) -> None:
        self.costs = LiveCosts(calibrated)
        self.acceptance = PositionAcceptance()
        self.probes = Probes(calibrated.round_s(0))
        self.answered = False

    def open(self, num_draft_tokens: int, *, repeatable: bool = False) -> AdaptivePace:
        """The pace of one answer.

        Args:
            num_draft_tokens: the most that the draft model drafts in a round; 0 where only others draft.
            repeatable: choose by the calibration and by this answer's own rounds alone, so that the same
                seed gives the same text again: sampled tokens depend on where the rounds end. The first
                answer of a schedule that recalls nothing is chosen for in the same way.
        """
        since = Schedule(self.costs.calibrated) if repeatable else self
        since.probes.abandon()
        own = since.acceptance.for_stream()
        fresh = repeatable or not self.answered
        return AdaptivePace(
            self, num_draft_tokens, since.costs.now(), own, since.probes, fresh=fresh, apart=repeatable
        )

    def recall(self, rounds: Iterable[Sequence[float]]) -> None:
        """Begin with what was accepted in another process, by rounds: alphas of the tested positions."""
        for alphas in rounds:
            self.acceptance.observe(alphas)
            self.answered = True

    def draft_changed(self) -> None:
        """The draft wears another adapter: it may be worth asking now."""
        self.probes.soon()


class AdaptivePace:
    """Chooses by expected speed. `Schedule.open` makes it."""

    def __init__(
        self,
        schedule: Schedule,
        cap: int,
        prices: Prices,
        acceptance: PositionAcceptance,
        probes: Probes,
        *,
        fresh: bool,
        apart: bool,
    ) -> None:
        self._fresh = fresh
        self._apart = apart
        self._schedule = schedule
        self._cap = cap
        self._prices = prices
        self._acceptance = acceptance
        self._probes = probes
        self._probing = False

    @property
    def apart(self) -> bool:
        """See `Pace`. Where others' answers may not matter, neither may who is answered beside it."""
        return self._apart

    def chances(self, count: int) -> list[float]:
        """See `Pace`."""
        return self._acceptance.chances(min(count, self._cap))

    def choose(self, cap: int, backlog_tokens: int, remaining_tokens: int) -> Choice:
        """See `Pace`. Reading the backlog must pay within the tokens that remain."""
        alone, cap, self._probing = self._alone(), min(cap, self._cap), False
        if cap < 1:
            return alone
        drafting = self._drafting(cap)
        backlog_s = backlog_tokens * self._schedule.costs.calibrated.read_s
        ahead = min(remaining_tokens, HORIZON_TOKENS)
        if backlog_s + ahead / drafting.tokens_per_s < ahead / alone.tokens_per_s:
            self._probes.soon()
            return alone if self._probes.alone_due else drafting
        round_s = self._prices.round_s(drafting.num_draft_tokens)
        loss_s = max(0.0, round_s * (1 - drafting.tokens_per_s / alone.tokens_per_s))
        self._probing = self._probes.due(backlog_s, loss_s)
        return drafting if self._probing else alone

    def choose_free(self, chances: Sequence[float]) -> Choice:
        """See `Pace`. Where the draft is worth asking, it will have to read what is emitted meanwhile."""
        choice = best_choice(self._prices, chances, by_model=False)
        if not self._cap or self._drafting(self._cap).tokens_per_s <= self._alone().tokens_per_s:
            return choice
        read_s = self._schedule.costs.calibrated.read_s
        return Choice(choice.num_draft_tokens, 1 / (1 / choice.tokens_per_s + read_s))

    def reads_along(self, backlog_tokens: int, remaining_tokens: int) -> bool:
        """See `Pace`. Where drafting would not pay, a probe reads the prompt later, if one comes.

        What the draft lacks depends on earlier texts; an answer that may not depend on them reads along.
        """
        if not self._cap:
            return False
        if self._fresh:
            return True
        drafting = self._drafting(self._cap)
        saved_s = 1 / self._alone().tokens_per_s - 1 / drafting.tokens_per_s
        read_s = self._schedule.costs.calibrated.read_s
        return backlog_tokens * read_s < min(remaining_tokens, HORIZON_TOKENS) * saved_s

    def observe(self, timed: Timed) -> None:
        """Learn from a round, for this answer and for the others."""
        self._schedule.answered = True
        if timed.by_model:
            self._acceptance.observe(timed.alphas)
            self._schedule.acceptance.observe(timed.alphas)
        if timed.seconds is not None and not timed.backlog_tokens:
            self._schedule.costs.observe(timed.num_draft_tokens, timed.seconds, by_model=timed.by_model)
        if timed.together:
            return
        if self._probing and not timed.by_model:
            self._probes.postpone()
        if timed.num_draft_tokens:
            self._probes.passed_drafting()
        else:
            self._probes.passed_alone(self._prices.round_s(0))

    def _drafting(self, cap: int) -> Choice:
        return best_choice(self._prices, self._acceptance.chances(cap), least=1)

    def _alone(self) -> Choice:
        return Choice(0, 1 / self._prices.round_s(0))
