"""A list of requests answered together, as far as there is room.

Contract: each answer is the one that it would be alone; they end in any order. Must not know what is asked or
what becomes of the answers.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from draftloop.batch import Batch
    from draftloop.engine import Completion, Engine, Request
    from draftloop.member import Member
    from draftloop.speculation.stream import Conversation


def answer_together(
    engine: Engine,
    requests: Sequence[Request],
    *,
    most: int | None = None,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Generator[tuple[int, Completion], None, None]:
    """Answer them all.

    Args:
        engine: whose.
        requests: any number.
        most: answers at a time; None is what the memory plan has room for.
        stop_wanted: where it says yes no other one is begun.

    Yields:
        The request's index and its answer, as each ends.

    Raises:
        DraftloopError: one could not be made; those that are on their way are broken off.
    """
    from draftloop.answers import Completion, Failed, PutOff

    waiting = deque(enumerate(requests))
    asked: dict[Member, int] = {}
    # Used again: what the prompts begin with alike, the system message above all, is read once in each.
    conversations: list[Conversation] = []
    with engine.batch(most, whole_prompts=True) as batch:
        while batch.members or (waiting and not stop_wanted()):
            while waiting and batch.places and not stop_wanted():
                index, request = waiting[0]
                member = _joined(batch, request, conversations.pop() if conversations else None)
                if member is not None:
                    asked[member] = index
                    waiting.popleft()
            for member, event in batch.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, PutOff):
                    index = asked.pop(member)
                    waiting.appendleft((index, requests[index]))
                if isinstance(event, Completion):
                    conversations.append(member.stream.conversation)
                    yield asked.pop(member), event


def _joined(batch: Batch, request: Request, conversation: Conversation | None) -> Member | None:
    """None where there is no memory for it beside the others."""
    from draftloop.errors import OutOfMemory

    try:
        return batch.join(request, conversation)
    except OutOfMemory:
        if not batch.members:
            raise
        return None
