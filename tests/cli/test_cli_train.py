"""`draftloop train` on toys that can learn: the verdict, its JSON, and what stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import pupils
from draftloop.storage.records import RunStatus

pytest.importorskip("torch")

KEYS = [
    *("status", "reason", "adapter", "parent", "examples", "steps", "seconds", "alpha_before", "alpha_after"),
    *("tau_before", "tau_after", "gain", "gain_ci95", "domains", "run", "form", "skipped_steps"),
]


@pytest.fixture(autouse=True)
def _steady_costs(monkeypatch):
    pupils.steady_costs(monkeypatch)


@pytest.fixture
def train(draftloop, classroom, monkeypatch):
    """`train(*flags, **settings)` in the classroom."""
    monkeypatch.chdir(classroom.folder)

    def call(*flags, **changes):
        return draftloop(*classroom.options(**changes), "train", *flags)

    return call


def test_the_verdict_as_json(train, classroom):
    figures = train("--json").json
    assert list(figures) == KEYS
    assert figures["status"] == "promoted"
    assert figures["adapter"] == "a0001"
    assert figures["parent"] is None
    assert figures["tau_after"] > figures["tau_before"]
    low, high = figures["gain_ci95"]
    assert low < figures["gain"] < high
    assert list(figures["domains"]) == [pupils.DOMAIN]
    assert figures["domains"][pupils.DOMAIN]["alpha_after"] > figures["alpha_before"]
    assert figures["skipped_steps"] == 0
    with classroom.store() as store:
        assert store.adapters.active(classroom.pair).name == "a0001"


def test_the_verdict_for_people(train):
    result = train()
    assert result.exit_status == 0
    assert result.out.startswith("promoted a0001: The draft got faster: tau ")
    assert "95 % interval" in result.out
    assert pupils.DOMAIN in result.out
    assert "alpha" in result.out
    assert "deployed " in result.out
    assert "validation alpha" in result.err
    assert "judging on" in result.err


def test_a_refusal_is_no_failure(train, classroom):
    result = train(training__learning_rate=1e-9)
    assert result.exit_status == 0
    assert result.out.startswith("rejected a0001: ")
    with classroom.store() as store:
        assert store.adapters.active(classroom.pair) is None


def test_too_few_failures_are_skipped_unless_forced(train):
    result = train("--json", training__min_failure_cases=500)
    assert result.json["status"] == "skipped"
    assert "of 500 failures" in result.json["reason"]
    assert result.json["run"] is None
    assert train(training__min_failure_cases=500).out.startswith("skipped: ")
    assert train("--force", "--json", training__min_failure_cases=500).json["status"] == "promoted"


def test_nothing_to_resume_is_wrong_input(train):
    train("--resume").assert_wrong_input("no interrupted training run", "Train without --resume")


def test_flags_that_contradict(train):
    train("--resume", "--force").assert_wrong_input("--resume", "--force")


def test_a_backend_that_does_not_train(train):
    train(backend="numpy", device="auto").assert_wrong_input("numpy", "does not train", "torch")


def test_memory_is_planned_before_the_first_step(train, classroom, monkeypatch):
    monkeypatch.setattr("draftloop.models.memory.available_memory_bytes", lambda: 10**6)
    result = train()
    assert result.exit_status == 2
    assert "error: training needs" in result.err
    assert "Traceback" not in result.err
    with classroom.store() as store:
        assert store.runs.list(classroom.pair) == []


def test_another_process_that_trains_is_told(train, classroom):
    from filelock import FileLock

    from draftloop.learning.circle import LOCK_NAME

    with FileLock(classroom.data / LOCK_NAME):
        train().assert_wrong_input("another process is training")


def _interrupt_at(monkeypatch, step, times=1):
    """Press Ctrl-C while that step is made."""
    from draftloop.backends.torch.training import TorchTrainer

    original, made = TorchTrainer.step, []

    def interrupted(trainer, microbatches, learning_rate):
        made.append(learning_rate)
        if len(made) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return original(trainer, microbatches, learning_rate)

    monkeypatch.setattr(TorchTrainer, "step", interrupted)


def test_an_interrupt_stops_after_the_step_and_resume_goes_on(train, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 4)
        result = train()
    assert result.exit_status == 130
    assert result.out.startswith("interrupted: Stopped after 4 steps; draftloop train --resume goes on.")
    assert "stopping after this step" in result.err
    assert signal.getsignal(signal.SIGINT) is before
    resumed = train("--resume")
    assert resumed.out.startswith("promoted a0001: ")
    assert "from step 5 on" in resumed.err


def test_an_interrupt_with_json_is_still_one_object(train, monkeypatch):
    import json

    _interrupt_at(monkeypatch, 2)
    result = train("--json")
    assert result.exit_status == 130
    assert json.loads(result.out)["status"] == "interrupted"


def test_a_second_interrupt_does_not_wait(train, classroom, monkeypatch):
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 2, times=2)
        result = train()
    assert result.exit_status == 130
    assert "draftloop train --resume goes on from the last checkpoint" in result.err
    assert "Traceback" not in result.err
    with classroom.store() as store:
        assert store.runs.latest(classroom.pair).status is RunStatus.INTERRUPTED
    assert train("--resume", "--json").json["status"] == "promoted"


def test_tensorboard_without_its_package_is_told_before_anything(train, classroom, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "tensorboardX" else original(name, *rest),
    )
    train(logging__tensorboard="true").assert_wrong_input("tensorboardX", "logging.tensorboard")
    with classroom.store() as store:
        assert store.runs.list(classroom.pair) == []


def test_the_hidden_flag_makes_the_process_yield(classroom):
    """In a process of its own, for a priority that was lowered does not come back."""
    code = (
        "import os; from draftloop.cli.train import _yield_to_others; _yield_to_others(); "
        "print(os.getpriority(os.PRIO_PROCESS, 0))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) == 19
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19
