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

    from draftloop.speculation.costs import SharedPrices
    from draftloop.speculation.schedule import Schedule


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
        most_each: drafts for each stream on the average, beside what is settled; None: as many as there are.
    """
    most = None if most_each is None else most_each * len(prospects)
    deepest = max((len(one.chances) for one in prospects if with_model and _asks(one)), default=0)
    best: Plan | None = None
    for depth in range(min(1, deepest), deepest + 1):
        growing = _Growing(costs, prospects)
        for draft in (None, *_by_gain(prospects, depth)[:most]):
            if draft is not None:
                growing.add(*draft)
            better = best is None or growing.tokens_per_s > best.tokens_per_s
            if better and (growing.asked or not depth):
                best = growing.plan()
    if best is None:
        raise ValueError("there is no plan for no streams")
    return best


def _asks(prospect: Prospect) -> bool:
    return prospect.by_model and not prospect.settled


def _by_gain(prospects: Sequence[Prospect], depth: int) -> list[tuple[int, float]]:
    """(stream, expected tokens) of every draft that may be added, a model's as far as `depth`; best first."""
    drafts = []
    for stream, one in enumerate(prospects):
        kept = 1.0
        for chance in () if one.settled else one.chances[: depth if one.by_model else None]:
            kept *= chance
            drafts.append((stream, kept))
    # A stable sort keeps the drafts of a stream in their order.
    return sorted(drafts, key=lambda draft: -draft[1])


class _Growing:
    """A plan to which drafts are added."""

    def __init__(self, costs: SharedPrices, prospects: Sequence[Prospect]) -> None:
        self._costs, self._prospects = costs, prospects
        self._ks = [0] * len(prospects)
        self._drafting: list[int] = []
        self._tokens = float(len(prospects))
        self.asked = False
        for stream, one in enumerate(prospects):
            kept = 1.0
            for chance in one.chances if one.settled else ():
                kept *= chance
                self._draft(stream, kept)

    def add(self, stream: int, gain: float) -> None:
        """One more draft of a stream that is not settled."""
        self.asked = self.asked or self._prospects[stream].by_model
        self._draft(stream, gain)

    @property
    def round_s(self) -> float:
        """What it takes."""
        rows = len(self._ks) + sum(self._ks)
        return self._costs.shared_s(rows, len(self._ks), self._drafting)

    @property
    def tokens_per_s(self) -> float:
        """Expected of all streams together."""
        return self._tokens / self.round_s

    def plan(self) -> Plan:
        """As it stands."""
        taken = zip(self._prospects, self._ks, strict=True)
        return Plan(
            num_draft_tokens=tuple(self._ks),
            drafting=tuple(self._drafting),
            tokens_per_s=self.tokens_per_s,
            round_s=self.round_s,
            reads_backlog=any(k > 0 and one.backlog_tokens > 0 for one, k in taken),
        )

    def _draft(self, stream: int, gain: float) -> None:
        if self._prospects[stream].by_model:
            depth = self._ks[stream]
            self._drafting += [0] if depth == len(self._drafting) else []
            self._drafting[depth] += 1
        self._ks[stream] += 1
        self._tokens += gain


class TogetherPace:
    """Chooses for the streams of one batch, round by round. What it learns it shares with `schedule`."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._plan: Plan | None = None

    def favourite(self, prospects: Sequence[Prospect]) -> int:
        """Which of several drafters promises a stream most, backlogs counted; of equals the first."""
        prices, seconds = self._schedule.costs.now(), []
        for one in prospects:
            speed = best_choice(prices, one.chances, by_model=one.by_model).tokens_per_s
            seconds.append(1 / speed + self._read_s(one) / one.ahead_tokens)
        return seconds.index(min(seconds))

    def choose(self, prospects: Sequence[Prospect]) -> Plan:
        """K of each stream. The draft is probed as for one stream, out of the same allowance."""
        probes = self._schedule.probes
        plain = best_plan(self._schedule.costs, prospects, with_model=False)
        self._plan = plain
        asked = [index for index, one in enumerate(prospects) if _asks(one) and one.chances]
        drafting, speedup = self._drafting(prospects, asked, plain)
        ready = [index for index in asked if self._pays(prospects[index], plain, speedup)]
        if len(ready) < len(asked):
            drafting, speedup = self._drafting(prospects, ready, plain)
        if speedup > 1:
            probes.soon()
            # Drafts are set off against what so many streams take without them, so that is looked at first.
            known = self._schedule.costs.knows_shared(plain.rows, len(prospects))
            self._plan = drafting if known and not probes.alone_due else plain
        elif asked:
            cheapest = min(asked, key=lambda index: prospects[index].backlog_tokens)
            probing, speedup = self._drafting(prospects, [cheapest], plain)
            loss_s = max(0.0, probing.round_s * (1 - speedup))
            if probes.due(self._read_s(prospects[cheapest]), loss_s):
                self._plan = probing
        return self._plan

    def reads_along(self, prospect: Prospect, count: int) -> bool:
        """Whether the draft shall read what it lacks at once, beside so many streams of the same prospect."""
        prospects = [prospect] * count
        plain = best_plan(self._schedule.costs, prospects, with_model=False)
        _, speedup = self._drafting(prospects, range(count), plain)
        return self._pays(prospect, plain, speedup)

    def _pays(self, prospect: Prospect, plain: Plan, speedup: float) -> bool:
        """Whether its backlog does, where all streams together are so much faster than by the plain plan."""
        saved_s = (1 - 1 / speedup) / plain.tokens_per_s
        return saved_s > 0 and self._read_s(prospect) <= prospect.ahead_tokens * saved_s

    def _read_s(self, prospect: Prospect) -> float:
        return prospect.backlog_tokens * self._schedule.costs.calibrated.read_s

    def _drafting(self, prospects: Sequence[Prospect], who: Sequence[int], plain: Plan) -> tuple[Plan, float]:
        """The best plan that asks the model for some of these streams, and its speed over the plain one's."""
        if not who:
            return plain, 1.0
        open_ones = [
            replace(one, chances=()) if _asks(one) and index not in who else one
            for index, one in enumerate(prospects)
        ]
        # What drafts cost so many streams is found out a step at a time: a guess too high is dear for all.
        most_each = self._schedule.costs.most_drafts_known(len(prospects)) + 1
        plan = best_plan(self._schedule.costs, open_ones, with_model=True, most_each=most_each)
        return plan, plan.tokens_per_s / plain.tokens_per_s

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
            probes.passed_alone(plan.round_s)
