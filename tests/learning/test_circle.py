"""The whole circle on toys: requests in, an adapter out, and the store tells what is active."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from filelock import FileLock

import pupils
from draftloop.backends.lora import LoraSpec
from draftloop.errors import DraftloopError, InputError, StorageError
from draftloop.learning.circle import LOCK_NAME, interrupted_run, is_training, learn
from draftloop.learning.run import checkpoint_of
from draftloop.learning.selection import replay_sample, select
from draftloop.models.adapter_files import read_adapter
from draftloop.storage.records import AdapterStatus, RunStatus
from pupils import Watched, ask

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _steady_costs(monkeypatch):
    pupils.steady_costs(monkeypatch)


@pytest.fixture
def store(classroom):
    with classroom.store() as store:
        yield store


def never():
    return False


def after_steps(count):
    """A wish to stop that comes when so many steps are done, and the watcher that counts them."""
    done = [0]
    return Watched(lambda step: done.__setitem__(0, step)), lambda: done[0] >= count


def test_a_draft_that_learns_is_promoted_and_worn(classroom, store):
    watched = Watched()
    outcome = learn(classroom.school(store), watched, never)
    assert outcome.status == "promoted", outcome.reason
    assert outcome.tau_after > 1.3 * outcome.tau_before
    assert outcome.alpha_after > outcome.alpha_before + 0.1
    assert outcome.gain_ci95[0] > 0.2
    assert watched.alphas[-1] > watched.alphas[0] + 0.1
    assert watched.compared == 16
    assert watched.judged_share == pytest.approx(watched.to_judge + watched.compared)
    active = store.adapters.active(classroom.pair)
    assert (active.name, active.parent, active.status) == ("a0001", None, AdapterStatus.PROMOTED)
    run = store.runs.latest(classroom.pair)
    assert (run.status, run.id) == (RunStatus.PROMOTED, outcome.run)
    assert run.result["gain"] == pytest.approx(outcome.gain)
    learnt = {one.id for one in store.requests.list(classroom.pair) if one.trained_by == "a0001"}
    assert learnt == set(run.recipe["failures"]) | set(run.recipe["replay"])
    assert not checkpoint_of(classroom.data, run.id).exists()
    assert [one.step for one in store.runs.points(run.id)] == [one.step for one in watched.points]

    engine = classroom.engine(store)
    assert engine.adapter == "a0001"
    before = [one for one in store.requests.list(classroom.pair) if one.adapter is None]
    ask(engine, range(100, 120))
    after = [one for one in store.requests.list(classroom.pair) if one.adapter == "a0001"]
    assert _alpha(after) > _alpha(before) + 0.1
    assert len(after) == 20


def test_the_adapter_folder_tells_what_reproduces_it(classroom, store):
    outcome = learn(classroom.school(store), Watched(), never)
    folder = classroom.data / "adapters" / outcome.adapter
    facts = json.loads((folder / "draftloop.json").read_text())
    recipe = store.runs.get(outcome.run).recipe
    assert facts["recipe"] == json.loads(json.dumps(recipe))
    assert recipe["settings"]["learning_rate"] == 3e-2
    assert recipe["facts"]["backend"] == "torch"
    assert facts["metrics"]["gain"] == pytest.approx(outcome.gain)
    assert read_adapter(folder).spec == LoraSpec(2, 16.0, ("down_proj",))


def test_a_second_training_goes_on_from_the_first(classroom, store):
    few = {"training__num_epochs": 4, "training__learning_rate": 1e-2}
    first = learn(classroom.school(store, **few), Watched(), never)
    assert first.status == "promoted", first.reason
    ask(classroom.engine(store), range(200, 230))
    watched = Watched()
    second = learn(classroom.school(store), watched, never)
    assert second.parent == first.adapter
    assert second.status == "promoted", second.reason
    # It begins where the first one ended, and not at the bare draft.
    bare = Watched()
    store.adapters.activate(classroom.pair, None)
    store.requests.mark_untrained(first.adapter)
    learn(classroom.school(store), bare, never)
    assert watched.alphas[0] > bare.alphas[0] + 0.02
    assert store.adapters.get(second.adapter).parent == first.adapter


def test_a_second_training_learns_from_what_is_new(classroom, store):
    first = learn(classroom.school(store), Watched(), never)
    ask(classroom.engine(store), range(200, 230))
    selection = select(store, classroom.pair, classroom.config())
    learnt = set(store.runs.get(first.run).recipe["failures"])
    assert learnt
    assert not learnt & set(selection.failures)
    assert learnt <= set(selection.replay)


def test_too_few_failures_are_told_and_nothing_is_written(classroom, store):
    outcome = learn(classroom.school(store, training__min_failure_cases=500), Watched(), never)
    assert outcome.status == "skipped"
    assert "of 500 failures" in outcome.reason
    assert store.runs.list(classroom.pair) == []
    assert store.adapters.list(classroom.pair) == []


def test_stopped_and_resumed_is_the_same_adapter_to_the_bit(classroom, store, furnished, tmp_path):
    uninterrupted = learn(classroom.school(store), Watched(), never)
    twin = _twin(classroom, furnished, tmp_path)
    with twin.store() as other:
        for stop_after in (1, 5, 13):
            watched, stop = after_steps(stop_after)
            began = other.runs.latest(twin.pair) is not None
            outcome = learn(twin.school(other), watched, stop, resume=began)
            assert outcome.status == "interrupted"
            assert outcome.steps == stop_after
            assert interrupted_run(other, twin.pair).status is RunStatus.INTERRUPTED
        watched = Watched()
        resumed = learn(twin.school(other), watched, never, resume=True)
        assert watched.plans == [(uninterrupted.steps, 13)]
        assert resumed.status == uninterrupted.status == "promoted"
        assert len(other.runs.list(twin.pair)) == 1
        points = other.runs.points(resumed.run)
    assert points == store.runs.points(uninterrupted.run)
    _assert_same_adapter(classroom, twin, uninterrupted.adapter)


def test_a_stop_while_judging_goes_on_with_judging(classroom, store):
    watched = Watched()
    first = learn(classroom.school(store), watched, lambda: watched.judged_share > 18)
    assert first.status == "interrupted"
    again = Watched()
    outcome = learn(classroom.school(store), again, never, resume=True)
    assert outcome.status == "promoted"
    assert again.plans == [(outcome.steps, outcome.steps)]
    assert again.points == []


def test_an_exception_in_the_midst_leaves_a_run_that_can_be_resumed(classroom, store):
    def interrupt(step):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(classroom.school(store), Watched(interrupt), never)
    assert store.runs.latest(classroom.pair).status is RunStatus.INTERRUPTED
    outcome = learn(classroom.school(store), Watched(), never, resume=True)
    assert outcome.status == "promoted"
    steps = [(one.step, one.validation_alpha is None) for one in store.runs.points(outcome.run)]
    assert len(steps) == len(set(steps))


def test_a_mistake_in_the_midst_fails_the_run_for_good(classroom, store):
    def break_(step):
        if step == 3:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        learn(classroom.school(store), Watched(break_), never)
    run = store.runs.latest(classroom.pair)
    assert (run.status, run.result["reason"]) == (RunStatus.FAILED, "broken")
    # Nor is it tried again by itself before there is something new.
    assert not select(store, classroom.pair, classroom.config()).ready_again
    with pytest.raises(InputError, match="no interrupted training run"):
        learn(classroom.school(store), Watched(), never, resume=True)


def test_a_full_disk_leaves_a_run_that_can_be_resumed(classroom, store, monkeypatch):
    from draftloop.learning import training

    def full(path, checkpoint):
        raise StorageError("The disk became full", remedy="Free some space.")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", full)
        with pytest.raises(StorageError):
            learn(classroom.school(store), Watched(), never)
    assert learn(classroom.school(store), Watched(), never, resume=True).status == "promoted"


def test_requests_that_made_room_are_left_out_of_a_resumed_run(classroom, store):
    watched, stop = after_steps(4)
    learn(classroom.school(store), watched, stop)
    recipe = store.runs.latest(classroom.pair).recipe
    gone = {*recipe["failures"][::2], *recipe["validation"][:1], *recipe["gate"][:1]}
    _evict(classroom, gone)
    again = Watched()
    outcome = learn(classroom.school(store), again, never, resume=True)
    assert outcome.status in ("promoted", "rejected")
    assert again.plans == [(watched.plans[0][0], 4)]
    assert any(f"{len(gone)} of " in note for note in again.notes)


def test_a_resumed_run_without_any_failure_left_says_so(classroom, store):
    watched, stop = after_steps(2)
    learn(classroom.school(store), watched, stop)
    _evict(classroom, store.runs.latest(classroom.pair).recipe["failures"])
    with pytest.raises(DraftloopError, match="stored any more"):
        learn(classroom.school(store), Watched(), never, resume=True)
    assert store.runs.latest(classroom.pair).status is RunStatus.FAILED


def test_a_new_run_gives_an_interrupted_one_up(classroom, store):
    watched, stop = after_steps(2)
    learn(classroom.school(store), watched, stop)
    first = store.runs.latest(classroom.pair)
    assert checkpoint_of(classroom.data, first.id).exists()
    again = Watched()
    outcome = learn(classroom.school(store), again, never)
    assert outcome.run != first.id
    assert store.runs.get(first.id).status is RunStatus.FAILED
    assert not checkpoint_of(classroom.data, first.id).exists()
    assert any("given up" in note for note in again.notes)


def test_a_damaged_checkpoint_is_told_once(classroom, store):
    watched, stop = after_steps(2)
    learn(classroom.school(store), watched, stop)
    path = checkpoint_of(classroom.data, store.runs.latest(classroom.pair).id)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StorageError, match="cannot be read"):
        learn(classroom.school(store), Watched(), never, resume=True)
    assert interrupted_run(store, classroom.pair) is None
    assert learn(classroom.school(store), Watched(), never).status == "promoted"


def test_only_one_trains_at_a_time(classroom, store):
    with FileLock(classroom.data / LOCK_NAME):
        assert is_training(classroom.data)
        with pytest.raises(InputError, match="another process is training"):
            learn(classroom.school(store), Watched(), never)
    assert not is_training(classroom.data)
    assert store.runs.list(classroom.pair) == []


def test_the_gate_judges_by_what_is_active_at_the_end(classroom, store):
    """An adapter that somebody made active meanwhile is not thrown out for one that is no better."""
    good = learn(classroom.school(store), Watched(), never)
    store.adapters.activate(classroom.pair, None)
    store.requests.mark_untrained(good.adapter)

    def promote(step):
        if step == 1:
            store.adapters.activate(classroom.pair, good.adapter)

    watched = Watched(promote)
    outcome = learn(classroom.school(store), watched, never)
    assert outcome.parent is None
    assert outcome.tau_before == pytest.approx(good.tau_after)
    assert any("has become active meanwhile" in note for note in watched.notes)
    assert outcome.status == "rejected"


def test_modules_that_are_given_up_are_told(classroom, store):
    first = learn(classroom.school(store), Watched(), never)
    ask(classroom.engine(store), range(200, 230))
    watched = Watched()
    learn(
        classroom.school(store, training__lora__target_modules="[q_proj]", training__min_failure_cases=1),
        watched,
        never,
    )
    assert any(f"{first.adapter} also adapts down_proj" in note for note in watched.notes)


def test_prompts_that_leave_no_room_are_told(classroom, store):
    short = {"training__max_sequence_length": 16}
    assert select(store, classroom.pair, classroom.config(**short)).too_long == 0
    engine = classroom.engine(store)
    from draftloop.engine import Request
    from draftloop.learning.recorder import Provenance
    from draftloop.types import Sampling

    engine.complete(
        Request(list(range(40)), Sampling(temperature=1.0), 4, 3, provenance=Provenance("toys", "chat"))
    )
    watched = Watched()
    selection = select(store, classroom.pair, classroom.config(**short))
    assert selection.too_long == 1
    assert max(one.id for one in store.requests.list(classroom.pair)) not in {
        *selection.failures,
        *selection.replay,
        *selection.validation,
        *selection.gate,
    }
    learn(classroom.school(store, **short), watched, never)
    assert any("max_sequence_length = 16" in note for note in watched.notes)


def test_replay_is_drawn_from_all_there_is_and_no_more_than_is_read(classroom, store):
    selection = select(store, classroom.pair, classroom.config())
    selection = replace(selection, failures=tuple(range(10)), replay=tuple(range(100, 1100)))
    settings = classroom.config(training__replay_ratio=0.5, training__num_epochs=3).training
    sample = replay_sample(selection, settings)
    assert len(sample) == 30
    assert list(sample) == sorted(sample)
    assert min(sample) < 200
    assert max(sample) > 1000
    assert replay_sample(selection, settings.model_copy(update={"replay_ratio": 0.0})) == ()
    assert replay_sample(replace(selection, replay=(7, 8)), settings) == (7, 8)


def test_tensorboard_files_are_written_beside_the_checkpoint(classroom, store):
    pytest.importorskip("tensorboardX")
    watched = Watched()
    outcome = learn(classroom.school(store, logging__tensorboard="true"), watched, never)
    assert watched.alphas
    files = list((classroom.data / "runs" / f"{outcome.run:04d}").glob("events.*"))
    assert files
    assert b"validation_alpha" in files[0].read_bytes()


def _alpha(requests):
    return sum(one.alpha_sum for one in requests) / sum(one.tested_tokens for one in requests)


def _twin(classroom, furnished, tmp_path):
    import shutil

    folder = tmp_path / "twin"
    shutil.copytree(furnished, folder)
    return pupils.Elsewhere(folder)


def _assert_same_adapter(one, other, name):
    first, second = (read_adapter(room.data / "adapters" / name) for room in (one, other))
    assert first.modules.keys() == second.modules.keys()
    for module in first.modules:
        np.testing.assert_array_equal(first.modules[module].a, second.modules[module].a)
        np.testing.assert_array_equal(first.modules[module].b, second.modules[module].b)


def _evict(classroom, ids):
    """Take requests away as the size bound does."""
    import sqlite3

    with sqlite3.connect(classroom.data / "draftloop.sqlite") as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.executemany("DELETE FROM requests WHERE id = ?", [(one,) for one in ids])
    connection.close()


@pytest.mark.parametrize("measured", [{"speculative__temperature": 0}, {"storage__collect": "false"}, {}])
def test_a_schedules_draft_is_judged_by_whatever_costs_were_measured(
    classroom, store, measured, monkeypatch, tmp_path
):
    """Whoever answers with flags of his own measured under those; a constant K needs none."""
    monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "cache"))
    adaptive = {"speculative__schedule": "adaptive", "backend": "torch"}
    assert classroom.school(store, **adaptive).by_width is None
    classroom.engine(None, **adaptive, **measured)
    school = classroom.school(store, **adaptive)
    assert school.by_width is not None
    assert school.by_width.verify_at(1) > 0
    # What the gate times is set off against them, so it is told how they were measured.
    assert school.by_width.sampling.greedy == (measured.get("speculative__temperature") == 0)
    assert classroom.school(store).by_width is None
