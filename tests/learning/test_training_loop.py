"""The training loop with a trainer that only remembers: what is asked of it, and what is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from draftloop.backends.lora import Lora, LoraModule, LoraSpec
from draftloop.backends.training import Example, StepResult, TrainerState
from draftloop.config.schema import TrainingSettings
from draftloop.learning.batches import plan_batches
from draftloop.learning.checkpoints import load_checkpoint, remove_checkpoint
from draftloop.learning.learning_rate import learning_rate_at
from draftloop.learning.training import TrainingDiverged, TrainingJob, run_training
from draftloop.types import Rules, Sampling
from pupils import Watched

if TYPE_CHECKING:
    from collections.abc import Sequence

SPEC = LoraSpec(1, 1.0, ("q_proj",))
MODULE = "model.layers.0.self_attn.q_proj"
FAILURES, REPLAY, VALIDATION = tuple(range(10)), tuple(range(20, 26)), (40, 41)


def lora(value: float) -> Lora:
    return Lora(SPEC, {MODULE: LoraModule(np.full((1, 2), value, np.float32), np.zeros((2, 1), np.float32))})


def example(number: int) -> Example:
    """Its tokens tell which one it is."""
    return Example(
        tokens=np.array([number, 0, 0], np.int32),
        num_prompt_tokens=1,
        top_ids=np.zeros((2, 1), np.int32),
        top_probs=np.ones((2, 1), np.float32),
        tail_probs=np.zeros(2, np.float32),
        rules=Rules(Sampling()),
    )


class FakeTrainer:
    """Its weights are the number of applied steps; validation alpha after n steps is `alphas[n]`."""

    def __init__(self, alphas=lambda steps: steps / 100, norms=lambda step: 1.0) -> None:
        self.asked: list[tuple[list[list[int]], float]] = []
        self.steps = 0
        self._alphas, self._norms = alphas, norms

    def step(self, microbatches: Sequence[Sequence[Example]], learning_rate: float) -> StepResult:
        ids = [[int(one.tokens[0]) for one in batch] for batch in microbatches]
        self.asked.append((ids, learning_rate))
        norm = self._norms(len(self.asked))
        applied = bool(np.isfinite(norm))
        self.steps += applied
        return StepResult(loss=0.5, gradient_norm=norm, applied=applied, rows=2, tokens=3)

    def replay(self, batch: Sequence[Example]) -> list[np.ndarray]:
        return [np.full(2, self._alphas(self.steps), np.float32) for _ in batch]

    def state(self) -> TrainerState:
        return TrainerState(lora(self.steps), {"m": np.full(1, self.steps, np.float32)}, self.steps)

    def restore(self, state: TrainerState) -> None:
        self.steps = state.steps


def settings(**changes) -> TrainingSettings:
    plain = {"batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 4, "warmup_steps": 3}
    return TrainingSettings(**{**plain, **changes})


@pytest.fixture
def job(tmp_path):
    def make(validation=VALIDATION, examples=(*FAILURES, *REPLAY, *VALIDATION), **changes):
        return TrainingJob(
            examples={number: example(number) for number in examples},
            failures=FAILURES,
            replay=REPLAY,
            validation=validation,
            settings=settings(**changes),
            start=lora(-1.0),
            checkpoint=tmp_path / "checkpoint",
        )

    return make


def plan(chosen: TrainingSettings):
    return plan_batches(
        FAILURES,
        REPLAY,
        batch_size=chosen.batch_size,
        accumulation_steps=chosen.gradient_accumulation_steps,
        num_epochs=chosen.num_epochs,
        replay_ratio=chosen.replay_ratio,
        seed=chosen.seed,
    )


def never():
    return False


def weight(result) -> float:
    return float(result.modules[MODULE].a[0, 0])


def test_the_plan_is_followed_at_the_planned_rates(job):
    trainer, watched = FakeTrainer(), Watched()
    result = run_training(trainer, job(), watched, never)
    steps = plan(settings())
    assert [ids for ids, _ in trainer.asked] == [[list(batch) for batch in step] for step in steps]
    rates = [
        learning_rate_at(step, peak=1e-4, warmup_steps=3, total_steps=len(steps))
        for step in range(1, len(steps) + 1)
    ]
    assert [rate for _, rate in trainer.asked] == rates
    assert (result.steps, result.skipped_steps, result.tokens) == (len(steps), 0, 3 * len(steps))
    assert watched.plans == [(len(steps), 0)]
    trained = [one for one in watched.points if one.validation_alpha is None]
    assert [one.step for one in trained] == list(range(1, len(steps) + 1))
    assert [one.learning_rate for one in trained] == rates


def test_validation_is_before_the_first_step_and_after_each_epoch(job):
    watched = Watched()
    run_training(FakeTrainer(), job(), watched, never)
    validated = [one.step for one in watched.points if one.validation_alpha is not None]
    total = len(plan(settings()))
    assert validated[0] == 0
    assert validated[-1] == total
    assert len(validated) == 5


def test_the_best_is_that_of_the_highest_alpha_not_the_last(job):
    trainer = FakeTrainer(alphas=lambda steps: 0.9 - abs(steps - 7) / 100)
    watched = Watched()
    result = run_training(trainer, job(), watched, never)
    best_step = max(watched.points, key=lambda one: one.validation_alpha or 0).step
    assert 0 < best_step < result.steps
    assert weight(result.lora) == best_step
    assert result.alpha_after == pytest.approx(max(watched.alphas))
    assert result.alpha_before == pytest.approx(watched.alphas[0])


def test_where_nothing_gets_better_the_start_is_the_best(job):
    result = run_training(FakeTrainer(alphas=lambda steps: 0.9 - steps / 100), job(), Watched(), never)
    assert weight(result.lora) == 0
    assert result.alpha_before == result.alpha_after


def test_without_validation_the_last_weights_are_the_best(job):
    result = run_training(FakeTrainer(), job(validation=()), Watched(), never)
    assert weight(result.lora) == result.steps
    assert result.alpha_before is None
    assert result.alpha_after is None


def test_alphas_that_are_no_numbers_are_no_acceptance(job):
    watched = Watched()
    result = run_training(
        FakeTrainer(alphas=lambda steps: 0.5 if steps == 0 else float("nan")), job(), watched, never
    )
    assert weight(result.lora) == 0
    assert watched.alphas[1:] == [0.0] * len(watched.alphas[1:])


def test_steps_without_a_finite_gradient_are_skipped_and_counted(job):
    watched = Watched()
    trainer = FakeTrainer(norms=lambda step: float("nan") if step in (2, 5) else 1.0)
    result = run_training(trainer, job(), watched, never)
    assert result.skipped_steps == 2
    assert result.steps == len(plan(settings()))
    assert [one.step for one in watched.points if one.loss and one.gradient_norm is None] == [2, 5]


def test_a_run_of_skipped_steps_alone_says_what_to_do(job):
    with pytest.raises(TrainingDiverged, match=r"none of the .* steps.*training\.learning_rate"):
        run_training(FakeTrainer(norms=lambda step: float("inf")), job(), Watched(), never)


def test_a_first_step_without_any_gradient_is_told(job):
    with pytest.raises(TrainingDiverged, match="exactly zero"):
        run_training(FakeTrainer(norms=lambda step: 0.0), job(), Watched(), never)
    # Later on, a step may have nothing to learn.
    assert run_training(FakeTrainer(norms=lambda step: float(step == 1)), job(), Watched(), never).lora


def test_a_stop_writes_a_checkpoint_and_a_resumed_run_goes_on_there(job):
    whole = FakeTrainer()
    expected = run_training(whole, job(), Watched(), never)
    remove_checkpoint(job().checkpoint)
    first = FakeTrainer()
    stopped = run_training(first, job(), Watched(), lambda: len(first.asked) >= 4)
    assert stopped.lora is None
    assert stopped.steps == 4
    assert load_checkpoint(job().checkpoint).steps_done == 4
    second, watched = FakeTrainer(), Watched()
    resumed = run_training(second, job(), watched, never)
    assert first.asked + second.asked == whole.asked
    assert watched.plans == [(expected.steps, 4)]
    assert weight(resumed.lora) == weight(expected.lora)
    assert (resumed.alpha_before, resumed.alpha_after) == (expected.alpha_before, expected.alpha_after)
    assert resumed.trained_s > resumed.process_s


def test_a_stop_before_the_first_step_does_not_validate_twice(job):
    assert run_training(FakeTrainer(), job(), Watched(), lambda: True).steps == 0
    watched = Watched()
    run_training(FakeTrainer(), job(), watched, never)
    assert watched.points[0].step == 1


def test_the_skipped_and_the_best_survive_a_stop(job):
    def alphas(steps):
        return 0.9 if steps == 3 else 0.1

    norms = [1.0, float("nan"), 1.0, 1.0, *[1.0] * 100]
    one = {"num_epochs": 4, "replay_ratio": 0.0, "batch_size": 1, "gradient_accumulation_steps": 2}
    whole = FakeTrainer(alphas, lambda step: norms[step - 1])
    expected = run_training(whole, job(**one), Watched(), never)
    remove_checkpoint(job().checkpoint)
    first = FakeTrainer(alphas, lambda step: norms[step - 1])
    assert run_training(first, job(**one), Watched(), lambda: len(first.asked) >= 7).lora is None
    second = FakeTrainer(alphas)
    resumed = run_training(second, job(**one), Watched(), never)
    assert resumed.skipped_steps == expected.skipped_steps == 1
    assert weight(resumed.lora) == weight(expected.lora)


def test_a_checkpoint_is_written_at_each_epoch(job):
    seen = []

    class Checked(Watched):
        def point(self, point):
            found = load_checkpoint(job().checkpoint)
            seen.append(None if found is None else found.steps_done)

    run_training(FakeTrainer(), job(), Checked(), never)
    total = len(plan(settings()))
    assert {step for step in seen if step} == {round(total / 4) * epoch for epoch in (1, 2, 3)}


def test_missing_examples_leave_the_plan_as_it_is(job):
    known = (*FAILURES[3:], *REPLAY, *VALIDATION[:1])
    trainer = FakeTrainer()
    result = run_training(trainer, job(examples=known), Watched(), never)
    assert result.steps == len(plan(settings()))
    asked = [number for ids, _ in trainer.asked for batch in ids for number in batch]
    planned = [one for step in plan(settings()) for batch in step for one in batch]
    assert asked == [one for one in planned if one in known]


def test_a_step_that_is_missing_altogether_is_passed_over(job):
    alone = {"batch_size": 1, "gradient_accumulation_steps": 1, "replay_ratio": 0.0}
    trainer = FakeTrainer()
    result = run_training(trainer, job(examples=FAILURES[1:], **alone), Watched(), never)
    assert result.steps == 40
    assert len(trainer.asked) == 36
    assert result.skipped_steps == 0


def test_it_needs_nothing_of_the_watcher_but_its_two_methods(job):
    told = []
    watcher = SimpleNamespace(planned=lambda *plan: told.append(plan), point=told.append)
    run_training(FakeTrainer(), job(), watcher, never)
    assert len(told) > 2
