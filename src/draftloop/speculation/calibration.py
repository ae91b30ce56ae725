"""What rounds cost on this machine, measured through the models' seam.

Contract: about BUDGET_S, whatever K and however large the models; on scratch caches, while nobody is
answering. Must not know settings, requests or files.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.timing import caches_beside, filled_cache, proposal_step, verification_step
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from draftloop.backends.base import Model, Proposal
    from draftloop.speculation.stream import Pair

BUDGET_S = 2.5
"""Nothing is begun that is expected to end later, but for what nothing can be told without."""
MOST_PASSES = 8
READ_TOKENS = 48
"""What a token of a backlog costs is the difference between reading so many and half of them: on a GPU both
are beyond what a graph was recorded for, as a backlog is."""
DRAFTED_TOKENS = 8
"""A drafted token's cost is the difference between so many and one, or K where that is less."""
SMALL_WIDTH, LARGE_WIDTHS = 9, (12, 16, 24, 32, 48, 64)
"""Kernels work in blocks, so each width up to the first is looked at; between the large ones it is even."""
SHARED_WIDTHS = (16, 32)
"""Looked at also where one sequence is never so wide: several together are."""
SEQUENCES = 4
"""What they cost together tells what each one adds to the first."""
INDISPENSABLE_WIDTH = 5
"""Beside one row, this width or K + 1 is measured whatever it takes: two points make a line."""
EXPECTED_GROWTH = 0.25
"""Twice as many rows are expected to take longer by this share: weights are read once for all of them."""
SURPRISE = 1.5
"""What took so many times what was expected has set something up, and is timed once more."""
STEADY = 1.25
"""Where nobody disturbs, a step's second quickest time is within this of its quickest."""
LEAST_REPEATED = 4
"""Fewer steps timed twice tell nothing: where others are busy the budget is spent before."""


@dataclass(frozen=True, slots=True)
class ServedRounds:
    """The rounds that are to be priced.

    Attributes:
        num_draft_tokens: K, the draft model's cap, at least 1.
        num_suffix_tokens: the most that is proposed without a model.
        sampling: as most requests have it; of its numbers it only matters which are switched on.
        trace: whether the target's top tokens are kept.
    """

    num_draft_tokens: int
    num_suffix_tokens: int = 0
    sampling: Sampling = Sampling()  # noqa: RUF009  # frozen
    trace: bool = False

    @property
    def widest(self) -> int:
        """Rows of the widest verification."""
        return max(self.num_draft_tokens, self.num_suffix_tokens) + 1

    @property
    def facts(self) -> dict[str, str]:
        """What their cost depends on, beside widths."""
        one = self.sampling
        switched = {"top_k": one.top_k > 0, "top_p": one.top_p < 1, "min_p": one.min_p > 0}
        stages = ["greedy"] if one.greedy else ["sampled", *(name for name, on in switched.items() if on)]
        return {"sampling": " ".join(stages), "trace": str(self.trace)}


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured, and how far it is to be trusted.

    Attributes:
        costs: of rounds.
        steady: whether most of what was timed again took the same. Where other programs are busy it does
            not, or there was no time to; what each step costs then depends on when they were.
    """

    costs: RoundCosts
    steady: bool


def measure_costs(
    pair: Pair, rounds: ServedRounds, clock: Callable[[], float] = time.perf_counter
) -> Measured:
    """Time the draft's steps and the target's, and keep each one's quickest: what nobody disturbed.

    What the budget leaves out is interpolated, or goes on with the mean slope (`RoundCosts.verify_at`).

    Args:
        pair: with a draft. Its caches hold a short text and a round, or as much as there is room for.
        rounds: what is served.
        clock: seconds.
    """
    if pair.draft is None:
        raise ValueError("without a draft there is nothing to choose")
    session, rules = _Session(clock), Rules(rounds.sampling)
    draft = filled_cache(pair.draft, max(min(rounds.num_draft_tokens, DRAFTED_TOKENS), READ_TOKENS))
    many = max(2, min(rounds.num_draft_tokens, DRAFTED_TOKENS))
    most = min(READ_TOKENS, draft.max_tokens - draft.position)
    one = session.first(proposal_step(pair.draft, [draft], 1, rules), needed=True)
    several = session.first(proposal_step(pair.draft, [draft], many, rules), many * one.best_s)
    half, whole = (
        session.first(proposal_step(pair.draft, [draft], 1, rules, count), _grown(one.best_s, 1, count))
        for count in (most // 2, most)
    )
    drafted = one.result if several.result is None else several.result
    drafted_together = _Step(lambda: None)
    if together := caches_beside(pair.draft, draft, SEQUENCES):
        step = proposal_step(pair.draft, together, 1, rules)
        drafted_together = session.first(step, SEQUENCES * one.best_s)
    verified, verified_together = _verifications(session, pair.target, rounds, drafted)
    session.repeat()
    # Unmeasured steps count as endless: a draft then costs as much as the first.
    draft_s = min(max(0.0, several.best_s - one.best_s) / (many - 1), one.best_s)
    read_s = max(0.0, whole.best_s - half.best_s) / (most - most // 2) if whole.measured else draft_s
    # A wider step is never cheaper; where it was, the clock jittered.
    verify_s = itertools.accumulate((verified[width].best_s for width in sorted(verified)), max)
    costs = RoundCosts(
        verify_s=tuple(zip(sorted(verified), verify_s, strict=True)),
        draft_s=draft_s,
        draft_round_s=one.best_s - draft_s,
        read_s=read_s,
        sampling=rounds.sampling,
    )
    # Sequences whose steps were not measured together are taken to have nothing in common.
    verify_together_s = min(SEQUENCES * costs.verify_at(1), verified_together.best_s)
    draft_together_s = min(SEQUENCES * one.best_s, drafted_together.best_s)
    costs = replace(
        costs,
        verify_more_s=max(0.0, verify_together_s - costs.verify_at(SEQUENCES)) / (SEQUENCES - 1),
        draft_more_s=max(0.0, draft_together_s - one.best_s) / (SEQUENCES - 1),
    )
    return Measured(costs, session.steady)


class _Step:
    """Something to be timed.

    Attributes:
        best_s: its quickest time; infinite before it was ever run.
        second_s: the next one; infinite before it was run twice.
        result: what it gave last.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.best_s = self.second_s = math.inf
        self.result: Any = None

    def took(self, seconds: float) -> None:
        """It was run once more."""
        self.best_s, self.second_s, _ = sorted((self.best_s, self.second_s, seconds))

    @property
    def measured(self) -> bool:
        """Whether it was ever run."""
        return math.isfinite(self.best_s)


class _Session:
    """Times steps while the budget lasts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._end_s = clock() + BUDGET_S
        self._steps: list[_Step] = []

    def first(self, run: Callable[[], Any], expected_s: float = 0.0, *, needed: bool = False) -> _Step:
        """Time something new, where it is expected to fit or nothing can be told without it."""
        step = _Step(run)
        if needed or expected_s <= self._left_s:
            took_s = self._time(step)
            if SURPRISE * expected_s < took_s <= self._left_s:
                self._time(step)
            self._steps.append(step)
        return step

    def repeat(self) -> None:
        """Time all of them again, in turn, while there is time."""
        for _ in range(MOST_PASSES - 1):
            for step in self._steps:
                if step.best_s <= self._left_s:
                    self._time(step)

    @property
    def steady(self) -> bool:
        """See `Measured`."""
        repeated = [step for step in self._steps if math.isfinite(step.second_s)]
        alike = sum(step.second_s <= STEADY * step.best_s for step in repeated)
        return len(repeated) >= LEAST_REPEATED and 2 * alike > len(repeated)

    @property
    def _left_s(self) -> float:
        return self._end_s - self._clock()

    def _time(self, step: _Step) -> float:
        before_s = self._clock()
        step.result = step.run()
        took_s = self._clock() - before_s
        step.took(took_s)
        return took_s


def _verifications(
    session: _Session, target: Model, rounds: ServedRounds, drafted: Proposal
) -> tuple[dict[int, _Step], _Step]:
    """The target's steps by width, those worth their time, at least one row; and SEQUENCES together."""
    # A suffix match is cut to what the cache has room for.
    room = target.new_cache().max_tokens - 1
    widest, rules = min(rounds.widest, room), Rules(rounds.sampling)
    cache = filled_cache(target, min(max(widest, *SHARED_WIDTHS), room))
    measured: dict[int, _Step] = {}
    together = _Step(lambda: None)
    shared = (width for width in SHARED_WIDTHS if width <= room)
    for width in dict.fromkeys((*_widths_by_need(rounds.num_draft_tokens + 1, widest), *shared)):
        below = max((known for known in measured if known < width), default=None)
        step = session.first(
            verification_step(target, [cache], width - 1, rules, drafted=drafted, trace=rounds.trace),
            0.0 if below is None else _grown(measured[below].best_s, below, width),
            needed=len(measured) < 2,
        )
        if step.measured:
            measured[width] = step
        due = len(measured) == 2 and not together.measured
        if due and (caches := caches_beside(target, cache, SEQUENCES)):
            alone = verification_step(target, caches, 0, rules, drafted=drafted, trace=rounds.trace)
            together = session.first(alone, _grown(measured[1].best_s, 1, SEQUENCES))
    return measured, together


def _widths_by_need(usual: int, widest: int) -> list[int]:
    """One row and a few, every small width, the widest, K + 1, and some between."""
    wanted = [1, min(usual, INDISPENSABLE_WIDTH), *range(2, SMALL_WIDTH + 1), widest, usual, *LARGE_WIDTHS]
    return [width for width in dict.fromkeys(wanted) if width <= widest]


def _grown(seconds: float, width: int, wider: int) -> float:
    """What a step of `wider` rows is expected to take, by one of `width`."""
    return seconds * (1 + EXPECTED_GROWTH * (wider / width - 1))
