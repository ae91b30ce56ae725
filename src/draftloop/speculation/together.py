"""How many tokens each of several streams drafts in a round that they share.

Contract: as `schedule.py`, for a batch: deterministic given what it is told, by past rounds only. One choice
for all, because they share its cost: a row more costs what the target's step grows by, a drafting step the
same for one sequence as nearly for all. Must not know models, caches or requests.

The best plan has the most expected tokens a second, Σ_i (1 + Σ_{j<=K_i} Π_{l<=j} α_il) / shared_s(K). A draft
can be added only behind those before it, and is expected to bring less than they do, so the drafts of all
streams by falling expectation form one order in which each beginning is a plan. The cost of drafting steps
depends on the deepest draft alone: each depth is tried, with the drafts that are not deeper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from draftloop.speculation.schedule import HORIZON_TOKENS, best_choice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.speculation.costs import SharedPrices, SharedRounds
    from draftloop.speculation.schedule import Schedule


LEAST_SPEEDUP = 1.1
"""Prices are as wrong as that, and streams that draft in turns with plain rounds lag and catch up."""

GOOD_CHANCE = 0.95
"""Of the drafts of a model that is as good a draft as they ever are."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """What one stream could draft.

    Attributes:
        chances: draft i is kept with chances[i] if those before it were.
        by_model: whether a model drafts, which takes time.
        tokens: what would be proposed, where that is known already.
        backlog_tokens: what the draft would have to read first.
        ahead_tokens: in how many tokens that must pay.
        settled: somebody else has chosen: all of them are drafted.
    """

    chances: tuple[float, ...]
    by_model: bool = True
    tokens: tuple[int, ...] = ()
    backlog_tokens: int = 0
    ahead_tokens: int = HORIZON_TOKENS
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """K of each stream.

    Attributes:
        num_draft_tokens: in the order of the streams.
        drafting: how many of them the draft model drafts for in each of its steps.
        tokens_per_s: expected of all together.
        round_s: what the round is expected to take, backlogs aside: they are paid once, for many rounds.
        reads_backlog: whether it has to catch up for one of them.
    """

    num_draft_tokens: tuple[int, ...]
    drafting: tuple[int, ...]
    tokens_per_s: float
    round_s: float
    reads_backlog: bool

    @property
    def rows(self) -> int:
        """What the target verifies for all together."""
        return len(self.num_draft_tokens) + sum(self.num_draft_tokens)


def best_plan(
    costs: SharedPrices, prospects: Sequence[Prospect], *, with_model: bool, most_each: int | None = None
) -> Plan:
    """The plan with the most expected tokens a second; of equals the one that drafts least.

    Args:
        costs: of shared rounds.
        prospects: one for each stream, at least one.
        with_model: whether the draft model is asked for those who are not settled: at least for one of
            them, where there is one. Else for nobody.
        most_each: of the model's for each stream on the average, beside what is settled, at least 1; None:
            as many as there are.
    """
    count, offered = len(prospects), sum(len(one.chances) for one in prospects)
    if not count:
        raise ValueError("there is no plan for no streams")
    growing = _Growing(costs.shared_by_drafts(count, offered), prospects)
    most = max(1, offered) if most_each is None else most_each * count
    drafts = _by_gain(prospects)
    deepest = max((len(one.chances) for one in prospects if with_model and _asks(one)), default=0)
    depths = range(1, deepest + 1) if deepest else (0,)
    return max((growing.best(drafts, depth, most) for depth in depths), key=lambda plan: plan.tokens_per_s)


def _asks(prospect: Prospect) -> bool:
    return prospect.by_model and not prospect.settled


def _by_gain(prospects: Sequence[Prospect]) -> list[tuple[float, int, int]]:
    """(expected tokens, stream, place in its draft) of every draft that may be added; best first."""
    drafts = []
    for stream, one in enumerate(prospects):
        kept = 1.0
        for place, chance in enumerate(() if one.settled else one.chances):
            kept *= chance
            drafts.append((kept, stream, place))
    # A stable sort keeps the drafts of a stream in their order.
    return sorted(drafts, key=lambda draft: -draft[0])


class _Growing:
    """Adds draft after draft to what others have settled. It runs in every round, so it only adds numbers."""

    def __init__(self, costs: SharedRounds, prospects: Sequence[Prospect]) -> None:
        self._costs, self._prospects = costs, prospects
        self._settled = [
            (stream, place, one.by_model)
            for stream, one in enumerate(prospects)
            if one.settled
            for place in range(len(one.chances))
        ]
        self._tokens = float(len(prospects))
        for one in prospects:
            kept = 1.0
            for chance in one.chances if one.settled else ():
                kept *= chance
                self._tokens += kept

    def best(self, drafts: Sequence[tuple[float, int, int]], depth: int, most: int) -> Plan:
        """The best beginning of `drafts`, of the draft model's those whose place is below `depth`.

        Args:
            drafts: as `_by_gain` has them.
            depth: 0 asks the draft model for nobody, else it is asked for somebody.
            most: of the draft model's, at least 1.
        """
        by_model = [one.by_model for one in self._prospects]
        asking = [0] * max(depth, *(place + 1 for _, place, _ in self._settled), 0)
        drafting_s = 0.0
        for _, place, asked in self._settled:
            drafting_s += self._step_s(asking, place) if asked else 0.0
        tokens, total, left = self._tokens, len(self._settled), most
        added: list[tuple[float, int, int]] = []
        best, best_speed = 0, 0.0 if depth else self._speed(tokens, total, drafting_s)
        for draft in drafts:
            kept, stream, place = draft
            if by_model[stream]:
                if place >= depth or not left:
                    continue
                drafting_s += self._step_s(asking, place)
                left -= 1
            added.append(draft)
            tokens += kept
            speed = self._speed(tokens, total + len(added), drafting_s)
            if speed > best_speed and (left < most or not depth):
                best, best_speed = len(added), speed
        return self._plan(added[:best], best_speed)

    def _step_s(self, asking: list[int], place: int) -> float:
        """What one more sequence in the draft's step `place` takes; it is counted."""
        asking[place] += 1
        if asking[place] > 1:
            return self._costs.draft_more_s
        return self._costs.draft_s + (0.0 if place else self._costs.draft_round_s)

    def _speed(self, tokens: float, drafts: int, drafting_s: float) -> float:
        return tokens / (self._costs.factors[drafts] * (self._costs.verify_s[drafts] + drafting_s))

    def _plan(self, added: Sequence[tuple[float, int, int]], tokens_per_s: float) -> Plan:
        ks, drafting, tokens = [0] * len(self._prospects), [], self._tokens
        for stream, _, _ in self._settled:
            ks[stream] += 1
        for kept, stream, _ in added:
            ks[stream] += 1
            tokens += kept
        asked = [k for k, one in zip(ks, self._prospects, strict=True) if one.by_model]
        drafting = [sum(k > place for k in asked) for place in range(max(asked, default=0))]
        lagging = zip(ks, self._prospects, strict=True)
        return Plan(
            num_draft_tokens=tuple(ks),
            drafting=tuple(drafting),
            tokens_per_s=tokens_per_s,
            round_s=tokens / tokens_per_s,
            reads_backlog=any(k > 0 and one.backlog_tokens > 0 for k, one in lagging),
        )


def _saved_s(plain: Plan, promised: Plan) -> float:
    """Of each token of all streams together."""
    return 1 / plain.tokens_per_s - 1 / promised.tokens_per_s


class TogetherPace:
    """Chooses for the streams of one batch, round by round. What it learns it shares with `schedule`."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._plan: Plan | None = None
        self._drafts = False
        self._company = 0

    def expect(self, count: int) -> None:
        """So many streams are answered at a time, those included whose prompts are still being read."""
        self._company = count

    def favourite(self, prospects: Sequence[Prospect]) -> int:
        """Which of several drafters promises a stream most, backlogs counted; of equals the first."""
        prices, seconds = self._schedule.costs.now(), []
        for one in prospects:
            speed = best_choice(prices, one.chances, by_model=one.by_model).tokens_per_s
            seconds.append(1 / speed + self._read_s(one) / one.ahead_tokens)
        return seconds.index(min(seconds))

    def choose(self, prospects: Sequence[Prospect]) -> Plan:
        """K of each stream. The draft is probed as for one stream, out of the same allowance.

        Catching up is paid for many rounds, so drafts begin only where they promise more than prices may be
        wrong by, and go on while they promise anything.
        """
        probes, costs = self._schedule.probes, self._schedule.costs
        plain = best_plan(costs, prospects, with_model=False)
        asked = [index for index, one in enumerate(prospects) if _asks(one) and one.chances]
        promised = self._drafting(prospects, asked, plain)
        ready = [index for index in asked if self._pays(prospects[index], plain, promised)]
        if len(ready) < len(asked):
            promised = self._drafting(prospects, ready, plain)
        self._drafts = promised.tokens_per_s > plain.tokens_per_s * (1 if self._drafts else LEAST_SPEEDUP)
        self._plan = plain
        # Who is about to join changes what pays: what is found out before says nothing of later rounds.
        settled = len(prospects) >= self._company
        if self._drafts:
            if settled:
                probes.soon()
            # Drafts are set off against what so many streams take without them, so that is looked at first.
            if costs.knows_shared(plain.rows, len(prospects)) and not probes.alone_due:
                # What drafts cost is found out a step at a time: a guess too high is dear for all.
                most_each = costs.most_drafts_known(len(prospects)) + 1
                self._plan = self._drafting(prospects, ready, plain, most_each)
        elif asked and settled:
            cheapest = min(asked, key=lambda index: prospects[index].backlog_tokens)
            probing = self._drafting(prospects, [cheapest], plain, 1)
            loss_s = max(0.0, probing.round_s * (1 - probing.tokens_per_s / plain.tokens_per_s))
            hopeless = self._hopeless(prospects, plain)
            if probes.due(self._read_s(prospects[cheapest]), loss_s, hopeless=hopeless):
                self._plan = probing
        return self._plan

    def reads_along(self, prospect: Prospect, count: int) -> bool:
        """Whether the draft shall read what it lacks at once, beside so many streams of the same prospect."""
        prospects = [prospect] * count
        plain = best_plan(self._schedule.costs, prospects, with_model=False)
        promised = self._drafting(prospects, range(count), plain)
        worth = promised.tokens_per_s > plain.tokens_per_s * LEAST_SPEEDUP
        return worth and self._read_s(prospect) <= prospect.ahead_tokens * _saved_s(plain, promised)

    def _pays(self, prospect: Prospect, plain: Plan, promised: Plan) -> bool:
        """Whether its backlog does. Where others are about to join, it is they who decide."""
        if prospect.backlog_tokens and self._company > len(plain.num_draft_tokens):
            return self.reads_along(prospect, self._company)
        saved_s = _saved_s(plain, promised)
        return saved_s > 0 and self._read_s(prospect) <= prospect.ahead_tokens * saved_s

    def _hopeless(self, prospects: Sequence[Prospect], plain: Plan) -> bool:
        """Whether a draft as good as they ever are would not be worth asking either."""
        good = [
            replace(one, chances=(GOOD_CHANCE,) * len(one.chances)) if _asks(one) else one
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
            replace(one, chances=()) if _asks(one) and index not in who else one
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
