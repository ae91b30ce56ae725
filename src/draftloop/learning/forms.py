"""Which form an adapter is deployed in: the plainest, unless a coarser one is faster here for certain.

Contract: times and replays the draft through the backend's seam; decides nothing about promotion. Must
not know requests or the store.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.lora import AdapterForm
from draftloop.learning.replayed import RoundCost
from draftloop.learning.student import student_quantile
from draftloop.learning.yielding import UNHURRIED
from draftloop.speculation.metrics import tokens_per_round
from draftloop.speculation.timing import time_proposals
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from draftloop.backends.base import Model
    from draftloop.backends.lora import Lora
    from draftloop.backends.training import Example
    from draftloop.learning.replayed import TimedRound
    from draftloop.learning.yielding import Courtesy
    from draftloop.speculation.costs import RoundCosts

TIMED_PROPOSALS = 5
INTERLEAVED_PASSES = 2
VERIFY_DRAFTS = 3
"""Where no round was ever timed, a verification counts as so many drafted tokens."""
MIN_COMPARED = 5
"""With fewer requests nothing is certain, and the plainest form stays."""
CERTAINTY = 0.95
"""One-sided: so sure must a coarser form's gain be."""
LEAST_GAIN = 0.05
"""Rounding loses part of any update, and making the coarser forms takes a minute for a small draft."""


@dataclass(frozen=True, slots=True)
class Outfit:
    """What a draft wears; no LoRA is the bare draft."""

    lora: Lora | None = None
    form: AdapterForm = AdapterForm.UNFUSED


@dataclass(frozen=True, slots=True)
class FormFigures:
    """What one form was measured to do.

    Attributes:
        draft_s: seconds a drafted token; None where the form was not tried: it cannot bring enough.
        tau: of the examples, replayed in this form; None where it was not, because it drafts no faster than
            a plainer form.
        tokens_per_s: expected, tau over the round's cost at the fastest K; None likewise.
        gain_low: lower bound of the gain in tokens per second over the plainer form that it had to beat;
            None where it was not compared.
        examples: how many were replayed; a form that cannot win any more is given up.
    """

    draft_s: float | None = None
    tau: float | None = None
    tokens_per_s: float | None = None
    gain_low: float | None = None
    examples: int = 0


@dataclass(frozen=True, slots=True)
class FormChoice:
    """Every form's figures, and the rounds' costs beside them.

    Attributes:
        best: to be deployed.
        figures: of each form that the backend has.
        cost: of a round in that form.
        incumbent_cost: with the incumbent.
        bare_cost: without an adapter.
    """

    best: AdapterForm
    figures: Mapping[AdapterForm, FormFigures]
    cost: RoundCost
    incumbent_cost: RoundCost
    bare_cost: RoundCost


@dataclass(frozen=True, slots=True)
class _Walked:
    """One replayed example: its tokens, and the rounds that they are expected to take at each K."""

    tokens: int
    rounds: Mapping[int, float]


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """One form on the first n examples.

    Attributes:
        walks: of each example.
        cost: of a round.
        draft_error_s: standard error of a drafted token's seconds. The verification is the same in each form.
        cap: the largest K.
    """

    walks: tuple[_Walked, ...]
    cost: RoundCost
    draft_error_s: float
    cap: int

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return sum(walk.tokens for walk in self.walks)

    @property
    def tau(self) -> float:
        """Tokens a round at the cap; 1 where nothing was replayed."""
        rounds = sum(walk.rounds[self.cap] for walk in self.walks)
        return tokens_per_round(self.tokens, rounds) or 1.0

    def seconds(self) -> tuple[NDArray[np.float64], float]:
        """Expected of each example at the fastest K, [n]; and the standard error of their sum."""
        k, rounds = self.cost.fastest_of([walk.rounds for walk in self.walks])
        return rounds * self.cost.round_s(k), float(rounds.sum()) * k * self.draft_error_s

    def tokens_per_s(self) -> float:
        """Expected; of a round of one token where nothing was replayed."""
        if not self.walks:
            return 1 / self.cost.round_s(self.cap)
        return self.tokens / float(self.seconds()[0].sum())

    def gain_over(self, plainer: _Measured, side: int) -> float | None:
        """Bound of the gain in tokens a second, paired over examples; None where there are too few.

        The seconds that an example saves scatter over the examples, and both forms' drafts were timed with
        an error that all examples share.

        Args:
            plainer: what it is compared with, on the same examples or on more.
            side: -1 for the lower bound, 1 for the upper one.
        """
        n = len(self.walks)
        if n < MIN_COMPARED:
            return None
        same = replace(plainer, walks=plainer.walks[:n])
        (own_s, own_error_s), (other_s, other_error_s) = self.seconds(), same.seconds()
        saved_s = other_s - own_s
        error_s = math.hypot(math.sqrt(n) * float(saved_s.std(ddof=1)), own_error_s, other_error_s)
        bound_s = float(saved_s.sum()) + side * student_quantile(CERTAINTY, n - 1) * error_s
        return bound_s / float(own_s.sum())


def choose_form(
    draft: Model,
    lora: Lora,
    incumbent: Outfit,
    examples: Sequence[Example],
    *,
    num_draft_tokens: int,
    timed_round: TimedRound | None,
    by_width: RoundCosts | None,
    compared: Callable[[float], None],
    courtesy: Courtesy = UNHURRIED,
) -> FormChoice:
    """Measure the forms that the backend has, beside the incumbent and the bare draft.

    From the plainest on, a coarser form is taken only where its gain in tokens a second over the one taken
    so far is certain: what rounding loses of a small update shows on few requests only as noise. No form
    drafts faster than the bare draft, so where that would gain less than LEAST_GAIN none is tried: making
    one takes longer than reading the examples.

    Args:
        draft: what it wears afterwards is unspecified.
        lora: the candidate.
        incumbent: what is served now.
        examples: replayed in each form.
        num_draft_tokens: K, or the most that a schedule may choose.
        timed_round: what a round with the incumbent took; its verification is what the drafts leave of it.
            None where no round was ever timed.
        by_width: what rounds were calibrated to cost, where a schedule chooses K. Drafts are timed under its
            sampling, since the verification is scaled by them.
        compared: is called with the share of an example that has been replayed.
        courtesy: drafts are timed while nobody else computes.
    """
    best, sampling = Outfit(lora), Sampling() if by_width is None else by_width.sampling

    def timed(*outfits: Outfit) -> list[list[float]]:
        return interleaved_draft_seconds(draft, outfits, num_draft_tokens, sampling, courtesy)

    timings = timed(Outfit(), incumbent, best)
    bare_s, incumbent_s = (statistics.median(one) for one in timings[:2])
    verify_s = _verify_seconds(timed_round, incumbent_s)
    now = by_width and _as_now(by_width, bare_s, num_draft_tokens)
    fitting = _Fitting(draft, examples, num_draft_tokens, verify_s, now, compared, len(draft.adapter_forms))
    bare_cost, incumbent_cost = (fitting.timed(one).cost for one in timings[:2])
    taken = fitting.replayed(best, fitting.timed(timings[2]), None)
    figures = {best.form: _figures(taken, None)}
    for form in draft.adapter_forms[1:]:
        outfit = Outfit(lora, form)
        ideal = replace(taken, cost=bare_cost)
        if ideal.tokens_per_s() < (1 + LEAST_GAIN) * taken.tokens_per_s():
            figures[form] = FormFigures()
            fitting.passed_over()
            continue
        own, rival = map(fitting.timed, timed(outfit, best))
        if own.cost.draft_s >= rival.cost.draft_s:
            figures[form] = FormFigures(own.cost.draft_s)
            fitting.passed_over()
            continue
        rival = replace(rival, walks=taken.walks)
        measured = fitting.replayed(outfit, own, rival)
        gain_low = measured.gain_over(rival, -1)
        figures[form] = _figures(measured, gain_low)
        if gain_low is not None and gain_low > 0:
            best, taken = outfit, measured
    return FormChoice(best.form, figures, taken.cost, incumbent_cost, bare_cost)


@dataclass(frozen=True, slots=True)
class _Fitting:
    """Tries outfits on the same examples.

    Attributes:
        cap: the largest K; drafts are timed at it.
        verify_s, by_width: as in `RoundCost`; every outfit's verification is the same.
        compared: is told of each example's share.
        forms: how many there are.
    """

    draft: Model
    examples: Sequence[Example]
    cap: int
    verify_s: float
    by_width: RoundCosts | None
    compared: Callable[[float], None]
    forms: int

    def timed(self, timings: Sequence[float]) -> _Measured:
        """An outfit whose drafts took so long; nothing is replayed yet."""
        # What a proposal costs once is known apart; the timings spread it over its tokens.
        once_s = 0.0 if self.by_width is None else self.by_width.draft_round_s / self.cap
        draft_s = max(0.0, statistics.median(timings) - once_s)
        cost = RoundCost(draft_s, self.verify_s, self.by_width)
        return _Measured((), cost, _median_error(timings), self.cap)

    def replayed(self, outfit: Outfit, timed: _Measured, rival: _Measured | None) -> _Measured:
        """With the examples; given up where it can no longer win over `rival`."""
        self.draft.set_adapter(outfit.lora, outfit.form)
        measured = timed
        for n, example in enumerate(self.examples, start=1):
            (alphas,) = self.draft.replay([example])
            # Where alpha is no number nothing would be accepted.
            rounds = timed.cost.rounds(np.nan_to_num(alphas).tolist(), self.cap)
            measured = replace(measured, walks=(*measured.walks, _Walked(len(alphas), rounds)))
            self.compared(1 / self.forms)
            most = None if rival is None else measured.gain_over(rival, 1)
            if most is not None and most < 0:
                self.compared((len(self.examples) - n) / self.forms)
                break
        return measured

    def passed_over(self) -> None:
        """A form is not replayed."""
        self.compared(len(self.examples) / self.forms)


def _figures(measured: _Measured, gain_low: float | None) -> FormFigures:
    return FormFigures(
        draft_s=measured.cost.draft_s,
        tau=measured.tau,
        tokens_per_s=measured.tokens_per_s(),
        gain_low=gain_low,
        examples=len(measured.walks),
    )


def _median_error(seconds: Sequence[float]) -> float:
    """Standard error of the median, as of normally distributed times: √(π/2) · σ / √n, σ from the MAD."""
    middle = statistics.median(seconds)
    spread_s = 1.4826 * statistics.median(abs(one - middle) for one in seconds)
    return math.sqrt(math.pi / 2 / len(seconds)) * spread_s


def _verify_seconds(timed_round: TimedRound | None, draft_s: float) -> float:
    """A round's cost without its drafts; never less than one drafted token's, since the target is larger."""
    if timed_round is None:
        return VERIFY_DRAFTS * draft_s
    return max(timed_round.seconds - timed_round.drafted_tokens * draft_s, draft_s)


def _as_now(calibrated: RoundCosts, bare_s: float, num_draft_tokens: int) -> RoundCosts:
    """The costs while the bare draft costs `bare_s` a token: the machine may be busier now than it was."""
    then_s = calibrated.draft_s + calibrated.draft_round_s / num_draft_tokens
    slower = bare_s / then_s if then_s > 0 else 1.0
    points = tuple((width, seconds * slower) for width, seconds in calibrated.verify_s)
    return replace(calibrated, verify_s=points, draft_round_s=calibrated.draft_round_s * slower)


def interleaved_draft_seconds(
    draft: Model,
    outfits: Sequence[Outfit],
    num_draft_tokens: int,
    sampling: Sampling,
    courtesy: Courtesy = UNHURRIED,
) -> list[list[float]]:
    """Seconds a drafted token in each outfit, several of each, in turn, so that a busy moment hits all."""
    passes: list[list[float]] = [[] for _ in outfits]
    rules = Rules(sampling)
    for _ in range(INTERLEAVED_PASSES):
        for seconds, outfit in zip(passes, outfits, strict=True):
            draft.set_adapter(outfit.lora, outfit.form)
            proposals_s = courtesy.undisturbed(
                lambda clock: time_proposals(
                    draft, num_draft_tokens, TIMED_PROPOSALS, rules=rules, clock=clock
                )
            )
            seconds.extend(one / num_draft_tokens for one in proposals_s)
    return passes
