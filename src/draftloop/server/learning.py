"""Learning while serving: a thread that begins training when it is time, and what is told of it.

Contract: whoever answers is never made to wait. Training is a process of its own that yields to answers
(`learning.yielding`); a promoted adapter is worn from the next request on, because the engine looks before
each one, and the recorder takes one back that made things worse. Must not know HTTP, nor who is answered.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftloop.errors import MemoryPlanError, StorageError
from draftloop.learning.background import Ended, IdleLearner, Started, why_not
from draftloop.learning.recipe import Recipe
from draftloop.loading import pair_of
from draftloop.reporting.wording import duration
from draftloop.server.logs import where_raised
from draftloop.storage.records import AdapterStatus, RunStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from draftloop.config import Config
    from draftloop.models.memory import MemoryPlan
    from draftloop.storage.records import PairKey, RunRecord
    from draftloop.storage.store import Store

LOOK_S = 0.5
"""Seconds between two looks at whether it is time to learn."""

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    """What learning does now."""

    OFF = "off"
    WAITING = "waiting"
    PREPARING = "preparing"
    TRAINING = "training"
    JUDGING = "judging"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        run: its id; the curve's points are in the store.
        step: steps that are done.
        steps: planned.
        epoch: passes over the data.
        validation_alpha: the newest; None before the first.
        eta_s: seconds until the last step at the pace so far; None before two looks saw a step, and where
            all are done.
    """

    run: int
    step: int
    steps: int
    epoch: float
    validation_alpha: float | None
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class LearningState:
    """What is told of learning.

    Attributes:
        phase: what it does now.
        why_off: one sentence where it is off, which says when it goes on where it does so by itself.
        progress: of the run that is under way.
        last_outcome: how the last run of this service ended: what `train --json` prints.
        promotions, reverts: changes of the active adapter since the service began, whoever made them.
    """

    phase: Phase
    why_off: str | None = None
    progress: Progress | None = None
    last_outcome: Mapping[str, Any] | None = None
    promotions: int = 0
    reverts: int = 0

    @property
    def enabled(self) -> bool:
        """Whether this service trains by itself."""
        return self.phase is not Phase.OFF

    @property
    def training(self) -> bool:
        """Whether a run is under way."""
        return self.phase in (Phase.PREPARING, Phase.TRAINING, Phase.JUDGING)


def open_learner(
    config: Config, store: Store, plan: MemoryPlan, arguments: Sequence[str], *, with_draft: bool = True
) -> Learner:
    """Learning for one service, where the settings, the backend and the memory allow it.

    Args:
        config: the settings.
        store: requests, adapters and runs.
        plan: of the pair, made before it was loaded.
        arguments: global options for the process that trains.
        with_draft: whether a draft answers.
    """
    why_off = why_not(config, with_draft=with_draft)
    if why_off is None:
        try:
            plan.check_combined()
        except MemoryPlanError as error:
            why_off = str(error)
    pair, directory = pair_of(config), Path(config.storage.directory)
    idle = None if why_off else IdleLearner(store, directory, pair, config, arguments)
    return Learner(store, pair, idle, why_off=why_off)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A run when it was first looked at."""

    run: int
    steps: int
    step: int
    seconds: float

    def eta_s(self, step: int, now_s: float) -> float | None:
        """Seconds until the last step, by the pace since then."""
        if step == self.step or step >= self.steps:
            return None
        return (self.steps - step) * (now_s - self.seconds) / (step - self.step)


class Learner:
    """Learning beside one worker.

    Args:
        store: requests, adapters and runs of the pair.
        pair: whose draft learns.
        idle: decides when; None where nothing is learnt.
        why_off: one sentence, where `idle` is None.
        clock: seconds, growing.
    """

    def __init__(
        self,
        store: Store,
        pair: PairKey,
        idle: IdleLearner | None,
        *,
        why_off: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._pair = pair
        self._idle = idle
        self.why_off = why_off
        self._clock = clock
        self._generation = store.adapters.generation(pair)
        self._last_outcome: Mapping[str, Any] | None = None
        self._seen: _Seen | None = None
        self._promoted: Callable[[], object] = lambda: None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, promoted: Callable[[], object] = lambda: None) -> None:
        """Look now and then from now on, in a thread.

        Args:
            promoted: called there when a run has promoted an adapter: whoever answers may wear it before the
                next request does.
        """
        if self._idle is not None:
            self._promoted = promoted
            self._thread = threading.Thread(target=self._look_again, name="learning", daemon=True)
            self._thread.start()

    def stop(self) -> bool:
        """Begin no more; whether a run was under way.

        It stops after its current step, with a checkpoint; the next service resumes it. Nobody waits for it.
        """
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        running = self._idle is not None and self._idle.leave()
        if running:
            logger.info("the training stops after its current step, with a checkpoint")
        return running

    def began(self) -> None:
        """Somebody is being answered."""
        if self._idle is not None:
            self._idle.began()

    def ended(self) -> None:
        """Nobody is, and nobody waits."""
        if self._idle is not None:
            self._idle.ended()

    def look(self) -> Started | Ended | None:
        """Begin training where it is time, or see whether it is over; what has happened, if anything."""
        event = None if self._idle is None else self._idle.look()
        if isinstance(event, Started):
            logger.info(
                "going on with the interrupted training in the background"
                if event.resumed
                else f"learning from {event.failures} failures in the background"
            )
        elif isinstance(event, Ended):
            self._last_outcome = event.outcome
            self._seen = None
            status = event.outcome.get("status")
            logger.info("training %s: %s", status, event.outcome.get("reason"))
            if status == AdapterStatus.PROMOTED:
                self._promoted()
        return event

    def state(self) -> LearningState:
        """As it is now.

        Raises:
            StorageError: the store cannot be read.
        """
        promotions, reverts = self._changes()
        phase, progress, why_off = Phase.OFF, None, self.why_off
        if self._idle is not None and self._idle.training:
            phase, progress = self._under_way()
        elif self._idle is not None and (pause_s := self._idle.pause_s) is not None:
            why_off = f"the last run failed; it tries again in {duration(math.ceil(pause_s))}"
        elif self._idle is not None:
            phase = Phase.WAITING
        return LearningState(phase, why_off, progress, self._last_outcome, promotions, reverts)

    def _under_way(self) -> tuple[Phase, Progress | None]:
        run = self._store.runs.latest(self._pair)
        if run is None or run.status is not RunStatus.RUNNING:
            return Phase.PREPARING, None
        progress = self._progress(run)
        if progress.step >= progress.steps:
            return Phase.JUDGING, progress
        return Phase.TRAINING, progress

    def _progress(self, run: RunRecord) -> Progress:
        points = self._store.runs.points(run.id)
        step = points[-1].step if points else 0
        seen = self._seen
        if seen is None or seen.run != run.id:
            seen = _Seen(run.id, Recipe.from_json(run.recipe).num_steps, step, self._clock())
            self._seen = seen
        alphas = [one.validation_alpha for one in points if one.validation_alpha is not None]
        return Progress(
            run=run.id,
            step=step,
            steps=seen.steps,
            epoch=points[-1].epoch if points else 0.0,
            validation_alpha=alphas[-1] if alphas else None,
            eta_s=seen.eta_s(step, self._clock()),
        )

    def _changes(self) -> tuple[int, int]:
        """Promotions and reverts since the service began: a revert goes back to an ancestor, or to none."""
        parents = {one.name: one.parent for one in self._store.adapters.list(self._pair)}
        promotions = reverts = 0
        before: str | None = None
        for change in self._store.adapters.history(self._pair):
            ancestors: set[str | None] = {None}
            while before is not None:
                before = parents.get(before)
                ancestors.add(before)
            if change.generation > self._generation:
                promotions += change.adapter not in ancestors
                reverts += change.adapter in ancestors
            before = change.adapter
        return promotions, reverts

    def _look_again(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                self.look()
            except StorageError as error:
                logger.warning("learning could not look into the store: %s", error)
            except Exception as error:
                # The next look may go well; nobody would notice that the thread has ended.
                logger.error("a look at whether it is time to learn failed: %s", where_raised(error))
