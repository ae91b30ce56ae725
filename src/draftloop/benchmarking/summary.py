"""From answers to figures: medians of each mode, and of the paired ratios with their intervals.

Contract: pure; a figure that is not defined is None. Must not know how an answer was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from draftloop.learning.intervals import bootstrap_interval
from draftloop.speculation.metrics import mean_alpha, tokens_per_round

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from draftloop.benchmarking.contenders import Answer

SPECULATIVE = "speculative"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed over speed at the same prompt: median over prompts and its 95 % interval; None: not defined."""

    median: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class ModeFigures:
    """One mode over all prompts: median speed; tau and alpha over all rounds together."""

    tokens_per_s: float | None
    tau: float | None
    alpha: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of some prompts; ratios by "mode/mode"."""

    prompts: int
    modes: Mapping[str, ModeFigures]
    ratios: Mapping[str, Ratio]


def paired_ratio(over: Sequence[float | None], under: Sequence[float | None], *, seed: int = 0) -> Ratio:
    """Median of over / under, prompt by prompt, and its bootstrap interval over prompts.

    Args:
        over: speeds, one a prompt; None where there is none, and then the prompt does not count.
        under: speeds at the same prompts, likewise.
        seed: of the bootstrap.

    Returns:
        Without an interval where fewer than two prompts count.
    """
    pairs = zip(over, under, strict=True)
    ratios = np.array([a / b for a, b in pairs if a is not None and b is not None], np.float64)
    if not len(ratios):
        return Ratio(None, None, None)
    middle = float(np.median(ratios))
    if len(ratios) < 2:
        return Ratio(middle, None, None)

    def medians(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(np.median(ratios[drawn], axis=1))

    return Ratio(middle, *bootstrap_interval(len(ratios), medians, seed=seed))


def add_best(answers: Mapping[str, Answer], best: str, of: Sequence[str]) -> Mapping[str, Answer]:
    """The answers with one more, called `best`: the fastest at this prompt of the modes in `of`."""
    return {**answers, best: max((answers[name] for name in of), key=lambda one: one.tokens_per_s or 0.0)}


def summarize(prompts: Sequence[Mapping[str, Answer]], derived: Mapping[str, Sequence[str]]) -> Summary:
    """Figures of every mode and of every pair of modes.

    Args:
        prompts: at least one, all with the same modes, in the order in which they are told.
        derived: the modes of `add_best`, each with those that it chooses from; those pairs say nothing.
    """
    names = list(prompts[0])
    speeds = {name: [answers[name].tokens_per_s for answers in prompts] for name in names}
    pairs = [_over_under(*pair) for pair in combinations(names, 2)]
    pairs = [(a, b) for a, b in pairs if b not in derived.get(a, ()) and a not in derived.get(b, ())]
    return Summary(
        prompts=len(prompts),
        modes={name: _mode_figures([answers[name] for answers in prompts]) for name in names},
        ratios={f"{a}/{b}": paired_ratio(speeds[a], speeds[b]) for a, b in pairs},
    )


def _over_under(earlier: str, later: str) -> tuple[str, str]:
    """Which of two modes stands above the line: ours speculating, else the one that was named later."""
    return (earlier, later) if earlier == SPECULATIVE else (later, earlier)


def _mode_figures(answers: Sequence[Answer]) -> ModeFigures:
    known = [speed for answer in answers if (speed := answer.tokens_per_s) is not None]
    told = [(answer.tokens, answer.rounds) for answer in answers if answer.rounds is not None]
    return ModeFigures(
        tokens_per_s=median(known) if known else None,
        tau=tokens_per_round(sum(tokens for tokens, _ in told), sum(rounds for _, rounds in told)),
        alpha=mean_alpha(
            sum(answer.alpha_sum for answer in answers), sum(answer.tested_tokens for answer in answers)
        ),
    )
