"""One training run in one process: train, judge, conclude.

Contract: an adapter's files are complete before the store names it, and one transaction says what became of
the run, of the adapter and of the requests it learnt from. A run that ends in any other way is resumed from
its checkpoint, or says why it failed. Must not know how a run is chosen or shown.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from draftloop.backends.lora import LoraSpec
from draftloop.backends.training import Objective, TrainerSettings
from draftloop.errors import DraftloopError, StorageError
from draftloop.learning.checkpoints import load_checkpoint, remove_checkpoint
from draftloop.learning.continuation import dropped_modules, starting_point
from draftloop.learning.deployment import adapter_folder, load_deployed, new_adapter_name
from draftloop.learning.forms import Outfit
from draftloop.learning.judging import FORM_EXAMPLES, HeldOut, judge_candidate
from draftloop.learning.recipe import Recipe
from draftloop.learning.selection import load_examples
from draftloop.learning.training import TrainingJob, run_training
from draftloop.models.adapter_files import write_adapter
from draftloop.storage.records import AdapterRecord, AdapterStatus, RunStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from draftloop.backends.lora import Lora
    from draftloop.backends.training import Example
    from draftloop.learning.circle import School, Watcher
    from draftloop.learning.deployment import Deployed
    from draftloop.learning.judging import Judgement
    from draftloop.learning.training import TrainingResult
    from draftloop.storage.records import RunPoint, RunRecord

RUNS_FOLDER = "runs"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, as design §7 has it.

    Attributes:
        status: `promoted`, `rejected`, `skipped` (too little data) or `interrupted`.
        reason: a sentence or two.
        run: its id; None where it was skipped.
        adapter: the one it made.
        parent: the one it went on from.
        examples: requests trained on.
        steps, skipped_steps: planned steps that were done; those without a finite gradient.
        seconds: of training and judging.
        alpha_before, alpha_after, tau_before, tau_after: on the gate's held-out requests.
        gain, gain_ci95: of tokens per second.
        form: that the adapter is deployed in.
        domains: the gate's figures by domain.
    """

    status: str
    reason: str
    run: int | None = None
    adapter: str | None = None
    parent: str | None = None
    examples: int = 0
    steps: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    alpha_before: float | None = None
    alpha_after: float | None = None
    tau_before: float | None = None
    tau_after: float | None = None
    gain: float | None = None
    gain_ci95: tuple[float, float] | None = None
    form: str | None = None
    domains: Mapping[str, Any] | None = None


class _StoppedJudging(Exception):
    """The wish to stop was heard between two held-out requests."""


def run_folder(directory: Path, run: int) -> Path:
    """Where a run keeps its checkpoint and its TensorBoard files, below `storage.directory`."""
    return directory / RUNS_FOLDER / f"{run:04d}"


def checkpoint_of(directory: Path, run: int) -> Path:
    """A run's checkpoint file."""
    return run_folder(directory, run) / "checkpoint.safetensors"


class Run:
    """One run in one process.

    Args:
        school: where.
        record: the run as it is stored.
        watcher: is told of progress.

    Raises:
        StorageError: its recipe or its checkpoint is damaged.
    """

    def __init__(self, school: School, record: RunRecord, watcher: Watcher) -> None:
        self._school = school
        self._id = record.id
        self._watcher = watcher
        self._recipe = Recipe.from_json(record.recipe)
        self._checkpoint = checkpoint_of(school.directory, record.id)
        resumed = load_checkpoint(self._checkpoint)
        # Also a run that was killed before its first checkpoint has points: they come again.
        self._known_step = -1 if resumed is None else resumed.steps_done
        self._started_s = time.perf_counter()

    def go(self, stop_wanted: Callable[[], bool]) -> Outcome:
        """Train, judge, conclude.

        Raises:
            OutOfMemory, TrainingDiverged, StorageError, ModelUnreadable: the run failed.
        """
        runs = self._school.store.runs
        runs.reopen(self._id, after_step=self._known_step)
        try:
            return self._go(stop_wanted)
        except StorageError:
            # A full disk, say: what is there is whole, and the run can go on when there is room.
            self._leave(RunStatus.INTERRUPTED, {})
            raise
        except Exception as error:
            failure = {"reason": str(error), "last_request": self._recipe.last_request}
            self._leave(RunStatus.FAILED, failure)
            raise
        except BaseException:
            self._leave(RunStatus.INTERRUPTED, {})
            raise

    def _leave(self, status: RunStatus, result: Mapping[str, Any]) -> None:
        """Say how it ended; where the store cannot even do that, the run counts as killed."""
        with contextlib.suppress(StorageError):
            self._school.store.runs.finish(self._id, status, result)

    def _go(self, stop_wanted: Callable[[], bool]) -> Outcome:
        examples = self._load()
        trained = self._train(examples, stop_wanted)
        if trained.lora is None:
            return self._interrupted(trained)
        self._school.backend.clear_cache()
        try:
            judgement = self._judge(trained.lora, examples, stop_wanted)
        except _StoppedJudging:
            return self._interrupted(trained)
        return self._conclude(trained, trained.lora, judgement)

    def _load(self) -> dict[int, Example]:
        recipe = self._recipe
        ids = {*recipe.failures, *recipe.replay, *recipe.validation, *recipe.gate}
        examples = load_examples(
            self._school.store,
            ids,
            max_sequence_tokens=recipe.settings.max_sequence_length,
            eos_token_ids=self._school.eos_token_ids,
        )
        if not any(one in examples for one in recipe.failures):
            raise DraftloopError(
                "none of the failures that this run was to learn from is stored any more",
                remedy="Collect others and train again; storage.max_megabytes bounds how many are kept.",
            )
        if len(examples) < len(ids):
            self._watcher.note(
                f"{len(ids) - len(examples)} of {len(ids)} requests are damaged, or made room for others, "
                "and are left out"
            )
        return examples

    def _train(self, examples: Mapping[int, Example], stop_wanted: Callable[[], bool]) -> TrainingResult:
        recipe, school = self._recipe, self._school
        training = recipe.settings
        spec = LoraSpec(training.lora.rank, training.lora.alpha, tuple(training.lora.target_modules))
        parent = self._deployed(recipe.parent)
        learnt = None if parent is None else parent.lora
        dropped = dropped_modules(spec, learnt)
        if dropped:
            self._watcher.note(
                f"{recipe.parent} also adapts {', '.join(dropped)}; training.lora.target_modules leaves that "
                "out, so what it learnt there is given up"
            )
        start = starting_point(school.architecture, spec, learnt, training.seed)
        trainer = school.backend.new_trainer(
            school.draft_folder,
            start,
            TrainerSettings(
                Objective(training.objective), recipe.gradient_checkpointing, pause=school.courtesy.wait
            ),
        )
        job = TrainingJob(
            examples=examples,
            failures=recipe.failures,
            replay=recipe.replay,
            validation=recipe.validation,
            settings=recipe.settings,
            start=start,
            checkpoint=self._checkpoint,
        )
        return run_training(trainer, job, _Points(self._school, self._id, self._watcher), stop_wanted)

    def _judge(
        self, lora: Lora, examples: Mapping[int, Example], stop_wanted: Callable[[], bool]
    ) -> Judgement:
        recipe, school = self._recipe, self._school
        # Whatever is active now would have to give way, also where it is not what the run began with.
        active = school.store.adapters.active(school.pair)
        incumbent = self._deployed(None if active is None else active.name)
        if recipe.parent != (None if active is None else active.name):
            self._watcher.note(
                f"{active.name if active else 'the bare draft'} has become active meanwhile: the gate "
                "compares with it"
            )
        held_out = [
            HeldOut(one, domain, examples[one])
            for one, domain in zip(recipe.gate, recipe.gate_domains, strict=True)
            if one in examples
        ]

        def replayed(share: float) -> None:
            self._watcher.judged(share)
            school.courtesy.wait()
            if stop_wanted():
                raise _StoppedJudging

        compared = self._compared(examples)
        self._watcher.judging(len(held_out), len(compared))
        draft = school.backend.load(
            school.draft_folder,
            max_kv_cache_tokens=max(recipe.settings.max_sequence_length, recipe.num_draft_tokens + 2),
            vocabulary=recipe.cut(school.vocabulary),
        )
        return judge_candidate(
            draft,
            lora,
            Outfit() if incumbent is None else Outfit(incumbent.lora, incumbent.form),
            compared=compared,
            held_out=held_out,
            num_draft_tokens=recipe.num_draft_tokens,
            timed_round=recipe.timed_round,
            by_width=recipe.by_width,
            seed=recipe.settings.seed,
            replayed=replayed,
            courtesy=school.courtesy,
        )

    def _compared(self, examples: Mapping[int, Example]) -> list[Example]:
        """What the forms are compared on: the newest that validates, then the newest that was learnt from."""
        recipe = self._recipe
        ids = (*reversed(recipe.validation), *sorted(recipe.learnt, reverse=True))
        return [examples[one] for one in ids if one in examples][:FORM_EXAMPLES]

    def _deployed(self, name: str | None) -> Deployed | None:
        return None if name is None else load_deployed(self._school.store, self._school.directory, name)

    def _interrupted(self, trained: TrainingResult) -> Outcome:
        self._school.store.runs.finish(self._id, RunStatus.INTERRUPTED, {})
        reason = f"Stopped after {trained.steps} steps; draftloop train --resume goes on."
        return self._outcome("interrupted", reason, trained)

    def _conclude(self, trained: TrainingResult, lora: Lora, judgement: Judgement) -> Outcome:
        """Write the adapter, then let one transaction decide."""
        with new_adapter_name(self._school.store, self._school.directory) as name:
            outcome = self._judged(trained, judgement, name)
            self._write(lora, outcome, self._metrics(outcome, judgement))
            self._decide(outcome, judgement)
        remove_checkpoint(self._checkpoint)
        return outcome

    def _write(self, lora: Lora, outcome: Outcome, metrics: Mapping[str, Any]) -> None:
        school, name = self._school, str(outcome.adapter)
        write_adapter(
            adapter_folder(school.directory, name),
            lora,
            base_model=school.pair.draft,
            facts={
                "name": name,
                "run": self._id,
                "parent": outcome.parent,
                "form": outcome.form,
                "recipe": self._recipe.to_json(),
                "metrics": metrics,
            },
        )

    def _decide(self, outcome: Outcome, judgement: Judgement) -> None:
        store, recipe, name = self._school.store, self._recipe, str(outcome.adapter)
        metrics = self._metrics(outcome, judgement)
        result = {
            **metrics,
            "status": outcome.status,
            "reason": outcome.reason,
            "adapter": name,
            "last_request": recipe.last_request,
            "held_out": list(judgement.requests),
        }
        record = AdapterRecord(
            name=name,
            pair=self._school.pair,
            parent=recipe.parent,
            created_s=time.time(),
            status=AdapterStatus.REJECTED,
            form=judgement.form.value,
            run=self._id,
            reason=outcome.reason,
            metrics=metrics,
        )
        with store.transaction():
            store.adapters.add(record)
            if judgement.verdict.promote:
                store.adapters.promote(name, trained_request_ids=recipe.learnt, reason=outcome.reason)
            store.runs.finish(self._id, RunStatus(outcome.status), result)

    def _metrics(self, outcome: Outcome, judgement: Judgement) -> dict[str, Any]:
        """What is stored of a judged run beside the adapter."""
        told = ("status", "reason", "run", "adapter", "parent")
        return {
            **{name: value for name, value in asdict(outcome).items() if name not in told},
            "forms": {form.value: asdict(figures) for form, figures in judgement.forms.items()},
            "round_cost": {
                "before": asdict(judgement.incumbent_cost),
                "after": asdict(judgement.candidate_cost),
            },
        }

    def _outcome(self, status: str, reason: str, trained: TrainingResult) -> Outcome:
        return Outcome(
            status=status,
            reason=reason,
            run=self._id,
            parent=self._recipe.parent,
            examples=len(self._recipe.learnt),
            steps=trained.steps,
            skipped_steps=trained.skipped_steps,
            seconds=trained.trained_s + time.perf_counter() - self._started_s - trained.process_s,
        )

    def _judged(self, trained: TrainingResult, judgement: Judgement, name: str) -> Outcome:
        verdict = judgement.verdict
        status = AdapterStatus.PROMOTED if verdict.promote else AdapterStatus.REJECTED
        reason = verdict.reason
        if trained.best_is_start:
            reason = f"No checkpoint beat the start (validation alpha {trained.alpha_before:.3f}). {reason}"
        return replace(
            self._outcome(status.value, reason, trained),
            adapter=name,
            alpha_before=verdict.alpha_before,
            alpha_after=verdict.alpha_after,
            tau_before=verdict.tau_before,
            tau_after=verdict.tau_after,
            gain=verdict.gain,
            gain_ci95=verdict.gain_ci95,
            form=judgement.form.value,
            domains={domain: asdict(figures) for domain, figures in verdict.domains.items()},
        )


class _Points:
    """Stores the curve's points on their way to the watcher."""

    def __init__(self, school: School, run: int, watcher: Watcher) -> None:
        self._runs = school.store.runs
        self._run = run
        self._watcher = watcher

    def planned(self, total_steps: int, steps_done: int) -> None:
        """See `TrainingWatcher`."""
        self._watcher.planned(total_steps, steps_done)

    def point(self, point: RunPoint) -> None:
        """See `TrainingWatcher`."""
        self._runs.add_point(self._run, point)
        self._watcher.point(point)
