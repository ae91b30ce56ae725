"""What a round costs: as calibrated, and as it turns out while serving.

Contract: seconds in, seconds out; deterministic. Must not know models, clocks or who drafts why.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_COMMON_STEP, _OWN_STEP = 0.4, 0.1
"""How much of a surprise is put down to the machine's mood, and how much to the width itself."""
_LARGEST_SURPRISE = 0.5
"""In log seconds: a stall says no more than a round that took 1.65 times as long."""


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """Measured seconds.

    Attributes:
        verify_s: (width, seconds) of the target's step over so many tokens, by growing width; the first
            width is 1. Between two the cost is interpolated, beyond the last it goes on with the mean slope.
        draft_s: of each drafted token.
        draft_round_s: what asking the draft costs beside that, once a round.
        read_s: of each token that the draft reads to catch up.
        verify_more_s: of each sequence that the target verifies beside the first, beyond its rows.
        draft_more_s: of each sequence that takes part in one of the draft's steps beside the first.
        sampling: how the tokens were chosen meanwhile. What is timed to be set off against these seconds is
            timed likewise: sampled steps cost more than greedy ones.
    """

    verify_s: tuple[tuple[int, float], ...]
    draft_s: float
    draft_round_s: float
    read_s: float
    verify_more_s: float = 0.0
    draft_more_s: float = 0.0
    sampling: Sampling = Sampling()  # noqa: RUF009  # frozen

    def verify_at(self, width: int) -> float:
        """Seconds of the target's step over `width` tokens."""
        points = self.verify_s
        index = bisect_left(points, width, key=lambda point: point[0])
        if index < len(points):
            right, right_s = points[index]
            if right == width:
                return right_s
            left, left_s = points[index - 1]
            return left_s + (right_s - left_s) * (width - left) / (right - left)
        (first, first_s), (last, last_s) = points[0], points[-1]
        # One width tells no slope: then rows are taken to cost as much as the first.
        slope = max(0.0, (last_s - first_s) / (last - first)) if last > first else first_s
        return last_s + slope * (width - last)

    def round_s(self, num_draft_tokens: int, *, by_model: bool = True) -> float:
        """Seconds of a round that drafts K tokens; a drafter that is no model drafts for nothing."""
        draft_s = self.draft_round_s + num_draft_tokens * self.draft_s if by_model and num_draft_tokens else 0
        return draft_s + self.verify_at(num_draft_tokens + 1)

    def shared_s(self, rows: int, sequences: int, drafting: Sequence[int]) -> float:
        """Seconds of a round that several sequences share.

        Args:
            rows: that the target verifies, all sequences' together.
            sequences: at least one.
            drafting: how many of them take part in each of the draft's steps.
        """
        verify_s = self.verify_at(rows) + (sequences - 1) * self.verify_more_s
        steps_s = sum(self.draft_s + (count - 1) * self.draft_more_s for count in drafting)
        return verify_s + (self.draft_round_s + steps_s if drafting else 0.0)

    def shared_by_drafts(self, sequences: int, most_drafts: int) -> SharedRounds:
        """The same for every number of drafts."""
        more_s = (sequences - 1) * self.verify_more_s
        verify_s = [self.verify_at(sequences + drafts) + more_s for drafts in range(most_drafts + 1)]
        return SharedRounds(
            verify_s, [1.0] * len(verify_s), self.draft_round_s, self.draft_s, self.draft_more_s
        )


@dataclass(frozen=True, slots=True)
class SharedRounds:
    """What rounds of so many sequences cost: factors[m] · (verify_s[m] + drafting), m drafts in all.

    Attributes:
        verify_s: the target's part, by m.
        factors: by m; what is known better than the other numbers.
        draft_round_s, draft_s, draft_more_s: as in `RoundCosts`.
    """

    verify_s: Sequence[float]
    factors: Sequence[float]
    draft_round_s: float
    draft_s: float
    draft_more_s: float


class SharedPrices(Protocol):
    """Whoever tells what a round of several sequences costs."""

    def shared_by_drafts(self, sequences: int, most_drafts: int) -> SharedRounds:
        """Up to so many drafts of all of them together."""
        ...


class Prices(Protocol):
    """Whoever tells what a round costs."""

    def round_s(self, num_draft_tokens: int, *, by_model: bool = True) -> float:
        """Seconds of a round that drafts K tokens."""
        ...


@dataclass(frozen=True, slots=True)
class CorrectedCosts:
    """Calibrated costs, and what they got wrong by (K, whether a model drafts), in log seconds."""

    calibrated: RoundCosts
    corrections: Mapping[tuple[int, bool], float] = field(default_factory=dict)

    def round_s(self, num_draft_tokens: int, *, by_model: bool = True) -> float:
        """See `Prices`."""
        correction = self.corrections.get(_kind(num_draft_tokens, by_model=by_model), 0.0)
        return self.calibrated.round_s(num_draft_tokens, by_model=by_model) * math.exp(correction)


class LiveCosts:
    """The calibrated costs, refined by what rounds took.

    A round's time over the calibrated one is split into a factor that all rounds share (the machine is busy,
    the context is long) and one of its own K. The first follows the moment quickly and changes no choice; the
    second is what the calibration got wrong, and moves slowly. Surprises are cut: a stall does little.
    """

    def __init__(self, calibrated: RoundCosts) -> None:
        self.calibrated = calibrated
        self._common = 0.0
        self._corrections: dict[tuple[int, bool], float] = {}
        self._shared: dict[int, dict[int, _Seen]] = {}
        """By the number of sequences, and the drafts that they have each, rounded up."""
        self._by_sequences: dict[int, SharedRounds] = {}

    def now(self) -> CorrectedCosts:
        """As they are known now; later rounds do not change them."""
        return CorrectedCosts(self.calibrated, dict(self._corrections))

    def observe(self, num_draft_tokens: int, seconds: float, *, by_model: bool = True) -> None:
        """Learn from a round that read no backlog."""
        if seconds <= 0:
            return
        kind = _kind(num_draft_tokens, by_model=by_model)
        calibrated_s = self.calibrated.round_s(num_draft_tokens, by_model=by_model)
        correction = self._corrections.get(kind, 0.0)
        surprise = self._surprise(seconds, calibrated_s, correction)
        self._corrections[kind] = correction + _OWN_STEP * surprise

    def shared_by_drafts(self, sequences: int, most_drafts: int) -> SharedRounds:
        """As calibrated, corrected by such rounds; where there were none, by the most alike."""
        rounds = self._by_sequences.get(sequences)
        if rounds is None or len(rounds.verify_s) <= most_drafts:
            rounds = self.calibrated.shared_by_drafts(sequences, most_drafts)
            self._by_sequences[sequences] = rounds
        seen = self._most_alike(sequences)
        if not seen:
            return rounds
        factors = []
        for each in range(_drafts_each(sequences + most_drafts, sequences) + 1):
            alike = seen[min(seen, key=lambda known: (abs(known - each), known))]
            factors += [math.exp(alike.correction)] * (sequences if each else 1)
        return replace(rounds, factors=factors)

    def observe_shared(self, rows: int, sequences: int, drafting: Sequence[int], seconds: float) -> None:
        """Learn from a round of several sequences that read no backlog.

        Calibration knows less of them than of one sequence's, so the first rounds count for more. But for the
        very first of a kind where that took far longer: it has set something up, as a GPU that records it.
        """
        if seconds <= 0:
            return
        calibrated_s = self.calibrated.shared_s(rows, sequences, drafting)
        known, each = self._shared.setdefault(sequences, {}), _drafts_each(rows, sequences)
        if each not in known:
            correction = math.log(seconds / calibrated_s) - self._common
            set_up = correction > _LARGEST_SURPRISE
            known[each] = _Seen(0, 0.0) if set_up else _Seen(1, correction)
            return
        before = known[each]
        surprise = self._surprise(seconds, calibrated_s, before.correction)
        step = max(_OWN_STEP, 1 / (before.rounds + 1))
        known[each] = _Seen(before.rounds + 1, before.correction + step * surprise)

    def knows_shared(self, rows: int, sequences: int) -> bool:
        """Whether a round like this was ever looked at, with so many sequences or the next number known."""
        return _drafts_each(rows, sequences) in self._most_alike(sequences)

    def most_drafts_known(self, sequences: int) -> int:
        """The most drafts for each of so many sequences, or of the next number known, in any round so far."""
        return max(self._most_alike(sequences), default=0)

    def _most_alike(self, sequences: int) -> Mapping[int, _Seen]:
        """What is believed of so many sequences, or of the next number of which anything is."""
        believed = {
            count: {each: seen for each, seen in kinds.items() if seen.rounds}
            for count, kinds in self._shared.items()
        }
        counts = [count for count, kinds in believed.items() if kinds]
        return believed[min(counts, key=lambda count: (abs(count - sequences), count))] if counts else {}

    def _surprise(self, seconds: float, calibrated_s: float, correction: float) -> float:
        """What nothing explains so far, cut; the common factor takes its part."""
        surprise = math.log(seconds / calibrated_s) - correction - self._common
        surprise = max(-_LARGEST_SURPRISE, min(_LARGEST_SURPRISE, surprise))
        self._common += _COMMON_STEP * surprise
        return surprise


@dataclass(frozen=True, slots=True)
class _Seen:
    """Rounds of one kind that were believed, and what the calibration got wrong in them, in log seconds."""

    rounds: int
    correction: float


def _drafts_each(rows: int, sequences: int) -> int:
    return -(-(rows - sequences) // sequences)


def _kind(num_draft_tokens: int, *, by_model: bool) -> tuple[int, bool]:
    return num_draft_tokens, by_model and num_draft_tokens > 0
