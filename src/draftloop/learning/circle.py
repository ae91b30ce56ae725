"""The learning circle, once around: select, train, judge, then promote or reject (design §5).

Contract: at every moment the store tells what is active, and that is whole: an adapter's files are complete
before the store names it, and one transaction makes it active. A run that is killed is resumed from its
checkpoint. Must not know the command line; progress is told to a `Watcher`.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock, Timeout

from draftloop.errors import DraftloopError, InputError, StorageError
from draftloop.learning.checkpoints import remove_checkpoint
from draftloop.learning.recipe import WHOLE_HEAD, Recipe
from draftloop.learning.run import Outcome, Run, checkpoint_of, run_folder
from draftloop.learning.selection import Selection, replay_sample, select
from draftloop.learning.tensorboard import TensorBoardWatcher, require_tensorboard
from draftloop.learning.training import TrainingWatcher
from draftloop.learning.yielding import UNHURRIED
from draftloop.models.cache import make_folder
from draftloop.storage.records import RunStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.base import Backend
    from draftloop.backends.vocabulary import CutVocabulary
    from draftloop.config import Config
    from draftloop.learning.yielding import Courtesy
    from draftloop.speculation.costs import RoundCosts
    from draftloop.storage.records import PairKey, RunRecord
    from draftloop.storage.store import Store

__all__ = ["Outcome", "School", "Watcher", "interrupted_run", "is_training", "learn", "waiting_for"]

LOCK_NAME = "training.lock"


class Watcher(TrainingWatcher, Protocol):
    """Is told of a whole run's progress."""

    def note(self, text: str) -> None:
        """Something that the user should know, one sentence."""
        ...

    def judging(self, held_out: int, compared: int) -> None:
        """Training is over; so many held-out requests are replayed, and so many others compare the forms."""
        ...

    def judged(self, share: float) -> None:
        """So much of one request has been replayed."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class School:
    """Where a run takes place.

    Attributes:
        store: requests, adapters and runs.
        directory: `storage.directory`.
        pair: whose draft learns.
        config: the settings of today.
        backend: trains and replays.
        draft_folder: the draft's checked folder.
        architecture: the draft's.
        eos_token_ids: of the tokenizer.
        facts: digests, versions, device; stored with the run and the adapter.
        vocabulary: what the draft's head is cut to where it is served; None leaves it whole. Training always
            sees all of it.
        by_width: what the pair's rounds were calibrated to cost; None where K is constant or nobody measured.
        courtesy: when a run may compute.
    """

    store: Store
    directory: Path
    pair: PairKey
    config: Config
    backend: Backend
    draft_folder: Path
    architecture: Architecture
    eos_token_ids: Sequence[int]
    facts: Mapping[str, Any]
    vocabulary: CutVocabulary | None = None
    by_width: RoundCosts | None = None
    courtesy: Courtesy = UNHURRIED


def learn(
    school: School, watcher: Watcher, stop_wanted: Callable[[], bool], *, resume: bool = False
) -> Outcome:
    """Go once around the circle.

    Args:
        school: where.
        watcher: is told of progress.
        stop_wanted: asked before each step and while judging; a yes writes a checkpoint and ends the run as
            `interrupted`.
        resume: go on with the newest interrupted run instead of beginning one.

    Raises:
        InputError: there is nothing to resume, or another process is training here.
        OutOfMemory, TrainingDiverged, StorageError: the run failed; what was collected is as before.
    """
    if school.config.logging.tensorboard:
        require_tensorboard()
    with _only_one(school.directory):
        _close_killed_runs(school)
        if resume:
            return _go(school, _interrupted(school), watcher, stop_wanted)
        selection = select(school.store, school.pair, school.config)
        if selection.too_long:
            watcher.note(
                f"{selection.too_long} requests have prompts that fill training.max_sequence_length = "
                f"{school.config.training.max_sequence_length} and are left out"
            )
        if not selection.ready:
            return Outcome("skipped", waiting_for(selection))
        _give_up_interrupted(school, watcher)
        return _go(school, _new_run(school, selection), watcher, stop_wanted)


def _go(school: School, record: RunRecord, watcher: Watcher, stop_wanted: Callable[[], bool]) -> Outcome:
    if not school.config.logging.tensorboard:
        return _opened(school, record, watcher).go(stop_wanted)
    with closing(TensorBoardWatcher(watcher, run_folder(school.directory, record.id))) as beside:
        return _opened(school, record, beside).go(stop_wanted)


def interrupted_run(store: Store, pair: PairKey) -> RunRecord | None:
    """The run that `resume` would go on with, where no process trains; None where there is none."""
    run = store.runs.latest(pair)
    unfinished = (RunStatus.INTERRUPTED, RunStatus.RUNNING)
    return run if run is not None and run.status in unfinished else None


def waiting_for(selection: Selection) -> str:
    """What training waits for, one sentence."""
    return (
        f"{len(selection.failures)} of {selection.needed} failures (acceptance below "
        f"{selection.threshold:.2f}) are there; training.min_failure_cases sets the number."
    )


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Hold the training lock; a killed process lets go of it."""
    make_folder(directory)
    lock = FileLock(directory / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process is training in {directory}", remedy="Wait for its end, or stop it."
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_training(directory: Path) -> bool:
    """Whether some process trains in this storage directory now."""
    if not (directory / LOCK_NAME).exists():
        return False
    lock = FileLock(directory / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _close_killed_runs(school: School) -> None:
    """The lock is ours, so whatever still calls itself running was killed."""
    for run in school.store.runs.list(school.pair):
        if run.status is RunStatus.RUNNING:
            school.store.runs.finish(run.id, RunStatus.INTERRUPTED, {})


def _interrupted(school: School) -> RunRecord:
    record = interrupted_run(school.store, school.pair)
    if record is None:
        raise InputError("there is no interrupted training run to resume", remedy="Train without --resume.")
    return record


def _opened(school: School, record: RunRecord, watcher: Watcher) -> Run:
    try:
        return Run(school, record, watcher)
    except StorageError as error:
        # What cannot be read today cannot be tomorrow: nobody shall try again.
        school.store.runs.finish(record.id, RunStatus.FAILED, {"reason": str(error)})
        raise


def _give_up_interrupted(school: School, watcher: Watcher) -> None:
    """A new run begins: the checkpoints of older ones would lie there for ever."""
    for run in school.store.runs.list(school.pair):
        if run.status is RunStatus.INTERRUPTED:
            watcher.note(f"run {run.id}, which was interrupted, is given up for a new one")
            school.store.runs.finish(run.id, RunStatus.FAILED, {"reason": "given up for a new run"})
            remove_checkpoint(checkpoint_of(school.directory, run.id))


def _new_run(school: School, selection: Selection) -> RunRecord:
    config, active = school.config, school.store.adapters.active(school.pair)
    recipe = Recipe(
        settings=config.training,
        gradient_checkpointing=config.memory.gradient_checkpointing,
        num_draft_tokens=config.speculative.num_draft_tokens,
        threshold=selection.threshold,
        failures=selection.failures,
        replay=replay_sample(selection, config.training),
        validation=selection.validation,
        gate=selection.gate,
        gate_domains=tuple(selection.domains[one] for one in selection.gate),
        parent=None if active is None else active.name,
        timed_round=selection.timed_round,
        facts=school.facts,
        by_width=school.by_width,
        vocabulary=WHOLE_HEAD if school.vocabulary is None else school.vocabulary.to_plain(),
    )
    run_id = school.store.runs.start(school.pair, recipe.parent, recipe.to_json())
    run = school.store.runs.get(run_id)
    if run is None:
        raise DraftloopError(f"run {run_id} vanished from the store", remedy="Train again.")
    return run
