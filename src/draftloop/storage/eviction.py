"""Keeps the stored requests below their bound.

Contract: replay goes first and untrained failures last, the oldest first in each; pages that become free
are used again, and given back to the disk where they are many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

KEPT_PERCENT = 95
"""How much of the bound is left in use, so that not every answer deletes."""

FREE_PERCENT = 20
"""Free pages above this share of the file are given back."""

RETURNED_PAGES = 256
"""At most so many at a time: an answer waits for it."""


def evict(
    connection: sqlite3.Connection, *, bound_bytes: int, failure_threshold: float, spared_id: int
) -> int:
    """Delete requests until 95 % of the bound are in use, where it is exceeded; how many were deleted.

    Args:
        connection: inside a transaction that writes.
        bound_bytes: of all `stored_bytes` together.
        failure_threshold: a request with a lower acceptance rate is a failure.
        spared_id: never deleted.
    """
    stored_bytes = int(connection.execute("SELECT stored_bytes FROM totals").fetchone()[0])
    if stored_bytes <= bound_bytes:
        return 0
    wanted_bytes = bound_bytes * KEPT_PERCENT // 100
    oldest = connection.execute(
        "SELECT id, stored_bytes FROM requests WHERE id <> ? ORDER BY drafted_tokens > 0 "
        "AND CAST(accepted_tokens AS REAL) / drafted_tokens < ? AND trained_by IS NULL, id",
        (spared_id, failure_threshold),
    )
    condemned = []
    for identity, request_bytes in oldest:
        if stored_bytes <= wanted_bytes:
            break
        condemned.append((identity,))
        stored_bytes -= request_bytes
    oldest.close()
    connection.executemany("DELETE FROM requests WHERE id = ?", condemned)
    return len(condemned)


def return_free_pages(connection: sqlite3.Connection) -> None:
    """Make the file shorter where much of it is unused: after the bound was lowered."""
    free = int(connection.execute("PRAGMA freelist_count").fetchone()[0])
    pages = int(connection.execute("PRAGMA page_count").fetchone()[0])
    if free * 100 > pages * FREE_PERCENT:
        # Python takes one step of this statement, and a step returns one page.
        for _ in range(min(free, RETURNED_PAGES)):
            connection.execute("PRAGMA incremental_vacuum(1)")
