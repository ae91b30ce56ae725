"""How long work tells its state: a task has a label and a size in bytes, and is advanced.

Contract: whoever shows it (a bar, a log, a test's list) implements `Progress`. Must not know a terminal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType


class Task(Protocol):
    """One piece of work under way, used as a context manager."""

    def advance(self, done_bytes: int) -> None:
        """`done_bytes` more are done."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Progress(Protocol):
    """Shows tasks."""

    def task(self, label: str, total_bytes: int) -> Task:
        """Begin a task of `total_bytes`, named by `label` ("Downloading …")."""
        ...


class _SilentTask:
    def advance(self, done_bytes: int) -> None:
        """Say nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Say nothing."""


class SilentProgress:
    """Shows nothing."""

    def task(self, label: str, total_bytes: int) -> Task:  # noqa: ARG002
        """Begin a task that nobody sees."""
        return _SilentTask()
