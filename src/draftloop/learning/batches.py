"""Which examples each optimizer step reads, planned for the whole run before it begins.

Contract: a pure function of ids, settings and a seed. The same arguments give the same plan, so a run that
was stopped after k steps goes on with `plan[k:]`. Must not know what an example holds.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from draftloop.config.schema import TrainingSettings

Step = tuple[tuple[int, ...], ...]
"""The microbatches of one optimizer step, each a few example ids."""

_FAILURES, _REPLAY = range(2)
_FINEST_RATIO = 10**6


def plan_batches(
    failures: Sequence[int],
    replay: Sequence[int],
    *,
    batch_size: int,
    accumulation_steps: int,
    num_epochs: int,
    replay_ratio: float,
    seed: int,
) -> list[Step]:
    """Every step of a run, in order.

    Each epoch reads every failure once, in an order of its own. Between them, replay is spread as evenly
    as whole examples allow (error diffusion, as a line is drawn on a grid): any n examples in a row, so
    every step too, hold floor or ceil of ratio · n of it, and the run holds the ratio within half an example.
    The ratio is replay_ratio, but less where an epoch would read more replay than there is: no request that
    went well is read more often than a failure, and a ratio near 1 plans no more than all that is stored in
    each epoch. Replay repeats only after all of it was read. The plan ends with the last failure, so the last
    step may be short. The failures' order does not depend on the replay.

    Args:
        failures: ids; without any there is nothing to learn, and no step.
        replay: ids; without any the failures stand alone.
        batch_size: examples in a microbatch.
        accumulation_steps: microbatches in a step.
        num_epochs: passes over the failures.
        replay_ratio: share of replay among all examples, 0 <= ratio < 1; as close to a fraction of
            millionths as it is.
        seed: of both orders.

    Raises:
        ValueError: a size below 1, or a ratio outside its range.
    """
    if min(batch_size, accumulation_steps, num_epochs) < 1:
        raise ValueError(f"sizes {batch_size}, {accumulation_steps}, {num_epochs} must be at least 1")
    ratio = Fraction(replay_ratio).limit_denominator(_FINEST_RATIO)
    if not 0 <= ratio < 1:
        raise ValueError(f"replay_ratio {replay_ratio} must be at least 0 and below 1")
    lessons = islice(_shuffled(failures, seed, _FAILURES), num_epochs * len(failures))
    others = _shuffled(replay, seed, _REPLAY)
    stored = Fraction(len(replay), max(1, len(replay) + len(failures)))
    examples = _interleave(lessons, others, min(ratio, stored))
    steps: list[Step] = []
    while step := tuple(_microbatches(examples, batch_size, accumulation_steps)):
        steps.append(step)
    return steps


def planned_steps(failures: Sequence[int], replay: Sequence[int], training: TrainingSettings) -> list[Step]:
    """`plan_batches` as `training.*` has it."""
    return plan_batches(
        failures,
        replay,
        batch_size=training.batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        num_epochs=training.num_epochs,
        replay_ratio=training.replay_ratio,
        seed=training.seed,
    )


def _shuffled(ids: Sequence[int], seed: int, stream: int) -> Iterator[int]:
    """The ids in one random order after the other, without end."""
    random = np.random.Generator(np.random.PCG64([seed, stream]))
    while ids:
        for index in random.permutation(len(ids)):
            yield ids[index]


def _interleave(lessons: Iterator[int], replay: Iterator[int], ratio: Fraction) -> Iterator[int]:
    """The lessons with replay between them: of the first n examples, floor(ratio · n + 1/2) are replay."""
    share, whole = ratio.numerator, ratio.denominator
    count = replayed = 0
    for lesson in lessons:
        count += 1
        while 2 * share * count + whole >= 2 * whole * (replayed + 1):
            yield next(replay)
            replayed += 1
            count += 1
        yield lesson


def _microbatches(examples: Iterator[int], batch_size: int, count: int) -> Iterator[tuple[int, ...]]:
    for _ in range(count):
        if batch := tuple(islice(examples, batch_size)):
            yield batch
