"""Learning while serving: when it begins, what is told of it, and that its fruit is worn and taken back."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

import pupils
from draftloop.cli.train import outcome_figures
from draftloop.errors import StorageError
from draftloop.learning.background import Ended, IdleLearner, Started
from draftloop.learning.circle import learn
from draftloop.loading import prepare
from draftloop.server.app import create_app
from draftloop.server.learning import Learner, Phase, open_learner
from draftloop.server.service import open_service
from draftloop.server.tickets import Job
from draftloop.server.worker import Worker
from draftloop.storage.records import RunPoint

pytest.importorskip("torch")


@pytest.fixture
def store(classroom):
    with classroom.store() as store:
        yield store


class FakeTraining:
    def __init__(self, outcome=None) -> None:
        self.outcome = outcome
        self.stopped = threading.Event()

    def poll(self):
        return self.outcome

    def stop(self) -> None:
        self.stopped.set()


class Desk:
    """A learner whose trainings are given, and whose clock stands still."""

    def __init__(self, classroom, store, start, **changes) -> None:
        self.now_s = 100.0
        config = classroom.config(adaptation__idle_s=20, **changes)
        idle = IdleLearner(
            store, classroom.data, classroom.pair, config, [], clock=lambda: self.now_s, start=start
        )
        self.learner = Learner(store, classroom.pair, idle, clock=lambda: self.now_s)

    def look(self, after_s):
        self.now_s += after_s
        return self.learner.look()


def trained_here(classroom, store):
    """Training in this process, so that what rounds cost can be given."""

    def start(arguments, directory, *, resume):
        return FakeTraining(outcome_figures(learn(classroom.school(store), pupils.Watched(), lambda: False)))

    return start


def test_who_does_not_learn_says_why_and_counts_what_others_promote(classroom, store):
    learner = Learner(store, classroom.pair, None, why_off="it is off")
    learner.start()
    learner.began()
    learner.ended()
    assert learner.look() is None
    pupils.add_adapter(classroom, store, "a0001")
    store.adapters.promote("a0001", reason="by hand")
    state = learner.state()
    assert (state.phase, state.enabled, state.why_off) == (Phase.OFF, False, "it is off")
    assert (state.promotions, state.reverts) == (1, 0)
    assert learner.stop() is False


def test_after_a_run_that_failed_it_is_off_and_says_when_it_tries_again(classroom, store):
    training = FakeTraining()
    desk = Desk(classroom, store, lambda *_, **__: training)
    assert isinstance(desk.look(20), Started)
    training.outcome = {"status": "failed", "reason": "the disk is full"}
    assert isinstance(desk.look(1), Ended)
    state = desk.learner.state()
    assert (state.phase, state.enabled) == (Phase.OFF, False)
    assert state.why_off == "the last run failed; it tries again in 10 min"
    assert state.last_outcome == training.outcome
    assert desk.look(555) is None
    assert desk.learner.state().why_off == "the last run failed; it tries again in 45 s"
    desk.now_s += 45
    assert desk.learner.state().phase is Phase.WAITING
    assert isinstance(desk.look(0), Started)


@pytest.mark.parametrize(
    ("options", "changes", "why"),
    [
        ({}, {"adaptation__auto_train": "false"}, "adaptation.auto_train is false"),
        ({}, {"storage__collect": "false"}, "nothing is stored (storage.collect)"),
        (
            {"with_draft": False},
            {},
            "the target answers alone (--no-speculation), and it is the draft that learns",
        ),
    ],
)
def test_it_can_be_switched_off(classroom, store, options, changes, why):
    config = classroom.config(**{"adaptation__auto_train": "auto", **changes})
    state = open_learner(config, store, prepare(config).plan, [], **options).state()
    assert (state.enabled, state.why_off) == (False, why)


def test_it_is_off_where_answering_and_training_do_not_fit_together(classroom, store):
    config = classroom.config(adaptation__auto_train="auto")
    plan = prepare(config).plan
    both = replace(plan, available_bytes=plan.generation_bytes + plan.training_bytes)
    assert open_learner(config, store, both, []).state().enabled
    tight = replace(both, available_bytes=both.available_bytes - 1)
    tight.check_generation()
    tight.check_training()
    state = open_learner(config, store, tight, []).state()
    assert not state.enabled
    assert "generating and training at once needs" in state.why_off


def test_prometheus_reads_it(classroom, store, engine, monkeypatch):
    desk = Desk(classroom, store, lambda *_, **__: FakeTraining())
    service = open_service(classroom.config(), engine, store, learner=desk.learner)
    client = TestClient(create_app(service), base_url="http://localhost")
    assert 'draftloop_learning_phase{phase="waiting"} 1.0' in client.get("/metrics").text
    desk.look(20)
    run = begun_run(classroom, store)
    store.runs.add_point(run, RunPoint(3, 0.5, 1.0, 0.1, 1.0, None))
    pupils.add_adapter(classroom, store, "a0001")
    store.adapters.promote("a0001", reason="by hand")
    told = client.get("/metrics").text
    assert 'draftloop_learning_phase{phase="training"} 1.0' in told
    assert 'draftloop_learning_phase{phase="waiting"} 0.0' in told
    assert "draftloop_training_step 3.0" in told
    assert 'draftloop_adapter_changes_total{kind="promotion"} 1.0' in told

    def fail(pair):
        raise StorageError("the disk is gone", remedy="Bring it back.")

    monkeypatch.setattr(store.adapters, "history", fail)
    told = client.get("/metrics").text
    assert "draftloop_ready" in told
    assert "draftloop_learning_phase" not in told


def test_it_tells_how_far_a_run_is(classroom, store):
    desk = Desk(classroom, store, lambda *_, **__: FakeTraining())
    assert desk.learner.state().phase is Phase.WAITING
    assert isinstance(desk.look(20), Started)
    assert desk.learner.state().phase is Phase.PREPARING
    # A run that another process has begun, as far as the store tells.
    run = begun_run(classroom, store)
    first = desk.learner.state()
    assert (first.phase, first.training, first.progress.step) == (Phase.TRAINING, True, 0)
    assert first.progress.eta_s is None
    total = first.progress.steps
    assert total > 10
    for step in (1, 2):
        store.runs.add_point(run, RunPoint(step, 0.5, 1.0, 0.1, 1.0, None))
    store.runs.add_point(run, RunPoint(2, 0.5, None, None, None, 0.75))
    desk.now_s += 10
    progress = desk.learner.state().progress
    assert (progress.step, progress.epoch, progress.validation_alpha) == (2, 0.5, 0.75)
    assert progress.eta_s == pytest.approx((total - 2) * 5)
    store.runs.add_point(run, RunPoint(total, 6.0, 1.0, 0.1, 1.0, None))
    state = desk.learner.state()
    assert (state.phase, state.progress.eta_s) == (Phase.JUDGING, None)


class Bell:
    """Stands between worker and learner, and rings when nobody is answered any more."""

    def __init__(self, learner) -> None:
        self.quiet = threading.Event()
        self._learner = learner

    def began(self) -> None:
        self._learner.began()

    def ended(self) -> None:
        self._learner.ended()
        self.quiet.set()


@pytest.fixture
def serve(classroom, store):
    """`serve(learner, **changes)`: a worker that answers. It gives `ask(seeds)`: who answered each one."""
    workers = []

    def make(learner, **changes):
        engine, bell = classroom.engine(store, **changes), Bell(learner)
        worker = Worker(engine, max_queued_requests=100, request_timeout_s=60, learner=bell)
        worker.start()
        workers.append(worker)

        async def one(seed):
            *_, completion = [event async for event in worker.submit(Job(pupils.question(seed), "somebody"))]
            return completion.adapter

        async def every(seeds):
            return await asyncio.gather(*map(one, seeds))

        def ask(seeds):
            bell.quiet.clear()
            worn = asyncio.run(every(seeds))
            assert bell.quiet.wait(60)
            return worn

        return ask

    yield make
    for worker in workers:
        assert worker.stop(60)


def test_a_promoted_adapter_is_worn_from_the_next_request_on_and_a_bad_one_taken_back(
    classroom, store, serve, monkeypatch
):
    pupils.steady_costs(monkeypatch)
    desk = Desk(classroom, store, trained_here(classroom, store))
    ask = serve(desk.learner, adaptation__revert_after_requests=6, memory__answers_at_once=1)
    assert ask(range(200, 203)) == [None] * 3
    assert isinstance(desk.look(20), Started)
    assert isinstance(desk.look(1), Ended)
    assert ask(range(300, 320)) == ["a0001"] * 20
    state = desk.learner.state()
    assert (state.phase, state.promotions, state.reverts) == (Phase.WAITING, 1, 0)
    assert state.last_outcome["status"] == "promoted"
    pupils.add_adapter(classroom, store, "a0002", parent="a0001", confused=True)
    store.adapters.promote("a0002", reason="a mistake")
    assert ask(range(320, 328)) == ["a0002"] * 6 + ["a0001"] * 2
    state = desk.learner.state()
    assert (state.promotions, state.reverts) == (2, 1)


def test_a_service_wears_what_was_promoted_before_anybody_asks(classroom, store, monkeypatch):
    pupils.steady_costs(monkeypatch)
    desk = Desk(classroom, store, trained_here(classroom, store))
    service = open_service(classroom.config(), classroom.engine(store), store, learner=desk.learner)
    desk.now_s += 20
    with TestClient(create_app(service), base_url="http://localhost") as client:
        while 'draftloop_adapter{name="a0001"} 1.0' not in client.get("/metrics").text:
            outcome = desk.learner.state().last_outcome
            assert outcome is None or outcome["status"] == "promoted"


def test_requests_hold_learning_back(classroom, store, serve):
    """The worker tells: twenty idle seconds count from the last answer."""
    desk = Desk(classroom, store, lambda *_, **__: FakeTraining())
    ask = serve(desk.learner)
    assert desk.look(19) is None
    ask(range(3))
    assert desk.look(19) is None
    assert isinstance(desk.look(1), Started)


def test_a_thread_looks_by_itself_and_a_run_is_stopped_with_the_service(classroom, store):
    started, training = threading.Event(), FakeTraining()

    def start(*_, **__):
        started.set()
        return training

    desk = Desk(classroom, store, start)
    desk.now_s += 20
    desk.learner.start()
    assert started.wait(60)
    assert desk.learner.stop() is True
    assert training.stopped.is_set()


def test_the_thread_outlives_an_error_that_nobody_foresaw(classroom, store, monkeypatch, caplog):
    monkeypatch.setattr("draftloop.server.learning.LOOK_S", 0.001)
    started, errors = threading.Event(), iter([KeyError("the words of a prompt")])

    def start(*_, **__):
        for error in errors:
            raise error
        started.set()
        return FakeTraining()

    desk = Desk(classroom, store, start, adaptation__longest_wait_s=0)
    desk.learner.began()
    desk.learner.start()
    assert started.wait(20)
    assert desk.learner.stop() is True
    assert "KeyError" in caplog.text
    assert "the words of a prompt" not in caplog.text


def begun_run(classroom, store) -> int:
    """A run in the store that is under way."""

    class Far(Exception):
        pass

    def gone(step):
        raise Far

    with pytest.raises(Far):
        learn(classroom.school(store), pupils.Watched(gone), lambda: False)
    run = store.runs.latest(classroom.pair).id
    store.runs.reopen(run, after_step=-1)
    return run
