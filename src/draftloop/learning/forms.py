"""Which form an adapter is deployed in: the plainest, unless a coarser one is faster here for certain.

Contract: times and replays the draft through the backend's seam; decides nothing about promotion. Must
not know requests or the store.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.base import ProposeJob
from draftloop.backends.lora import AdapterForm
from draftloop.learning.student import student_quantile
from draftloop.speculation.metrics import expected_rounds, tokens_per_round
from draftloop.types import Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from draftloop.backends.base import Model
    from draftloop.backends.lora import Lora
    from draftloop.backends.training import Example
    from draftloop.learning.replayed import TimedRound

TIMED_PROPOSALS = 5
INTERLEAVED_PASSES = 2
VERIFY_DRAFTS = 3
"""Where no round was ever timed, a verification counts as so many drafted tokens."""
CONTEXT_TOKENS = 64
"""The draft drafts behind a short text: what a form costs does not depend on it."""
MIN_COMPARED = 5
"""With fewer requests nothing is certain, and the plainest form stays."""
CERTAINTY = 0.95
"""One-sided: so sure must a coarser form's gain be."""


@dataclass(frozen=True, slots=True)
class Outfit:
    """What a draft wears; no LoRA is the bare draft."""

    lora: Lora | None = None
    form: AdapterForm = AdapterForm.UNFUSED


@dataclass(frozen=True, slots=True)
class FormFigures:
    """What one form was measured to do.

    Attributes:
        draft_s: seconds a drafted token.
        tau: of the examples, replayed in this form; None where it was not, because it drafts no faster than
            a plainer form.
        tokens_per_s: expected, tau over the round's cost; None likewise.
        gain_low: lower bound of the gain in tokens per second over the plainer form that it had to beat;
            None where it was not compared.
    """

    draft_s: float
    tau: float | None = None
    tokens_per_s: float | None = None
    gain_low: float | None = None


@dataclass(frozen=True, slots=True)
class FormChoice:
    """Every form's figures, and the rounds' costs beside them.

    Attributes:
        best: to be deployed.
        figures: of each form that the backend has.
        incumbent_draft_s: seconds a drafted token with the incumbent.
        bare_draft_s: the same without an adapter.
        verify_s: seconds of a round beside its drafts.
    """

    best: AdapterForm
    figures: Mapping[AdapterForm, FormFigures]
    incumbent_draft_s: float
    bare_draft_s: float
    verify_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """One form on the examples.

    Attributes:
        rounds: [n], expected of each example.
        tokens: of all examples.
        round_s: seconds a round.
        round_error_s: standard error of that, of the drafts alone: the verification is the same in each form.
    """

    rounds: NDArray[np.float64]
    tokens: int
    round_s: float
    round_error_s: float

    @property
    def tau(self) -> float:
        """Tokens a round; 1 where nothing was replayed."""
        return tokens_per_round(self.tokens, float(self.rounds.sum())) or 1.0

    def gain_low_over(self, plainer: _Measured) -> float | None:
        """Lower bound of the gain in tokens a second, paired over examples; None where there are too few.

        The seconds that an example saves scatter over the examples, and both forms' drafts were timed with
        an error that all examples share.
        """
        n = len(self.rounds)
        if n < MIN_COMPARED:
            return None
        saved_s = plainer.rounds * plainer.round_s - self.rounds * self.round_s
        shared_s = [float(one.rounds.sum()) * one.round_error_s for one in (self, plainer)]
        error_s = math.hypot(math.sqrt(n) * float(saved_s.std(ddof=1)), *shared_s)
        low_s = float(saved_s.sum()) - student_quantile(CERTAINTY, n - 1) * error_s
        return low_s / (float(self.rounds.sum()) * self.round_s)


def choose_form(
    draft: Model,
    lora: Lora,
    incumbent: Outfit,
    examples: Sequence[Example],
    *,
    num_draft_tokens: int,
    timed_round: TimedRound | None,
    compared: Callable[[float], None],
) -> FormChoice:
    """Measure every form that the backend has, in turn with the incumbent and the bare draft.

    From the plainest on, a coarser form is taken only where its gain in tokens a second over the one taken
    so far is certain: what rounding loses of a small update shows on few requests only as noise.

    Args:
        draft: wears the last outfit measured afterwards.
        lora: the candidate.
        incumbent: what is served now.
        examples: replayed in each form.
        num_draft_tokens: K.
        timed_round: what a round with the incumbent took; its verification is what the drafts leave of it.
            None where no round was ever timed.
        compared: is called with the share of an example that has been replayed.
    """
    outfits = [Outfit(), incumbent, *(Outfit(lora, form) for form in draft.adapter_forms)]
    timings = interleaved_draft_seconds(draft, outfits, num_draft_tokens)
    bare_s, incumbent_s, *seconds = map(statistics.median, timings)
    verify_s = _verify_seconds(timed_round, incumbent_s)
    figures: dict[AdapterForm, FormFigures] = {}
    best = AdapterForm.UNFUSED
    taken: _Measured | None = None
    share = 1 / len(seconds)
    for outfit, draft_s, timing in zip(outfits[2:], seconds, timings[2:], strict=True):
        if taken is not None and draft_s >= figures[best].draft_s:
            figures[outfit.form] = FormFigures(draft_s)
            compared(share * len(examples))
            continue
        draft.set_adapter(outfit.lora, outfit.form)
        rounds = []
        for example in examples:
            (alphas,) = draft.replay([example])
            # Where alpha is no number nothing would be accepted.
            rounds.append(expected_rounds(np.nan_to_num(alphas).tolist(), num_draft_tokens))
            compared(share)
        measured = _Measured(
            rounds=np.array(rounds),
            tokens=sum(example.num_rows for example in examples),
            round_s=num_draft_tokens * draft_s + verify_s,
            round_error_s=num_draft_tokens * _median_error(timing),
        )
        gain_low = None if taken is None else measured.gain_low_over(taken)
        tau = measured.tau
        figures[outfit.form] = FormFigures(draft_s, tau, tau / measured.round_s, gain_low)
        if taken is None or (gain_low is not None and gain_low > 0):
            best, taken = outfit.form, measured
    return FormChoice(best, figures, incumbent_s, bare_s, verify_s)


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


def interleaved_draft_seconds(
    draft: Model, outfits: Sequence[Outfit], num_draft_tokens: int
) -> list[list[float]]:
    """Seconds a drafted token in each outfit, several of each, in turn, so that a busy moment hits all."""
    passes: list[list[float]] = [[] for _ in outfits]
    for _ in range(INTERLEAVED_PASSES):
        for seconds, outfit in zip(passes, outfits, strict=True):
            draft.set_adapter(outfit.lora, outfit.form)
            proposals_s = _proposal_seconds(draft, num_draft_tokens)
            seconds.extend(one / num_draft_tokens for one in proposals_s)
    return passes


def _proposal_seconds(draft: Model, num_draft_tokens: int) -> list[float]:
    """Wall time of proposing K tokens behind a short text, several times."""
    cache = draft.new_cache()
    context = max(1, min(CONTEXT_TOKENS, cache.max_tokens - num_draft_tokens))
    rules, uniforms = Rules(Sampling()), np.zeros(num_draft_tokens, np.float32)
    seconds = []
    for turn in range(TIMED_PROPOSALS + 1):
        unread = [1] if turn else [1] * context
        started_s = time.perf_counter()
        proposal = draft.propose([ProposeJob(cache, unread, num_draft_tokens, rules, uniforms)])[0]
        # A device works ahead of the host; reading a token waits for it.
        int(proposal.tokens[-1])
        seconds.append(time.perf_counter() - started_s)
        cache.trim(num_draft_tokens)
    return seconds[1:]
