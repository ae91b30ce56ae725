"""Downloads, conversions and many prompts, shown as bars on stderr; one plain line each without a terminal.

Contract: implements `models.progress.Progress`. Must not know what the work is.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from draftloop.cli.console import err_console, say

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from draftloop.models.progress import Task


TENTHS = 10


class Bars:
    """A bar for each task, with speed and time left. The display lives while a task does."""

    def __init__(self) -> None:
        self._console = err_console()
        self._display: RichProgress | None = None
        self._open_tasks = 0

    def task(self, label: str, total_bytes: int) -> Task:
        """Begin a task."""
        if not self._console.is_terminal:
            say(f"{label} ({format_bytes(total_bytes)})")
            return _Line()
        if self._display is None:
            self._display = self._new_display()
            self._display.start()
        self._open_tasks += 1
        return _Bar(self, self._display, self._display.add_task(label, total=max(total_bytes, 1)))

    def task_ended(self) -> None:
        """Take the display away with the last task, so that the next line of text stands below it."""
        self._open_tasks -= 1
        if self._open_tasks == 0 and self._display is not None:
            self._display.stop()
            self._display = None

    def _new_display(self) -> RichProgress:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
        )


class _Bar:
    def __init__(self, bars: Bars, display: RichProgress, identity: TaskID) -> None:
        self._bars, self._display, self._identity = bars, display, identity

    def advance(self, done_bytes: int) -> None:
        """Move the bar."""
        self._display.advance(self._identity, done_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the task; a failed one stays where it was."""
        self._bars.task_ended()


class _Line:
    def advance(self, done_bytes: int) -> None:
        """A line does not move."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """A line is not taken away."""


class Counter:
    """A bar over a number of prompts."""

    def __init__(self, display: RichProgress | None, identity: TaskID | None) -> None:
        self._display, self._identity = display, identity

    def advance(self, figures: str = "") -> None:
        """One more is done; `figures` stand behind the bar."""
        if self._display is not None and self._identity is not None:
            self._display.update(self._identity, advance=1, figures=figures)


class _Lines(Counter):
    """Without a terminal: a line for each tenth of the prompts."""

    def __init__(self, label: str, total: int) -> None:
        super().__init__(None, None)
        self._label, self._total, self._done = label, total, 0

    def advance(self, figures: str = "") -> None:
        before, self._done = self._done, self._done + 1
        if self._done * TENTHS // self._total > before * TENTHS // self._total:
            say(f"{self._label}: {self._done} of {self._total}{figures and f' · {figures}'}")


@contextmanager
def counting(label: str, total: int, *, shown: bool, lines: bool = False) -> Iterator[Counter]:
    """Show how many of `total` are done, where `shown`: as a bar where stderr is a terminal.

    Elsewhere as `lines`, where those are wanted.
    """
    console = err_console()
    if not (shown and console.is_terminal):
        yield _Lines(label, total) if shown and lines else Counter(None, None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as display:
        yield Counter(display, display.add_task(label, total=total, figures=""))


@contextmanager
def waiting(label: str, *, lines: bool = False) -> Iterator[None]:
    """Show that something of unknown length is under way, where stderr is a terminal.

    Elsewhere in a line, where `lines` are wanted.
    """
    console = err_console()
    if not console.is_terminal:
        if lines:
            say(label)
        yield
        return
    with console.status(label):
        yield


def format_bytes(count: int) -> str:
    """`491.4 MB`: powers of ten, as disks and downloads are sold."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):  # noqa: B007  # the last one tried is the answer
        if size < 1000:
            break
        size /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
