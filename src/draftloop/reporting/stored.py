"""Everything that a report tells of, read from the store once.

Contract: reads one pair, with a bounded part of its traces; changes nothing. Must not know how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.errors import StorageError
from draftloop.reporting.figures import drafted_of
from draftloop.reporting.mistakes import Mistakes, count_mistakes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from draftloop.storage.records import (
        Activation,
        AdapterRecord,
        PairKey,
        RequestRecord,
        RequestSummary,
        RunPoint,
        RunRecord,
    )
    from draftloop.storage.store import Store

TRACED_REQUESTS = 500
"""Requests whose traces are read: the newest with drafts."""
MOST_MISTAKES = 20
MOST_RUNS = 12


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store holds of one pair.

    Attributes:
        pair: the two models.
        requests: oldest first.
        drafted: those of them with drafts.
        adapters: oldest first.
        active: name of the active one; None is the bare draft.
        history: every activation, oldest first.
        runs: the newest `MOST_RUNS`, newest first.
        num_runs: all of them.
        points: the training curves of `runs`, by run id.
        mistakes: of the newest requests.
        other_pairs: pairs that the store has requests of, with their number.
    """

    pair: PairKey
    requests: Sequence[RequestSummary]
    drafted: Sequence[RequestSummary]
    adapters: Sequence[AdapterRecord]
    active: str | None
    history: Sequence[Activation]
    runs: Sequence[RunRecord]
    num_runs: int
    points: Mapping[int, Sequence[RunPoint]]
    mistakes: Mistakes
    other_pairs: Mapping[PairKey, int]


def read_stored(store: Store, pair: PairKey) -> Stored:
    """Read it.

    Raises:
        StorageError: the database is damaged or cannot be read.
    """
    requests = store.requests.list(pair)
    drafted = drafted_of(requests)
    active = store.adapters.active(pair)
    runs = sorted(store.runs.list(pair), key=lambda run: run.id, reverse=True)
    newest = runs[:MOST_RUNS]
    traced = [one.id for one in drafted[-TRACED_REQUESTS:]]
    return Stored(
        pair=pair,
        requests=requests,
        drafted=drafted,
        adapters=store.adapters.list(pair),
        active=None if active is None else active.name,
        history=store.adapters.history(pair),
        runs=newest,
        num_runs=len(runs),
        points={run.id: store.runs.points(run.id) for run in newest},
        mistakes=count_mistakes(_loaded(store, pair, traced), most=MOST_MISTAKES),
        other_pairs={other: count for other, count in store.requests.pairs().items() if other != pair},
    )


def _loaded(store: Store, pair: PairKey, ids: Sequence[int]) -> Iterator[RequestRecord]:
    """One at a time, because all the traces together may be large; those evicted meanwhile are left out."""
    for identity in ids:
        try:
            yield from store.requests.load([identity])
        except StorageError:
            if any(one.id == identity for one in store.requests.list(pair, since_id=identity - 1)):
                raise
