"""Where output goes: answers to stdout, everything else to stderr, colours on terminals only.

Contract: text for stdout reaches it byte for byte. Must not know models or settings.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any

from draftloop.errors import DraftloopError, MemoryPlanError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.table import Table

logger = logging.getLogger(__name__)

PIPE_WIDTH = 500
"""Columns of a table that no terminal shows: wide enough that nothing is cut."""


def out_console() -> Console:
    """A console on stdout for tables."""
    return _console(to_stderr=False)


def err_console() -> Console:
    """A console on stderr for progress and notes."""
    return _console(to_stderr=True)


def write(text: str) -> None:
    """Write `text` to stdout as it is, now."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(values: Mapping[str, Any]) -> None:
    """Write one JSON object, the only thing on stdout. NaN is no JSON and raises ValueError."""
    write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")


def say(text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_error(text: str) -> None:
    """Write one line that begins with `error:` to stderr, whatever the text holds."""
    say(f"error: {' '.join(text.splitlines())}")


def say_failure(error: Exception) -> int:
    """Say in one line what failed, with a memory plan below it; at `DEBUG` also where it failed.

    Returns:
        The exit status that tells of it.
    """
    if isinstance(error, DraftloopError):
        say_error(str(error))
        exit_status = error.exit_status
    else:
        say_error(
            f"unexpected {type(error).__name__}: {error}. "
            "Run with --set logging.level=DEBUG for the traceback."
        )
        exit_status = 1
    if isinstance(error, MemoryPlanError) and error.details:
        say(error.details)
    if exit_status == 1:
        logger.debug("where it was raised", exc_info=error)
    return exit_status


def new_table(*columns: str) -> Table:
    """A plain table: no frame, a line under its head. A column whose name ends in ` >` is right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        right = column.endswith(" >")
        table.add_column(column.removesuffix(" >"), justify="right" if right else "left", overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Write a table to stdout; where no terminal shows it, without the blanks that fill up its lines."""
    console = out_console()
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def configure_logging(level: str) -> None:
    """Show the program's own log from `level` on, on stderr; `DEBUG` includes tracebacks."""
    handler = _Sayer()
    handler.setFormatter(_LineFormatter())
    logger = logging.getLogger("draftloop")
    logger.handlers[:] = [handler]
    logger.setLevel(level)


class _Sayer(logging.Handler):
    """Says each record, so that a line stands above whatever display is on stderr at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write it."""
        try:
            say(self.format(record))
        except Exception:
            self.handleError(record)


class _LineFormatter(logging.Formatter):
    """`note: …` for what a user should know, with the module's name where a developer reads along."""

    def format(self, record: logging.LogRecord) -> str:
        word = "note" if record.levelno == logging.INFO else record.levelname.lower()
        where = f" {record.name}:" if record.levelno < logging.INFO else ""
        line = f"{word}:{where} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _console(*, to_stderr: bool) -> Console:
    from rich.console import Console

    class OurConsole(Console):
        def on_broken_pipe(self) -> None:
            """Let `main` decide what a reader that went away means, in one place."""
            raise BrokenPipeError

    console = OurConsole(stderr=to_stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console
