"""Learning in the background: a training run in a process of its own, and when to start one.

Contract: whoever answers is never made to wait, and never fails because of it. The process is the program's
own `train` command at the lowest priority, in a session of its own, so that Ctrl-C in a terminal is not meant
for it; it outlives its parent unless it is told to stop. Must not know how anything is shown.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.errors import DraftloopError
from draftloop.learning.circle import interrupted_run, is_training
from draftloop.learning.run import RUNS_FOLDER
from draftloop.learning.selection import select
from draftloop.models.cache import make_folder, storage_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from draftloop.config import Config
    from draftloop.storage.records import PairKey
    from draftloop.storage.store import Store

RESULT_NAME, LOG_NAME = "background.json", "background.log"
"""Where the newest background run writes its outcome, and everything else, below `runs/`."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 600.0, 86_400.0
"""After a run that failed; each further failure in a row doubles the pause."""


def start_training(arguments: Sequence[str], directory: Path, *, resume: bool = False) -> Training:
    """Start `draftloop <arguments> train --json` as a process of its own and come back at once.

    Args:
        arguments: global options, as they stand before a command.
        directory: `storage.directory`.
        resume: go on with the interrupted run.

    Raises:
        StorageError: the process cannot be started, or its output cannot be written.
    """
    folder = make_folder(directory / RUNS_FOLDER)
    words = [*arguments, "train", "--json", "--background", *(["--resume"] if resume else [])]
    result, log = folder / RESULT_NAME, folder / LOG_NAME
    with (
        storage_errors(f"starting a training run in {folder}"),
        result.open("wb") as out,
        log.open("wb") as err,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "draftloop", *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    return Training(process, result, log)


class Training:
    """A training run in another process (`start_training`)."""

    def __init__(self, process: subprocess.Popen[bytes], result: Path, log: Path) -> None:
        self._process = process
        self._result = result
        self._log = log

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def poll(self) -> dict[str, Any] | None:
        """What `train --json` printed (design §7); None while it runs.

        Where it printed nothing, `status` is `failed` and `reason` the error it ended with.
        """
        if self._process.poll() is None:
            return None
        try:
            outcome = json.loads(self._result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            outcome = None
        return outcome if isinstance(outcome, dict) else {"status": "failed", "reason": self._failure()}

    def stop(self) -> None:
        """Ask it to end after its current step, with a checkpoint. Does not wait."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within that time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _failure(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else f"the process ended with status {self._process.returncode}"


def why_not(config: Config, *, with_draft: bool) -> str | None:
    """Why a pair that answers does not learn by itself, by its settings; None where it does."""
    if not with_draft:
        return "the target answers alone (--no-speculation), and it is the draft that learns"
    if config.adaptation.auto_train is False:
        return "adaptation.auto_train is false"
    if not config.storage.collect:
        return "nothing is stored (storage.collect)"
    return "backend numpy does not train" if config.backend == "numpy" else None


@dataclass(frozen=True, slots=True)
class Started:
    """Training has begun."""

    failures: int
    resumed: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """Training is over; `outcome` as `Training.poll` gives it."""

    outcome: dict[str, Any]


class IdleLearner:
    """Starts training when enough failures wait and nobody has asked anything for a while.

    Where requests never pause for so long, it looks every `adaptation.longest_wait_s` all the same: the run
    itself yields to answers (`yielding`).

    After a run that failed it pauses, longer with each one in a row: a disk may be full for an hour, and what
    always fails costs little this way.

    `began`, `ended` and `leave` belong to whoever answers; `look` may be called by another thread.

    Args:
        store: tells the failures.
        directory: `storage.directory`.
        pair: whose draft learns.
        config: the settings.
        arguments: global options for the process.
        clock: seconds, growing.
        start: starts the process.
    """

    def __init__(
        self,
        store: Store,
        directory: Path,
        pair: PairKey,
        config: Config,
        arguments: Sequence[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[..., Training] = start_training,
    ) -> None:
        self._store = store
        self._directory = directory
        self._pair = pair
        self._config = config
        self._arguments = tuple(arguments)
        self._clock = clock
        self._start = start
        self._run_lock = threading.Lock()
        """Guards the run. Looking takes as long as the store and a new process take."""
        self._lock = threading.Lock()
        """Guards when somebody asked; nobody holds it while he works."""
        self._training: Training | None = None
        self._idle_since_s: float | None = clock()
        self._looked_s = clock()
        self._looked_since_idle = False
        self._failures_in_a_row = 0
        self._paused_until_s: float | None = None
        self._left = False

    @property
    def training(self) -> bool:
        """Whether a run of ours is under way, as far as it was looked at."""
        return self._training is not None

    @property
    def pause_s(self) -> float | None:
        """Seconds until it may start a run again, where the last one failed; None where there is no pause."""
        until_s = self._paused_until_s
        left_s = 0.0 if until_s is None else until_s - self._clock()
        return left_s if left_s > 0 else None

    def began(self) -> None:
        """A request has come."""
        with self._lock:
            self._idle_since_s = None
            self._looked_since_idle = False

    def ended(self) -> None:
        """It is answered."""
        with self._lock:
            self._idle_since_s = self._clock()

    def look(self) -> Started | Ended | None:
        """Start training where it is time, or see whether it is over; what has happened, if anything."""
        with self._run_lock:
            if self._training is not None:
                return self._see()
            if self._left or self.pause_s is not None or not self._is_due():
                return None
            try:
                return self._begin()
            except (DraftloopError, OSError) as error:
                return self._end({"status": "failed", "reason": str(error)})

    def leave(self) -> bool:
        """Tell a run of ours to stop with a checkpoint; whether there was one."""
        with self._run_lock:
            self._left = True
            running = self._training is not None and self._training.poll() is None
            if self._training is not None and running:
                self._training.stop()
            return running

    def _is_due(self) -> bool:
        """Whether it is time to look if enough failures wait; then this counts as the look."""
        with self._lock:
            if self._looked_since_idle:
                return False
            now_s, adaptation = self._clock(), self._config.adaptation
            idle = self._idle_since_s is not None and now_s - self._idle_since_s >= adaptation.idle_s
            if not idle and now_s - self._looked_s < adaptation.longest_wait_s:
                return False
            self._looked_s = now_s
            # Until the next request nothing changes that would make it worth another look.
            self._looked_since_idle = self._idle_since_s is not None
            return True

    def _begin(self) -> Started | None:
        if is_training(self._directory):
            return None
        resume = interrupted_run(self._store, self._pair) is not None
        selection = select(self._store, self._pair, self._config)
        if not (resume or selection.ready_again):
            return None
        self._training = self._start(self._arguments, self._directory, resume=resume)
        return Started(len(selection.failures), resume)

    def _see(self) -> Ended | None:
        outcome = None if self._training is None else self._training.poll()
        if outcome is None:
            return None
        self._training = None
        return self._end(outcome)

    def _end(self, outcome: dict[str, Any]) -> Ended:
        if outcome.get("status") != "failed":
            self._failures_in_a_row = 0
            return Ended(outcome)
        pause_s = min(FIRST_PAUSE_S * 2.0**self._failures_in_a_row, LONGEST_PAUSE_S)
        self._failures_in_a_row += 1
        self._paused_until_s = self._clock() + pause_s
        with self._lock:
            # What failed may go well now, without anybody's request.
            self._looked_since_idle = False
        return Ended(outcome)
