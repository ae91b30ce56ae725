"""Every contender on every prompt, one prompt at a time, so that a machine's mood falls on all alike.

Contract: the order rotates from prompt to prompt, and each contender warms up once. Must not know what a
contender is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from draftloop.benchmarking.contenders import Answer, Contender, Job

WARM_UP_TOKENS = 8


def order_of(contenders: Sequence[Contender], index: int) -> list[Contender]:
    """Who decodes prompt `index` first, second, …: everyone goes first equally often."""
    first = index % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def interleave(
    contenders: Sequence[Contender], jobs: Sequence[Job], answered: Callable[[str, Answer], None]
) -> Iterator[Mapping[str, Answer]]:
    """Decode all jobs with all contenders.

    Args:
        contenders: at least one.
        jobs: at least one.
        answered: is told of each answer.

    Yields:
        For each job, in order, the answers by contender's name, in the contenders' order.
    """
    warm_up = replace(jobs[0], max_tokens=min(WARM_UP_TOKENS, jobs[0].max_tokens), warm_up=True)
    for contender in contenders:
        contender.answer(warm_up)
    for index, job in enumerate(jobs):
        answers = {}
        for contender in order_of(contenders, index):
            answers[contender.name] = contender.answer(job)
            answered(contender.name, answers[contender.name])
        yield {contender.name: answers[contender.name] for contender in contenders}
