"""Training runs and their curves."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import pytest
from storage_samples import OTHER_PAIR, PAIR, add_promoted

from draftloop.errors import InputError
from draftloop.storage.records import RunPoint, RunRecord, RunStatus
from draftloop.storage.store import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from draftloop.storage.store import Store

RECIPE = {"seed": 3, "failures": [4, 5], "settings": {"learning_rate": 1e-4, "note": "ü"}, "parent": None}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    times = iter(range(1000, 2000))
    with open_store(tmp_path, max_megabytes=10, clock=lambda: float(next(times))) as opened:
        yield opened


def trained(step: int) -> RunPoint:
    return RunPoint(step, step / 10, 0.5 / step, 1e-4, 1.25, None)


def validated(step: int) -> RunPoint:
    return RunPoint(step, step / 10, None, None, None, 0.75)


def test_a_run_from_its_beginning_to_its_end(store: Store) -> None:
    run_id = store.runs.start(PAIR, None, RECIPE)
    begun = RunRecord(run_id, PAIR, None, 1000.0, None, RunStatus.RUNNING, RECIPE, {})
    assert store.runs.get(run_id) == store.runs.latest(PAIR) == begun
    store.runs.finish(run_id, RunStatus.REJECTED, {"gain": -0.01, "reason": "no gain"})
    ended = dataclasses.replace(
        begun, ended_s=1001.0, status=RunStatus.REJECTED, result={"gain": -0.01, "reason": "no gain"}
    )
    assert store.runs.list(PAIR) == [ended]


def test_runs_are_listed_oldest_first_pair_by_pair(store: Store) -> None:
    assert store.runs.latest(PAIR) is None
    add_promoted(store, "a0001")
    ids = [store.runs.start(PAIR, parent, {}) for parent in (None, "a0001")]
    other = store.runs.start(OTHER_PAIR, None, {})
    assert [run.id for run in store.runs.list(PAIR)] == ids
    assert [run.parent for run in store.runs.list(PAIR)] == [None, "a0001"]
    latest = store.runs.latest(PAIR)
    assert latest is not None
    assert latest.id == ids[-1]
    assert [run.id for run in store.runs.list(OTHER_PAIR)] == [other]


def test_a_curve_by_step_training_before_validation(store: Store) -> None:
    first, second = (store.runs.start(PAIR, None, {}) for _ in range(2))
    curve = [trained(1), trained(2), validated(2), RunPoint(3, 0.3, 0.1, 1e-4, None, None)]
    for point in (curve[2], curve[0], curve[3], curve[1]):
        store.runs.add_point(first, point)
    store.runs.add_point(second, trained(1))
    assert store.runs.points(first) == curve
    assert store.runs.points(99) == []


def test_a_loss_that_is_no_number_is_none(store: Store) -> None:
    run_id = store.runs.start(PAIR, None, {})
    store.runs.add_point(run_id, RunPoint(1, 0.1, math.nan, 1e-4, None, None))
    assert store.runs.points(run_id) == [RunPoint(1, 0.1, None, 1e-4, None, None)]


def test_a_run_that_goes_on_forgets_what_came_after_its_checkpoint(store: Store) -> None:
    run_id, other = (store.runs.start(PAIR, None, {}) for _ in range(2))
    for step in (1, 2, 3):
        store.runs.add_point(run_id, trained(step))
        store.runs.add_point(run_id, validated(step))
        store.runs.add_point(other, trained(step))
    store.runs.finish(run_id, RunStatus.INTERRUPTED, {})
    store.runs.reopen(run_id, after_step=2)
    run = store.runs.get(run_id)
    assert run is not None
    assert (run.status, run.ended_s) == (RunStatus.RUNNING, None)
    assert store.runs.points(run_id) == [trained(1), validated(1), trained(2), validated(2)]
    assert len(store.runs.points(other)) == 3


def test_a_point_that_comes_again_takes_the_place_of_the_first(store: Store) -> None:
    run_id = store.runs.start(PAIR, None, {})
    store.runs.add_point(run_id, trained(1))
    again = dataclasses.replace(trained(1), loss=0.25)
    store.runs.add_point(run_id, again)
    assert store.runs.points(run_id) == [again]


def test_a_run_that_is_not_there_is_named(store: Store) -> None:
    assert store.runs.get(7) is None
    for call in (
        lambda: store.runs.finish(7, RunStatus.FAILED, {}),
        lambda: store.runs.reopen(7, after_step=0),
    ):
        with pytest.raises(InputError, match="no training run 7"):
            call()


def test_recipes_and_results_are_finite(store: Store) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.runs.start(PAIR, None, {"learning_rate": math.inf})
    assert store.runs.list(PAIR) == []
    run_id = store.runs.start(PAIR, None, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.runs.finish(run_id, RunStatus.FAILED, {"loss": math.nan})
    run = store.runs.get(run_id)
    assert run is not None
    assert run.status is RunStatus.RUNNING
