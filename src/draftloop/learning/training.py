"""The training loop: planned steps, validation, checkpoints, the best adapter.

Contract: `run_training` is deterministic given its job, and a resumed run ends where an uninterrupted one
would. The best adapter is the one with the highest validation alpha, never the lowest loss. Must not know
the store, settings files or how progress is shown.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from draftloop.errors import DraftloopError
from draftloop.learning.batches import planned_steps
from draftloop.learning.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from draftloop.learning.learning_rate import learning_rate_at
from draftloop.storage.records import RunPoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from draftloop.backends.lora import Lora
    from draftloop.backends.training import Example, Trainer
    from draftloop.config.schema import TrainingSettings

CHECKPOINT_S = 60.0
"""Seconds of training between two checkpoints: what a kill may cost."""


class TrainingDiverged(DraftloopError):
    """No step had a gradient that could be followed."""


class TrainingWatcher(Protocol):
    """Is told of progress."""

    def planned(self, total_steps: int, steps_done: int) -> None:
        """Before the first step of this process."""
        ...

    def point(self, point: RunPoint) -> None:
        """After each step and each validation."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TrainingJob:
    """What one run trains on.

    Attributes:
        examples: by request id. One that is missing here is left out of its step, so that the plan of a
            resumed run stays as it was, whatever made room for others meanwhile.
        failures, replay, validation: request ids.
        settings: the recipe.
        start: where the weights begin.
        checkpoint: this run's checkpoint file.
    """

    examples: Mapping[int, Example]
    failures: Sequence[int]
    replay: Sequence[int]
    validation: Sequence[int]
    settings: TrainingSettings
    start: Lora
    checkpoint: Path


@dataclass(frozen=True, slots=True, eq=False)
class TrainingResult:
    """What came out.

    Attributes:
        lora: the best adapter; None where training was stopped before its end (a checkpoint was written).
        steps: planned steps that were done.
        skipped_steps: of those, without a finite gradient.
        alpha_before, alpha_after: validation alpha at the start and of the best; None without validation.
        tokens: read in this process.
        trained_s: seconds of all processes of this run.
        process_s: seconds of this one.
    """

    lora: Lora | None
    steps: int
    skipped_steps: int
    alpha_before: float | None
    alpha_after: float | None
    tokens: int
    trained_s: float
    process_s: float

    @property
    def best_is_start(self) -> bool:
        """Whether no step led to a higher validation alpha than the run began with."""
        return self.alpha_before is not None and self.alpha_after == self.alpha_before


def run_training(
    trainer: Trainer, job: TrainingJob, watcher: TrainingWatcher, stop_wanted: Callable[[], bool]
) -> TrainingResult:
    """Train, or go on from the checkpoint where there is one.

    Raises:
        TrainingDiverged: no step could be applied.
        OutOfMemory: in spite of the plan; names the settings to lower.
    """
    return _Loop(trainer, job, watcher).run(stop_wanted)


class _Loop:
    """One process's part of a run."""

    def __init__(self, trainer: Trainer, job: TrainingJob, watcher: TrainingWatcher) -> None:
        training = job.settings
        self._trainer = trainer
        self._job = job
        self._watcher = watcher
        self._steps = planned_steps(job.failures, job.replay, training)
        per_epoch = max(1, round(len(self._steps) / training.num_epochs))
        self._validate_at = {per_epoch * epoch for epoch in range(1, training.num_epochs)} | {
            len(self._steps)
        }
        self._per_epoch = per_epoch
        self._done = self._skipped = self._tokens = 0
        self._best = job.start
        self._best_alpha: float | None = None
        self._alpha_before: float | None = None
        self._trained_before_s = 0.0
        self._started_s = self._saved_s = time.perf_counter()

    def run(self, stop_wanted: Callable[[], bool]) -> TrainingResult:
        resumed = load_checkpoint(self._job.checkpoint)
        if resumed is not None:
            self._resume(resumed)
        self._watcher.planned(len(self._steps), self._done)
        if resumed is None:
            self._alpha_before = self._validate()
        while self._done < len(self._steps):
            if stop_wanted():
                self._save()
                return self._result(None)
            self._step()
            if self._done in self._validate_at:
                self._validate()
                self._save()
            elif time.perf_counter() - self._saved_s > CHECKPOINT_S:
                self._save()
        return self._result(self._best)

    def _step(self) -> None:
        training = self._job.settings
        rate = learning_rate_at(
            self._done + 1,
            peak=training.learning_rate,
            warmup_steps=training.warmup_steps,
            total_steps=len(self._steps),
        )
        known = self._job.examples
        batches = [[known[one] for one in batch if one in known] for batch in self._steps[self._done]]
        self._done += 1
        if not any(batches):
            return
        result = self._trainer.step(batches, rate)
        self._tokens += result.tokens
        self._skipped += not result.applied
        if self._done == 1 and result.applied and result.gradient_norm == 0.0:
            raise TrainingDiverged(
                "the first step has a gradient of exactly zero",
                remedy="The adapter cannot learn from this data; collect other requests.",
            )
        if self._skipped == len(self._steps):
            raise TrainingDiverged(
                f"none of the {self._skipped} steps had a finite gradient",
                remedy="Lower training.learning_rate, or begin anew: draftloop adapters revert.",
            )
        finite = np.isfinite(result.gradient_norm) and np.isfinite(result.loss)
        self._watcher.point(
            RunPoint(
                step=self._done,
                epoch=self._done / self._per_epoch,
                loss=result.loss if np.isfinite(result.loss) else None,
                learning_rate=rate,
                gradient_norm=result.gradient_norm if finite else None,
                validation_alpha=None,
            )
        )

    def _validate(self) -> float | None:
        """Alpha on the validation requests, every row alike; remembers the best weights."""
        examples = [self._job.examples[one] for one in self._job.validation if one in self._job.examples]
        if not examples:
            self._best = self._trainer.state().lora
            return None
        # Where alpha is no number nothing would be accepted.
        alpha = float(np.nan_to_num(np.concatenate(self._trainer.replay(examples))).mean())
        if self._best_alpha is None or alpha > self._best_alpha:
            self._best, self._best_alpha = self._trainer.state().lora, alpha
        self._watcher.point(RunPoint(self._done, self._done / self._per_epoch, None, None, None, alpha))
        return alpha

    def _resume(self, checkpoint: Checkpoint) -> None:
        self._trainer.restore(checkpoint.state)
        self._done = checkpoint.steps_done
        self._skipped = checkpoint.skipped_steps
        self._best, self._best_alpha = checkpoint.best, checkpoint.best_alpha
        self._alpha_before = checkpoint.first_alpha
        self._trained_before_s = checkpoint.trained_s

    def _save(self) -> None:
        save_checkpoint(
            self._job.checkpoint,
            Checkpoint(
                steps_done=self._done,
                skipped_steps=self._skipped,
                trained_s=self._trained_s(),
                state=self._trainer.state(),
                best=self._best,
                best_alpha=self._best_alpha,
                first_alpha=self._alpha_before,
            ),
        )
        self._saved_s = time.perf_counter()

    def _trained_s(self) -> float:
        return self._trained_before_s + time.perf_counter() - self._started_s

    def _result(self, lora: Lora | None) -> TrainingResult:
        return TrainingResult(
            lora=lora,
            steps=self._done,
            skipped_steps=self._skipped,
            alpha_before=self._alpha_before,
            alpha_after=self._best_alpha,
            tokens=self._tokens,
            trained_s=self._trained_s(),
            process_s=time.perf_counter() - self._started_s,
        )
