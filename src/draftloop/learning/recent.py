"""What the newest stored requests tell about acceptance, for a process that has served none itself.

Contract: reads the store, changes nothing. Must not know how K is chosen.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from draftloop.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftloop.storage.records import PairKey, TraceRows
    from draftloop.storage.store import Store

logger = logging.getLogger(__name__)

SEARCHED_REQUESTS, READ_REQUESTS = 64, 8
"""An answer has dozens of rounds, and what is fed with them forgets after 64 tests of a position."""
_ACCEPTED = 0


def recent_rounds(store: Store, pair: PairKey, adapter: str | None) -> list[list[float]]:
    """For each round in which the draft proposed: 1 or 0 for each tested position, kept or not; oldest first.

    Of the newest requests that the pair answered with this adapter. A kept draft's expectation is alpha, so
    they can stand for alphas. Nothing where the store cannot be read: then nothing is known.
    """
    try:
        newest = store.requests.list(pair, newest=SEARCHED_REQUESTS)
        drafted = [one.id for one in newest if one.adapter == adapter and one.drafted_tokens]
        records = store.requests.load(drafted[-READ_REQUESTS:])
    except StorageError as error:
        logger.debug("past acceptance is not known: %s", error)
        return []
    return [tested for record in records for tested in tested_positions(record.traces)]


def tested_positions(traces: TraceRows) -> Iterator[list[float]]:
    """The rounds of one answer, as `recent_rounds` has them; those without a draft are left out."""
    starts = np.flatnonzero(np.diff(traces.round_index, prepend=-1))
    for rows in np.split(np.arange(len(traces.round_index)), starts[1:]):
        tested = rows[traces.draft_ids[rows] >= 0]
        if len(tested):
            yield (traces.kinds[tested] == _ACCEPTED).astype(float).tolist()
