"""A training run as it goes on, on stderr: a bar with loss, validation alpha and time left.

Contract: implements `learning.circle.Watcher`; without a terminal it writes one line for each validation.
Used as a context manager, so that the bar is gone when the verdict is printed. Must not know how training
works.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import TYPE_CHECKING, Self

from draftloop.cli.console import err_console, say
from draftloop.cli.figures import shown

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from draftloop.storage.records import RunPoint

LOSS_STEPS = 8
"""The loss that is shown is the mean of so many steps: that of one step jumps."""


class TrainingBars:
    """Shows one run: `with TrainingBars() as bars: learn(school, bars, …)`.

    Args:
        quiet: show nothing but notes (`--json` without a terminal has nobody who reads along).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = err_console()
        self._quiet = quiet
        self._display: RichProgress | None = None
        self._task: TaskID | None = None
        self._losses: deque[float] = deque(maxlen=LOSS_STEPS)
        self._alphas: list[float] = []
        self._total_steps = self._skipped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the bar away, also after a failure."""
        self._stop()

    def note(self, text: str) -> None:
        """See `Watcher`. Stands above the bar."""
        line = f"note: {text}"
        if self._display is None:
            say(line)
        else:
            self._display.console.print(line, soft_wrap=True)

    def planned(self, total_steps: int, steps_done: int) -> None:
        """See `TrainingWatcher`."""
        self._total_steps = total_steps
        begun = f", from step {steps_done + 1} on" if steps_done else ""
        self._line(f"training: {total_steps} steps{begun}")
        self._start("training", total_steps, steps_done)

    def point(self, point: RunPoint) -> None:
        """See `TrainingWatcher`."""
        if point.validation_alpha is None:
            self._skipped += point.gradient_norm is None
            if point.loss is not None:
                self._losses.append(point.loss)
        else:
            self._alphas.append(point.validation_alpha)
            self._line(f"step {point.step} of {self._total_steps}: {self._figures()}")
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=point.step, figures=self._figures())

    def judging(self, held_out: int, compared: int) -> None:
        """See `Watcher`."""
        self._line(f"choosing a form on {compared} requests, judging on {held_out} held-out ones")
        self._start("judging, requests replayed", held_out + compared, 0)

    def judged(self, share: float) -> None:
        """See `Watcher`."""
        if self._display is not None and self._task is not None:
            self._display.advance(self._task, share)

    def _figures(self) -> str:
        """`loss 0.412 · validation alpha 0.812 (0.785 at the start)`."""
        parts = []
        if self._losses:
            parts.append(f"loss {shown(statistics.fmean(self._losses), 3)}")
        if self._alphas:
            first = f" ({self._alphas[0]:.3f} at the start)" if len(self._alphas) > 1 else ""
            parts.append(f"validation alpha {self._alphas[-1]:.3f}{first}")
        if self._skipped:
            parts.append(f"{self._skipped} steps skipped")
        return " · ".join(parts)

    def _line(self, text: str) -> None:
        if not (self._quiet or self._console.is_terminal):
            say(text)

    def _start(self, label: str, total: int, done: int) -> None:
        self._stop()
        if self._quiet or not self._console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._display = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._task = self._display.add_task(label, total=total, completed=done, figures="")
        self._display.start()

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
        self._display, self._task = None, None
