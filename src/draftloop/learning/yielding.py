"""Training yields to answers: who answers says so, and who trains in the background waits meanwhile.

Contract: any number of processes may answer, each by any number of threads. Who answers never waits for who
trains, and what a killed process said ends with it: the system lets go of its lock. Who trains waits of its
own accord, between two products of matrices and never inside a transaction: a process that is stopped from
outside may hold the store's write lock, and nobody would wake it if the one who stopped it were killed. Must
not know what is answered or trained.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    T = TypeVar("T")

logger = logging.getLogger(__name__)

LOCK_NAME = "answering.lock"
LOOK_S = 0.01
"""Seconds between two looks at whether somebody still answers."""
LEAST_SHARE = 0.1
"""Of its time a run works even where somebody always answers: else it would never end."""
MEASURING_TRIES = 5
"""So often a measurement is made again because somebody answered meanwhile; then it counts as it is."""


class Answering:
    """Tells other processes that this one answers: they share a lock while they do. Threads may share it.

    Args:
        directory: `storage.directory`. Where no lock can be made there, nobody is told.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_NAME
        self._lock = threading.Lock()
        self._answers = 0
        self._file: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Something is answered inside the block."""
        with self._lock:
            self._answers += 1
            if self._answers == 1:
                self._begin()
        try:
            yield
        finally:
            with self._lock:
                self._answers -= 1
                if not self._answers:
                    self._end()

    def _begin(self) -> None:
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            # Also who looks when it is over shall see that somebody has answered.
            now_ns = time.time_ns()
            os.utime(self._file, ns=(now_ns, now_ns))
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except OSError as error:
            logger.debug("a training in the background does not know of this answer: %s", error)

    def _end(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Courtesy(Protocol):
    """When a run may compute."""

    def wait(self) -> None:
        """Come back when it is a good moment to go on."""
        ...

    def undisturbed(self, measure: Callable[[Callable[[], float]], T]) -> T:
        """Measure times while nobody else computes; `measure` is given the clock to do it by."""
        ...


class Unhurried:
    """Who trains because he was told to waits for nobody."""

    def wait(self) -> None:
        """See `Courtesy`."""

    def undisturbed(self, measure: Callable[[Callable[[], float]], T]) -> T:
        """See `Courtesy`."""
        return measure(time.perf_counter)


UNHURRIED = Unhurried()


class Yielding:
    """Waits while some process answers, but never so long that less than LEAST_SHARE of the time were work.

    What it worked while nobody answered counts, so that a run with pauses enough disturbs nobody.

    Args:
        directory: `storage.directory`.
        stop_wanted: a yes ends every wait, so that the run can end.
        work_clock: counts seconds of work. Where answers take the processors too, those of the process: it
            has the lowest priority, and is not to be held back where they leave it little anyway.
        clock, sleep: of the waits.
    """

    def __init__(
        self,
        directory: Path,
        stop_wanted: Callable[[], bool],
        *,
        work_clock: Callable[[], float] = time.perf_counter,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path = directory / LOCK_NAME
        self._stop_wanted = stop_wanted
        self._clock = clock
        self._sleep = sleep
        self._work_clock = work_clock
        self._began_s = clock()
        self._resumed_s = work_clock()
        self._worked_s = 0.0

    def wait(self) -> None:
        """See `Courtesy`."""
        if not self._somebody_answers():
            return
        self._worked_s += self._work_clock() - self._resumed_s
        while self._may_wait() and not self._stop_wanted() and self._somebody_answers():
            self._sleep(LOOK_S)
        self._resumed_s = self._work_clock()

    def undisturbed(self, measure: Callable[[Callable[[], float]], T]) -> T:
        """See `Courtesy`. It is given up and made again where somebody begins to answer meanwhile."""
        for _ in range(MEASURING_TRIES):
            self.wait()
            began = self._last_told()

            def clock(began: int = began) -> float:
                if self._last_told() != began:
                    raise _Disturbed
                return time.perf_counter()

            with suppress(_Disturbed):
                return measure(clock)
        logger.debug("somebody always answers: measured all the same")
        return measure(time.perf_counter)

    def _may_wait(self) -> bool:
        return self._worked_s > LEAST_SHARE * (self._clock() - self._began_s)

    def _somebody_answers(self) -> bool:
        try:
            file = os.open(self._path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(file)
        return False

    def _last_told(self) -> int:
        """Changes when somebody begins to answer."""
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0


class _Disturbed(Exception):
    """Somebody has begun to answer."""
