"""Requests that wait: clients take turns, and those of one client keep their order.

Contract: plain data behind somebody else's lock. Must not know threads, models, or why a request is dropped.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from draftloop.server.tickets import Ticket


class FairQueue:
    """Round-robin over clients, first in first out within one."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()
        """The client whose turn it is stands first."""

    def __len__(self) -> int:
        return sum(len(tickets) for tickets in self._waiting.values())

    def __iter__(self) -> Iterator[Ticket]:
        """Whoever waits, client by client."""
        return chain.from_iterable(self._waiting.values())

    def put(self, ticket: Ticket) -> None:
        """Add one at the end of its client's line."""
        self._waiting.setdefault(ticket.job.client, deque()).append(ticket)

    def take(self) -> Ticket | None:
        """The next one, whose client then stands behind the others; None where nobody waits."""
        if not self._waiting:
            return None
        client, tickets = self._waiting.popitem(last=False)
        ticket = tickets.popleft()
        if tickets:
            self._waiting[client] = tickets
        return ticket

    def put_back(self, ticket: Ticket) -> None:
        """Undo `take`: it is the next one again."""
        client = ticket.job.client
        self._waiting.setdefault(client, deque()).appendleft(ticket)
        self._waiting.move_to_end(client, last=False)

    def remove(self, where: Callable[[Ticket], bool]) -> list[Ticket]:
        """Take out every ticket that `where` says yes to; nobody's turn changes."""
        removed: list[Ticket] = []
        for client, tickets in list(self._waiting.items()):
            kept: deque[Ticket] = deque()
            for ticket in tickets:
                (removed if where(ticket) else kept).append(ticket)
            if kept:
                self._waiting[client] = kept
            else:
                del self._waiting[client]
        return removed
