"""`draftloop train`: the draft learns from what was collected, and the gate decides.

Contract: exit status 0 whatever the gate says, 130 where the run was stopped; stdout holds the verdict, or
with `--json` exactly one object. Must not know how training works.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftloop.cli import options
from draftloop.cli.console import new_table, print_table, say, write, write_json
from draftloop.cli.figures import rounded, shown
from draftloop.cli.interrupts import interrupt_as_flag
from draftloop.cli.progress import Bars, waiting
from draftloop.errors import BackendUnavailable

if TYPE_CHECKING:
    from draftloop.config import Config
    from draftloop.learning.circle import Outcome

INTERRUPTED = 130
LOWEST_PRIORITY = 19
AUTOGROUP = Path("/proc/self/autogroup")

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Train on any number of failures. [training.min_failure_cases=1]"),
]
Background = Annotated[bool, typer.Option("--background", hidden=True)]


def train(
    context: typer.Context,
    *,
    resume: Resume = False,
    force: Force = False,
    as_json: options.AsJson = False,
    background: Background = False,
) -> None:
    """Teach the draft what it got wrong; the gate decides whether it is used."""
    options.refuse_together({"--resume": resume, "--force": force}, "A resumed run has its failures.")
    forced = ["training.min_failure_cases=1"] if force else []
    config = options.load_settings(context, forced=forced).config
    if background:
        _yield_to_others()
    if config.backend == "numpy":
        raise BackendUnavailable(
            "backend = numpy does not train", remedy="Set backend: torch, or mlx on Apple silicon."
        )
    quiet = as_json and not sys.stderr.isatty()
    outcome = _learn(config, resume=resume, quiet=quiet, background=background)
    if as_json:
        write_json(outcome_figures(outcome))
    else:
        _show(outcome)
    if outcome.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _learn(config: Config, *, resume: bool, quiet: bool, background: bool) -> Outcome:
    from draftloop.cli.training_progress import TrainingBars

    with waiting("preparing the draft"):
        from draftloop.learning.circle import learn
        from draftloop.learning.yielding import UNHURRIED, Yielding
        from draftloop.loading import open_school, open_storage, prepare_draft
    with open_storage(config) as store:
        prepared = prepare_draft(config, Bars())
        with TrainingBars(quiet=quiet) as bars, interrupt_as_flag(_say_heard) as stop:
            directory = Path(config.storage.directory)
            on_cpu = prepared.backend.capabilities().device.startswith("cpu")
            work_clock = time.process_time if on_cpu else time.perf_counter
            courtesy = Yielding(directory, stop.is_set, work_clock=work_clock) if background else UNHURRIED
            try:
                school = open_school(config, prepared, store, courtesy)
                return learn(school, bars, stop.is_set, resume=resume)
            except KeyboardInterrupt:
                say("draftloop train --resume goes on from the last checkpoint.")
                raise


def outcome_figures(outcome: Outcome) -> dict[str, Any]:
    """The JSON object of one run (design §7)."""
    return {
        "status": outcome.status,
        "reason": outcome.reason,
        "adapter": outcome.adapter,
        "parent": outcome.parent,
        "examples": outcome.examples,
        "steps": outcome.steps,
        "seconds": rounded(outcome.seconds, 2),
        "alpha_before": rounded(outcome.alpha_before, 4),
        "alpha_after": rounded(outcome.alpha_after, 4),
        "tau_before": rounded(outcome.tau_before, 4),
        "tau_after": rounded(outcome.tau_after, 4),
        "gain": rounded(outcome.gain, 4),
        "gain_ci95": outcome.gain_ci95 and [rounded(bound, 4) for bound in outcome.gain_ci95],
        "domains": {
            name: {
                key: rounded(value, 4) if isinstance(value, float) else value
                for key, value in figures.items()
            }
            for name, figures in (outcome.domains or {}).items()
        },
        "run": outcome.run,
        "form": outcome.form,
        "skipped_steps": outcome.skipped_steps,
    }


def _show(outcome: Outcome) -> None:
    """The verdict for people."""
    came_from = f", which goes on from {outcome.parent}" if outcome.parent else ""
    name = f" {outcome.adapter}{came_from}" if outcome.adapter else ""
    write(f"{outcome.status}{name}: {outcome.reason}\n")
    if outcome.run is None:
        return
    if outcome.domains:
        table = new_table("domain", "requests >", "tokens >", "alpha >", "tau >")
        for domain, figures in outcome.domains.items():
            table.add_row(
                domain,
                str(figures["requests"]),
                str(figures["rows"]),
                *(
                    f"{shown(figures[f'{name}_before'], 3)} → {shown(figures[f'{name}_after'], 3)}"
                    for name in ("alpha", "tau")
                ),
            )
        print_table(table)
    skipped = f", {outcome.skipped_steps} of them skipped" if outcome.skipped_steps else ""
    parts = [
        f"run {outcome.run}",
        f"{outcome.examples} requests",
        f"{outcome.steps} steps{skipped}",
        f"{outcome.seconds:.0f} s",
        *([f"deployed {outcome.form}"] if outcome.status == "promoted" else []),
    ]
    write(" · ".join(parts) + "\n")


def _say_heard() -> None:
    say("stopping after this step; Ctrl-C again does not wait")


def _yield_to_others() -> None:
    """Use only what nobody else wants of the processors; where the system refuses, go on as it is."""
    with contextlib.suppress(OSError):
        os.nice(LOWEST_PRIORITY)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        # Desktops share the processors among sessions first, and this one is a session (sched(7), autogroup).
        with contextlib.suppress(OSError):
            AUTOGROUP.write_text(str(LOWEST_PRIORITY), encoding="ascii")
