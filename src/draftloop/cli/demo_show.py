"""What the demo says of what was measured.

Contract: figures in, sentences and one table out; a loss is called a loss. Must not know models.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

from draftloop.cli.console import new_table, print_table, write
from draftloop.cli.figures import shown, total

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from draftloop.config import Config
    from draftloop.engine import Completion
    from draftloop.learning.circle import Outcome
    from draftloop.reporting.page import Comparison

ALONE, BEFORE, AFTER = "target alone", "draft before", "draft after"
WAYS = (ALONE, BEFORE, AFTER)
COLUMNS = ("tok/s", "alpha", "tau", "acceptance_rate", "text as the target's")
COUNTED = (
    "speculative.acceptance_threshold",
    "training.min_failure_cases",
    "training.max_sequence_length",
)
"""Settings by which stored requests are sorted into failures and the rest."""
NOISE = 0.02
"""Speeds that differ by less are called equal: two runs of one and the same draft differ by as much."""


def say_setup(config: Config, device: str, settings: Sequence[str]) -> None:
    """What runs where, and the settings that are not the usual ones.

    Args:
        config: the demo's.
        device: where the models are.
        settings: `KEY=VALUE`, as the demo would have them; their values are those of `config`.
    """
    from draftloop.config.schema import flatten

    values = flatten(config)
    keys = [setting.partition("=")[0] for setting in settings]
    shown_values = ", ".join(f"{key} = {_plain(values[key])}" for key in keys)
    rows = {
        "target": config.models.target.name,
        "draft": config.models.draft.name,
        "on": device,
        "in": config.storage.directory,
        "with": f"{shown_values} (--set changes them)",
    }
    for label, value in rows.items():
        lines = textwrap.wrap(value, 100, break_long_words=False, break_on_hyphens=False)
        write(f"{label:<7}" + f"\n{'':<7}".join(lines) + "\n")
    if config.speculative.schedule == "fixed":
        write("K is fixed here so that tau can be compared; in use it adapts to what is fastest, 0 too.\n")


def say_verdict(outcome: Outcome) -> None:
    """What the gate made of the training."""
    if outcome.adapter is None:
        write(f"\nNothing was trained: {outcome.reason}\n")
        return
    done = f"{outcome.steps} steps on {outcome.examples} requests in {outcome.seconds:.0f} s"
    word = "PROMOTES" if outcome.status == "promoted" else "REFUSES"
    write(f"{done}. The gate {word} the adapter {outcome.adapter}: {outcome.reason}\n")
    write(f"held-out requests: alpha {_change(outcome.alpha_before, outcome.alpha_after, 3)}")
    write(f" · tau {_change(outcome.tau_before, outcome.tau_after, 2)}")
    if outcome.gain is not None and outcome.gain_ci95 is not None:
        low, high = outcome.gain_ci95
        write(f" · tokens/s {outcome.gain:+.1%} (95 %: {low:+.1%} to {high:+.1%})")
    write("\n")


def rivals(outcome: Outcome) -> str:
    """The heading of the comparison."""
    if outcome.status == "promoted":
        return "the draft before and after"
    return "the draft as it stays, and what the refused adapter would have done"


def comparison_of(answers: Mapping[str, Sequence[Completion]]) -> Comparison:
    """The three ways, and what their figures mean."""
    from draftloop.reporting.page import Comparison

    texts, rows = [done.token_ids for done in answers[ALONE]], []
    for way in WAYS:
        tally, speed = total(answers[way])
        same = sum(done.token_ids == text for done, text in zip(answers[way], texts, strict=True))
        cells = (shown(tally.alpha, 3), shown(tally.tau, 2), shown(tally.acceptance_rate, 3))
        rows.append((way, (shown(speed, 1), *cells, f"{same} of {len(texts)}")))
    speeds = {way: total(answers[way])[1] for way in WAYS}
    conclusions = (
        f"The trained draft against the untrained one: {_compared(speeds[AFTER], speeds[BEFORE])}.",
        f"The pair with it against the target alone: {_compared(speeds[AFTER], speeds[ALONE])}.",
        "(Greedy; reading the prompts is not counted.)",
    )
    title = f"{len(texts)} requests that the draft has never seen, answered three ways"
    return Comparison(title, COLUMNS, rows, conclusions)


def say_comparison(comparison: Comparison) -> None:
    """The same on the screen."""
    table = new_table("", *(f"{name} >" for name in comparison.columns))
    for way, figures in comparison.rows:
        table.add_row(way, *figures)
    print_table(table)
    write("\n")
    for sentence in comparison.conclusions:
        write(f"{sentence}\n")


def names_for(arguments: Sequence[str], given: Config, used: Config) -> str:
    """The options that let other commands see what the demo left, as the demo counted it.

    Args:
        arguments: the global options of this command.
        given: the settings as they say.
        used: the demo's.
    """
    from draftloop.config.schema import flatten

    values = flatten(used)
    names = {"storage.directory": used.storage.directory, **{key: _plain(values[key]) for key in COUNTED}}
    if given.models != used.models:
        names["models.target.name"] = used.models.target.name
        names["models.draft.name"] = used.models.draft.name
    words = [*arguments, *(word for key, value in names.items() for word in ("--set", f"{key}={value}"))]
    return shlex.join(words)


def say_next(report: Path, names: str) -> None:
    """Where the results are, and what to do now."""
    write(f"\nThe report, for a browser: {report}\n")
    write("Everything is kept. To look at it:\n")
    # `make demo` runs the program of an environment that the shell has not entered.
    program = "draftloop" if shutil.which("draftloop") else shlex.quote(sys.argv[0])
    for command in ("adapters list", "stats"):
        write(f"  {program} {names} {command}\n")
    write("To do the same with your own requests: chat, or collect --prompts FILE; then train.\n")


def _change(before: float | None, after: float | None, digits: int) -> str:
    return f"{shown(before, digits)} → {shown(after, digits)}"


def _plain(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _compared(speed: float | None, other: float | None) -> str:
    if not (speed and other):
        return "too little was generated to tell"
    ratio = speed / other
    if ratio > 1 + NOISE:
        return f"{ratio:.2f} times as fast"
    if ratio >= 1 - NOISE:
        return f"as fast (ratio {ratio:.2f}: no gain, no loss)"
    return f"SLOWER ({ratio:.2f} times the speed)"
