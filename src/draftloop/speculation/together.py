"""How many tokens each of several streams drafts in a round that they share, round by round.

Contract: as `schedule.py`, for a batch: deterministic given what it is told, by past rounds only. One choice
for all, because they share its cost: a row more costs what the target's step grows by, a drafting step the
same for one sequence as nearly for all. Must not know models, caches or requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from draftloop.speculation.plans import asks_model, best_plan
from draftloop.speculation.schedule import best_choice

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from draftloop.speculation.plans import Plan, Prospect
    from draftloop.speculation.schedule import Schedule


LEAST_SPEEDUP = 1.1
"""Prices are as wrong as that, and streams that draft in turns with plain rounds lag and catch up."""

GOOD_CHANCE = 0.95
"""Of the drafts of a model that is as good a draft as they ever are."""

STANDING_ROUNDS = 8
"""A plan stands for so many rounds behind its first one."""


@dataclass(frozen=True, slots=True)
class _Standing:
    """A plan, for streams like these, so many rounds more."""

    alike: Hashable
    plan: Plan
    rounds: int

    def suits(self, alike: Hashable, prospects: Sequence[Prospect]) -> bool:
        """Whether it may be followed once more: not where somebody would be caught up with that was not asked
        whether it pays, such as one who has joined in another's place.
        """
        if self.alike != alike or not self.rounds:
            return False
        drafts = zip(self.plan.num_draft_tokens, prospects, strict=True)
        return not any(k and one.backlog_tokens for k, one in drafts)


def _saved_s(plain: Plan, promised: Plan) -> float:
    """Of each token of all streams together."""
    return 1 / plain.tokens_per_s - 1 / promised.tokens_per_s


class TogetherPace:
    """Chooses for the streams of one batch, round by round. What it learns it shares with `schedule`."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._plan: Plan | None = None
        self._standing: _Standing | None = None
        self._drafts = False
        self._company = 0

    def expect(self, count: int) -> None:
        """So many streams are answered at a time, those included whose prompts are still being read."""
        self._company = count

    def favourite(self, prospects: Sequence[Prospect]) -> int:
        """Which of several drafters promises a stream most, backlogs counted; of equals the first."""
        if len(prospects) == 1:
            return 0
        prices, seconds = self._schedule.costs.now(), []
        for one in prospects:
            speed = best_choice(prices, one.chances, by_model=one.by_model).tokens_per_s
            seconds.append(1 / speed + self._read_s(one) / one.ahead_tokens)
        return seconds.index(min(seconds))

    def choose(self, prospects: Sequence[Prospect]) -> Plan:
        """K of each stream. The draft is probed as for one stream, out of the same allowance.

        Catching up is paid for many rounds, so drafts begin only where they promise more than prices may be
        wrong by, and go on while they promise anything. A plan stands for some rounds while the streams are
        the same: making one takes as long as a good part of a GPU's round.
        """
        alike = self._company, tuple((len(one.chances), one.by_model, one.settled) for one in prospects)
        standing = self._standing
        if standing is not None and standing.suits(alike, prospects):
            self._standing = replace(standing, rounds=standing.rounds - 1)
            self._plan = standing.plan
            return standing.plan
        plan, stands = self._chosen(prospects)
        self._plan, self._standing = plan, None
        # What a text offers by itself is other in every round.
        if stands and all(one.by_model for one in prospects):
            caught_up = replace(plan, reads_backlog=False)
            self._standing = _Standing(alike, caught_up, STANDING_ROUNDS)
        return plan

    def _chosen(self, prospects: Sequence[Prospect]) -> tuple[Plan, bool]:
        """The plan, and whether it would be the same again: nothing is tried out by it."""
        probes, costs = self._schedule.probes, self._schedule.costs
        plain = best_plan(costs, prospects, with_model=False)
        asked = [index for index, one in enumerate(prospects) if asks_model(one) and one.chances]
        promised = self._drafting(prospects, asked, plain)
        ready = [index for index in asked if self._pays(prospects[index], plain, promised)]
        if len(ready) < len(asked):
            promised = self._drafting(prospects, ready, plain)
        self._drafts = promised.tokens_per_s > plain.tokens_per_s * (1 if self._drafts else LEAST_SPEEDUP)
        # Who is about to join changes what pays: what is found out before says nothing of later rounds.
        settled = len(prospects) >= self._company
        if self._drafts:
            if settled:
                probes.soon()
            # Drafts are set off against what so many streams take without them, so that is looked at first.
            if not costs.knows_shared(plain.rows, len(prospects)) or probes.alone_due:
                return plain, False
            # What drafts cost is found out a step at a time: a guess too high is dear for all.
            most_each = costs.most_drafts_known(len(prospects)) + 1
            if sum(promised.drafting) > most_each * len(prospects):
                return self._drafting(prospects, ready, plain, most_each), False
            return promised, True
        if asked and settled:
            cheapest = min(asked, key=lambda index: prospects[index].backlog_tokens)
            probing = self._drafting(prospects, [cheapest], plain, 1)
            loss_s = max(0.0, probing.round_s * (1 - probing.tokens_per_s / plain.tokens_per_s))
            backlog_s = self._read_s(prospects[cheapest])
            if probes.due(backlog_s, loss_s, lambda: self._hopeless(prospects, plain)):
                return probing, False
        return plain, True

    def reads_along(self, prospect: Prospect, count: int) -> bool:
        """Whether the draft shall read what it lacks at once, beside so many streams of the same prospect."""
        prospects = [prospect] * count
        plain = best_plan(self._schedule.costs, prospects, with_model=False)
        promised = self._drafting(prospects, range(count), plain)
        worth = promised.tokens_per_s > plain.tokens_per_s * LEAST_SPEEDUP
        return worth and self._read_s(prospect) <= prospect.ahead_tokens * _saved_s(plain, promised)

    def _pays(self, prospect: Prospect, plain: Plan, promised: Plan) -> bool:
        """Whether its backlog does. Where others are about to join, it is they who decide."""
        saved_s = _saved_s(plain, promised)
        if saved_s <= 0 or self._read_s(prospect) > prospect.ahead_tokens * saved_s:
            return False
        joining = prospect.backlog_tokens > 0 and self._company > len(plain.num_draft_tokens)
        return not joining or self.reads_along(prospect, self._company)

    def _hopeless(self, prospects: Sequence[Prospect], plain: Plan) -> bool:
        """Whether a draft as good as they ever are would not be worth asking either."""
        good = [
            replace(one, chances=(GOOD_CHANCE,) * len(one.chances)) if asks_model(one) else one
            for one in prospects
        ]
        promised = best_plan(self._schedule.costs, good, with_model=True)
        return promised.tokens_per_s <= plain.tokens_per_s * LEAST_SPEEDUP

    def _read_s(self, prospect: Prospect) -> float:
        return prospect.backlog_tokens * self._schedule.costs.calibrated.read_s

    def _drafting(
        self, prospects: Sequence[Prospect], who: Sequence[int], plain: Plan, most_each: int | None = None
    ) -> Plan:
        """The best plan that asks the model for some of these streams; where they are none, the plain one."""
        if not who:
            return plain
        open_ones = [
            replace(one, chances=()) if asks_model(one) and index not in who else one
            for index, one in enumerate(prospects)
        ]
        return best_plan(self._schedule.costs, open_ones, with_model=True, most_each=most_each)

    def observe(self, seconds: float | None) -> None:
        """The round that was chosen for took so long; None where that says nothing of the models."""
        plan, self._plan = self._plan, None
        if plan is None:
            return
        probes, count = self._schedule.probes, len(plan.num_draft_tokens)
        if seconds is not None and not plan.reads_backlog:
            self._schedule.costs.observe_shared(plan.rows, count, plan.drafting, seconds)
        if plan.drafting:
            probes.passed_drafting()
        else:
            # All streams pay for a probe, and one of them is looked at: it is granted that one's part.
            probes.passed_alone(plan.round_s / count)
