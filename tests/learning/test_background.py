"""Learning in the background: when it is started, what is told of it, and that nobody waits for it."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pupils
from draftloop.errors import StorageError
from draftloop.learning.background import (
    LOG_NAME,
    RESULT_NAME,
    Ended,
    IdleLearner,
    Started,
    Training,
    start_training,
)
from draftloop.storage.records import RunStatus

if TYPE_CHECKING:
    from pupils import Classroom

pytest.importorskip("torch")

LONG_S, GLANCE_S = 120.0, 0.1
"""How long an end is waited for, and how long between two looks at what a process has done."""


class FakeTraining:
    def __init__(self) -> None:
        self.outcome: dict | None = None
        self.stopped = 0

    def poll(self):
        return self.outcome

    def stop(self) -> None:
        self.stopped += 1


class Machine:
    """A clock that stands still, and processes that do nothing."""

    def __init__(self, classroom: Classroom, store, **changes) -> None:
        self.now_s = 100.0
        self.started: list[tuple[tuple[str, ...], bool]] = []
        self.trainings: list[FakeTraining] = []
        self.learner = IdleLearner(
            store,
            classroom.data,
            classroom.pair,
            classroom.config(adaptation__idle_s=20, **changes),
            ["--set", "a=b"],
            clock=lambda: self.now_s,
            start=self._start,
        )

    def _start(self, arguments, directory, *, resume):
        self.started.append((tuple(arguments), resume))
        self.trainings.append(FakeTraining())
        return self.trainings[-1]

    def wait(self, seconds: float):
        self.now_s += seconds
        return self.learner.look()


@pytest.fixture
def store(classroom):
    with classroom.store() as store:
        yield store


@pytest.fixture
def machine(classroom, store):
    return Machine(classroom, store)


def test_it_begins_when_nobody_asked_for_a_while(machine):
    assert machine.wait(19) is None
    event = machine.wait(1)
    assert isinstance(event, Started)
    assert event.failures >= 8
    assert not event.resumed
    assert machine.started == [(("--set", "a=b"), False)]


def test_an_answer_under_way_is_no_idleness(machine):
    machine.learner.began()
    assert machine.wait(500) is None
    machine.learner.ended()
    assert machine.wait(19) is None
    assert isinstance(machine.wait(1), Started)


def test_a_request_that_comes_while_it_looks_does_not_wait(machine):
    asked = threading.Thread(target=machine.learner.began, daemon=True)

    def slow(*arguments, **options):
        asked.start()
        asked.join(10)
        assert not asked.is_alive()
        return machine._start(*arguments, **options)

    machine.learner._start = slow
    assert isinstance(machine.wait(20), Started)


def test_under_requests_that_never_pause_it_begins_in_the_end(classroom, store):
    machine = Machine(classroom, store, adaptation__longest_wait_s=60)
    for _ in range(5):
        machine.learner.began()
        assert machine.wait(9) is None
        machine.learner.ended()
        assert machine.wait(2) is None
    machine.learner.began()
    assert machine.wait(4) is None
    assert isinstance(machine.wait(2), Started)


def test_under_requests_that_never_pause_too_few_failures_are_looked_at_again(classroom, store):
    machine = Machine(classroom, store, adaptation__longest_wait_s=60, training__min_failure_cases=52)
    machine.learner.began()
    assert machine.wait(60) is None
    pupils.ask(classroom.engine(store), range(200, 220))
    assert machine.wait(59) is None
    assert isinstance(machine.wait(1), Started)


def test_while_it_runs_no_other_is_started_and_its_end_is_told_once(machine):
    machine.wait(20)
    assert machine.learner.training
    assert machine.wait(100) is None
    machine.trainings[0].outcome = {"status": "rejected", "reason": "no"}
    assert machine.wait(0) == Ended({"status": "rejected", "reason": "no"})
    assert not machine.learner.training
    assert machine.wait(1000) is None
    assert len(machine.started) == 1


def test_too_few_failures_are_no_reason(classroom, store):
    machine = Machine(classroom, store, training__min_failure_cases=500)
    assert machine.wait(1000) is None
    assert machine.started == []


def test_what_was_refused_once_is_not_tried_again_alone(classroom, store, machine):
    requests = store.requests.list(classroom.pair)
    run = store.runs.start(classroom.pair, None, {})
    store.runs.finish(run, RunStatus.REJECTED, {"last_request": requests[-1].id})
    assert machine.wait(1000) is None


def test_an_interrupted_run_goes_on(classroom, store):
    machine = Machine(classroom, store, training__min_failure_cases=500)
    run = store.runs.start(classroom.pair, None, {})
    store.runs.finish(run, RunStatus.INTERRUPTED, {})
    event = machine.wait(20)
    assert event.resumed
    assert machine.started == [(("--set", "a=b"), True)]


def test_while_another_process_trains_it_waits(classroom, machine):
    from filelock import FileLock

    from draftloop.learning.circle import LOCK_NAME

    with FileLock(classroom.data / LOCK_NAME):
        assert machine.wait(20) is None
    machine.learner.began()
    machine.learner.ended()
    assert isinstance(machine.wait(20), Started)


def test_after_failures_it_tries_again_after_growing_pauses(machine):
    machine.wait(20)
    for pause_s in (600, 1200, 2400, 4800, 9600, 19_200, 38_400, 76_800, 86_400, 86_400):
        machine.trainings[-1].outcome = {"status": "failed", "reason": "no room"}
        assert isinstance(machine.wait(1), Ended)
        assert machine.learner.pause_s == pause_s
        machine.learner.began()
        machine.learner.ended()
        assert machine.wait(pause_s - 1) is None
        assert isinstance(machine.wait(1), Started)
        assert machine.learner.pause_s is None


def test_a_run_that_went_well_makes_the_pauses_short_again(machine):
    machine.wait(20)
    for status in ("failed", "failed", "rejected", "failed"):
        machine.trainings[-1].outcome = {"status": status, "reason": "no room"}
        assert isinstance(machine.wait(1), Ended)
        last_pause_s = machine.learner.pause_s
        machine.learner.began()
        machine.learner.ended()
        machine.wait(2000)
    assert last_pause_s == 600


def test_a_process_that_cannot_be_started_is_told(classroom, store):
    machine = Machine(classroom, store)

    def fail(*arguments, **options):
        raise StorageError("the disk is full", remedy="Free some space.")

    machine.learner._start = fail
    assert machine.wait(20) == Ended({"status": "failed", "reason": "the disk is full. Free some space."})
    machine.learner._start = machine._start
    assert machine.wait(599) is None
    assert isinstance(machine.wait(1), Started)


def test_who_leaves_stops_it_once(machine):
    machine.wait(20)
    assert machine.learner.leave() is True
    assert machine.trainings[0].stopped == 1


def test_who_leaves_without_a_run_starts_none(machine):
    assert machine.learner.leave() is False
    assert machine.wait(1000) is None


def finished(training: Training) -> dict:
    assert training.wait(LONG_S)
    return training.poll()


def test_a_real_process_trains_and_tells_its_outcome(classroom):
    training = start_training(classroom.options(), classroom.data)
    assert os.getsid(training.pid) != os.getsid(0)
    outcome = finished(training)
    assert outcome["status"] in ("promoted", "rejected")
    assert outcome["adapter"] == "a0001"
    with classroom.store() as store:
        assert store.adapters.get("a0001").reason == outcome["reason"]


def test_a_real_process_that_fails_tells_its_error(classroom):
    outcome = finished(start_training(["--set", "models.draft.name=./nowhere"], classroom.data))
    assert outcome["status"] == "failed"
    assert "nowhere" in outcome["reason"]


def test_a_real_process_that_is_stopped_can_be_resumed(classroom):
    """It is stopped as soon as it trains, and has more epochs than it could be through with by then."""
    endless = classroom.options(training__num_epochs=5000)
    training = start_training(endless, classroom.data)
    with classroom.store() as store:
        while not (runs := store.runs.list(classroom.pair)) or len(store.runs.points(runs[0].id)) < 3:
            assert not training.wait(GLANCE_S)
        training.stop()
        outcome = finished(training)
        assert outcome["status"] == "interrupted"
        assert outcome["steps"] >= 2
        assert store.runs.latest(classroom.pair).status is RunStatus.INTERRUPTED
    resumed = start_training(endless, classroom.data, resume=True)
    with classroom.store() as store:
        while len(store.runs.points(1)) < outcome["steps"] + 5:
            assert not resumed.wait(GLANCE_S)
    resumed.stop()
    again = finished(resumed)
    assert again["run"] == outcome["run"]
    assert again["steps"] > outcome["steps"]


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of processes are read from /proc")
def test_a_real_process_has_the_lowest_priority(classroom):
    training = start_training(classroom.options(training__num_epochs=5000), classroom.data)
    with classroom.store() as store:
        while not store.runs.list(classroom.pair):
            assert not training.wait(GLANCE_S)
        assert os.getpriority(os.PRIO_PROCESS, training.pid) == 19
        assert os.sched_getscheduler(training.pid) == os.SCHED_IDLE
        group = Path(f"/proc/{training.pid}/autogroup")
        assert not group.exists() or group.read_text().endswith("nice 19\n")
    training.stop()
    finished(training)


def test_an_outcome_that_is_no_json_is_a_failure(classroom):
    training = start_training(["--no-such-option"], classroom.data)
    assert finished(training)["status"] == "failed"
    assert (classroom.data / "runs" / LOG_NAME).read_text().startswith("error: ")
    assert (classroom.data / "runs" / RESULT_NAME).read_text() == ""
    assert json.dumps(finished(training))
