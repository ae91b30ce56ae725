"""Where memory runs out in the midst of a step: the caches as they were, and the same work in smaller parts.

Contract: a step that raised OutOfMemory may have counted tokens that no cache holds; they are trimmed off, so
that it can be made again and gives what it would have given. Must not know what is computed.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from draftloop.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from draftloop.backends.base import Cache

Job = TypeVar("Job")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@contextmanager
def restored(caches: Sequence[Cache]) -> Iterator[None]:
    """Where memory runs out inside, the caches hold afterwards what they held before."""
    positions = [cache.position for cache in caches]
    try:
        yield
    except OutOfMemory:
        for cache, position in zip(caches, positions, strict=True):
            cache.trim(cache.position - position)
        raise


def in_parts(
    work: Callable[[Sequence[Job]], list[Result]], jobs: Sequence[Job], caches: Sequence[Cache]
) -> list[Result | OutOfMemory]:
    """What `work` gives for each job: made together, or where there is no memory for that, in halves.

    Args:
        work: one result a job, the same whoever shares the step.
        jobs: any number.
        caches: the one that each job appends to.

    Returns:
        A result for each, or the error of a job for which there was no memory alone.
    """
    if not jobs:
        return []
    try:
        with restored(caches):
            return [*work(jobs)]
    except OutOfMemory as error:
        if len(jobs) == 1:
            return [error]
        logger.warning("%s for %d texts together; they are taken in parts", error.what, len(jobs))
    # Outside the handler: the error's traceback keeps alive what the step had computed.
    middle = len(jobs) // 2
    return [
        *in_parts(work, jobs[:middle], caches[:middle]),
        *in_parts(work, jobs[middle:], caches[middle:]),
    ]
