"""The plan of a shared round with the most expected tokens a second: what each of several streams drafts.

Contract: pure sums over prices and chances. Must not know what was chosen before, models or requests.

The best plan has the most Σ_i (1 + Σ_{j<=K_i} Π_{l<=j} α_il) / seconds(K). A draft can be added only behind
those before it, and is expected to bring less than they do, so the drafts of all streams by falling
expectation form one order in which each beginning is a plan. What drafting takes depends on the deepest draft
too: each depth is tried, with the drafts that are not deeper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.speculation.schedule import HORIZON_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.speculation.costs import SharedPrices, SharedRounds


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
    deepest = max((len(one.chances) for one in prospects if with_model and asks_model(one)), default=0)
    depths = range(1, deepest + 1) if deepest else (0,)
    return max((growing.best(drafts, depth, most) for depth in depths), key=lambda plan: plan.tokens_per_s)


def asks_model(prospect: Prospect) -> bool:
    """Whether the draft model would draft it, as far as is chosen here."""
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
        self._by_model = [one.by_model for one in prospects]
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
        asking = [0] * max(depth, *(place + 1 for _, place, _ in self._settled), 0)
        drafting_s = 0.0
        for _, place, asked in self._settled:
            drafting_s += self._step_s(asking, place) if asked else 0.0
        tokens, total, left = self._tokens, len(self._settled), most
        added: list[tuple[float, int, int]] = []
        best, best_speed = 0, 0.0 if depth else self._speed(tokens, total, drafting_s)
        for draft in drafts:
            kept, stream, place = draft
            if self._by_model[stream]:
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
        ks, tokens = [0] * len(self._prospects), self._tokens
        for stream, _, _ in self._settled:
            ks[stream] += 1
        for kept, stream, _ in added:
            ks[stream] += 1
            tokens += kept
        asked = [k for k, by_model in zip(ks, self._by_model, strict=True) if by_model]
        drafting = [sum(k > place for k in asked) for place in range(max(asked, default=0))]
        lagging = zip(ks, self._prospects, strict=True)
        return Plan(
            num_draft_tokens=tuple(ks),
            drafting=tuple(drafting),
            tokens_per_s=tokens_per_s,
            round_s=tokens / tokens_per_s,
            reads_backlog=any(k > 0 and one.backlog_tokens > 0 for k, one in lagging),
        )
