"""The plan of a run: every failure once an epoch, replay at its ratio, the same again for a seed."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from draftloop.learning.batches import plan_batches

RATIOS = st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.8, 0.95]) | st.floats(0, 0.9)
SHAPES = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 5),
        "accumulation_steps": st.integers(1, 5),
        "num_epochs": st.integers(1, 4),
        "replay_ratio": RATIOS,
        "seed": st.integers(0, 2**32),
    }
)
COUNTS = st.integers(1, 40)


def ids_of(step) -> list[int]:
    return [one for microbatch in step for one in microbatch]


def is_replay(one: int) -> bool:
    return one >= 1000


def ratio_of(failures: int, replay: int, shape) -> Fraction:
    """The share of replay: as asked for, or all of it once an epoch."""
    asked = Fraction(shape["replay_ratio"]).limit_denominator(10**6)
    return min(asked, Fraction(replay, replay + failures))


def plan(failures: int, replay: int, **shape):
    return plan_batches(list(range(failures)), list(range(1000, 1000 + replay)), **shape)


@given(COUNTS, COUNTS, SHAPES)
def test_every_epoch_reads_every_failure_once(failures, replay, shape):
    lessons = [one for step in plan(failures, replay, **shape) for one in ids_of(step) if not is_replay(one)]
    epochs = [lessons[i : i + failures] for i in range(0, len(lessons), failures)]
    assert len(epochs) == shape["num_epochs"]
    assert all(sorted(epoch) == list(range(failures)) for epoch in epochs)


def test_every_epoch_has_an_order_of_its_own():
    shape = {"batch_size": 30, "accumulation_steps": 1, "replay_ratio": 0.0, "seed": 3}
    epochs = [ids_of(step) for step in plan(30, 0, num_epochs=3, **shape)]
    assert len({tuple(epoch) for epoch in [*epochs, range(30)]}) == 4


@given(COUNTS, COUNTS, SHAPES)
def test_every_step_holds_the_ratio_to_one_example(failures, replay, shape):
    ratio = ratio_of(failures, replay, shape)
    for step in plan(failures, replay, **shape):
        share = ratio * len(ids_of(step))
        count = sum(is_replay(one) for one in ids_of(step))
        assert math.floor(share) <= count <= math.ceil(share)


@given(COUNTS, COUNTS, SHAPES)
def test_the_run_holds_the_ratio(failures, replay, shape):
    ids = [one for step in plan(failures, replay, **shape) for one in ids_of(step)]
    count = sum(is_replay(one) for one in ids)
    assert abs(count - ratio_of(failures, replay, shape) * len(ids)) <= 0.5


@given(COUNTS, COUNTS, SHAPES, st.floats(0.9, 1, exclude_max=True))
def test_no_epoch_reads_more_replay_than_there_is(failures, replay, shape, ratio):
    assume(Fraction(ratio).limit_denominator(10**6) < 1)
    shape = {**shape, "replay_ratio": ratio}
    ids = [one for step in plan(failures, replay, **shape) for one in ids_of(step)]
    assert len(ids) <= shape["num_epochs"] * (failures + replay)
    read = Counter(one for one in ids if is_replay(one))
    assert max(read.values(), default=0) <= shape["num_epochs"]


@given(COUNTS, COUNTS, SHAPES)
def test_replay_repeats_only_after_all_of_it(failures, replay, shape):
    ids = [one for step in plan(failures, replay, **shape) for one in ids_of(step) if is_replay(one)]
    rounds = [ids[i : i + replay] for i in range(0, len(ids), replay)]
    assert all(max(Counter(one_round).values()) == 1 for one_round in rounds)


@given(COUNTS, st.integers(0, 40), SHAPES)
def test_only_the_end_is_short(failures, replay, shape):
    steps = plan(failures, replay, **shape)
    full = [shape["batch_size"]] * shape["accumulation_steps"]
    assert all([len(batch) for batch in step] == full for step in steps[:-1])
    assert all(batch for step in steps for batch in step)
    *whole, last = steps[-1]
    assert all(len(batch) == shape["batch_size"] for batch in whole)
    assert len(last) <= shape["batch_size"]
    assert not is_replay(last[-1])


@given(COUNTS, SHAPES)
def test_failures_stand_alone_without_replay(failures, shape):
    ids = [one for step in plan(failures, 0, **shape) for one in ids_of(step)]
    assert len(ids) == failures * shape["num_epochs"]


@given(COUNTS, COUNTS, SHAPES)
def test_a_plan_can_be_made_again(failures, replay, shape):
    assert plan(failures, replay, **shape) == plan(failures, replay, **shape)


@given(COUNTS, COUNTS, SHAPES)
def test_replay_does_not_change_the_failures_order(failures, replay, shape):
    def lessons(steps):
        return [one for step in steps for one in ids_of(step) if not is_replay(one)]

    assert lessons(plan(failures, replay, **shape)) == lessons(plan(failures, 0, **shape))


@given(st.integers(10, 40), st.integers(10, 40), SHAPES)
def test_another_seed_is_another_plan(failures, replay, shape):
    assume(shape["seed"] != 7)
    assert plan(failures, replay, **shape) != plan(failures, replay, **{**shape, "seed": 7})


def test_the_guides_batch_of_four_holds_a_fifth_of_replay():
    steps = plan_batches(
        range(40),
        range(1000, 1100),
        batch_size=1,
        accumulation_steps=4,
        num_epochs=1,
        replay_ratio=0.2,
        seed=0,
    )
    assert [sum(map(is_replay, ids_of(step))) for step in steps[:5]] == [1, 1, 0, 1, 1]


def test_failures_and_replay_are_shuffled_each_in_its_own_way():
    shape = {"batch_size": 1, "accumulation_steps": 1, "num_epochs": 1, "replay_ratio": 0.5, "seed": 0}
    ids = [one for step in plan(30, 30, **shape) for one in ids_of(step)]
    replay = [one - 1000 for one in ids if is_replay(one)]
    assert replay != [one for one in ids if not is_replay(one)][: len(replay)]


def test_nothing_to_learn_is_no_step():
    assert plan(0, 10, batch_size=1, accumulation_steps=4, num_epochs=3, replay_ratio=0.2, seed=0) == []


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"accumulation_steps": 0}, {"replay_ratio": 1.0}, {"replay_ratio": -0.1}]
)
def test_impossible_shapes_are_refused(wrong):
    shape = {"batch_size": 1, "accumulation_steps": 1, "num_epochs": 1, "replay_ratio": 0.2, "seed": 0}
    with pytest.raises(ValueError, match=r"must be at least"):
        plan(3, 3, **{**shape, **wrong})
