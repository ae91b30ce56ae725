"""What stored requests tell a new process about acceptance."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from storage_samples import PAIR, make_request

from draftloop.learning import recent
from draftloop.learning.recent import READ_REQUESTS, recent_rounds
from draftloop.speculation.costs import RoundCosts
from draftloop.speculation.schedule import Schedule
from draftloop.storage.records import PairKey, TraceRows
from draftloop.storage.store import DATABASE_NAME, open_store

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.storage.store import Store

ACCEPTED, RECOVERED, BONUS, TARGET = range(4)
COSTS = RoundCosts(((1, 0.05), (2, 0.055), (3, 0.06), (4, 0.065), (5, 0.07)), 0.02, 0.0, 0.002)


def traces(*rounds: tuple[tuple[int, int], ...]) -> TraceRows:
    """Each row is (kind, drafted token or -1)."""
    rows = [row for one in rounds for row in one]
    return TraceRows(
        round_index=np.repeat(np.arange(len(rounds)), [len(one) for one in rounds]).astype(np.int32),
        kinds=np.array([kind for kind, _ in rows], np.uint8),
        draft_ids=np.array([drafted for _, drafted in rows], np.int32),
        draft_probs=np.ones(len(rows), np.float32),
        top_ids=np.zeros((len(rows), 32), np.int32),
        top_logprobs=np.zeros((len(rows), 32), np.float32),
        tail_mass=np.zeros(len(rows), np.float32),
    )


def test_kept_and_rejected_drafts_are_told_by_round():
    found = recent.tested_positions(
        traces(
            ((ACCEPTED, 5), (ACCEPTED, 6), (BONUS, -1)),
            ((TARGET, -1),),
            ((RECOVERED, 9),),
            ((ACCEPTED, 5), (RECOVERED, 7)),
        )
    )
    assert list(found) == [[1.0, 1.0], [0.0], [1.0, 0.0]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with open_store(tmp_path / "data", max_megabytes=10) as opened:
        yield opened


def serve(store: Store, kept: bool, count: int, adapter: str | None = None) -> None:
    rows = traces(*([((ACCEPTED, 5), (BONUS, -1))] if kept else [((RECOVERED, 5),)]))
    for seed in range(count):
        record = make_request(rows=len(rows.kinds), seed=seed)
        store.requests.add(replace(record, pair=PAIR, adapter=adapter, traces=rows))


def test_only_the_newest_with_the_same_adapter_count(store):
    assert recent_rounds(store, PAIR, None) == []
    serve(store, False, 5)
    serve(store, True, READ_REQUESTS)
    serve(store, False, 3, adapter="a0001")
    assert recent_rounds(store, PAIR, None) == [[1.0]] * READ_REQUESTS
    assert recent_rounds(store, PAIR, "a0001") == [[0.0]] * 3
    assert recent_rounds(store, PAIR, "a0002") == []
    assert recent_rounds(store, PairKey("org/target", "org/another"), None) == []


def test_a_store_that_cannot_be_read_tells_nothing(store, tmp_path):
    serve(store, True, 3)
    with closing(sqlite3.connect(tmp_path / "data" / DATABASE_NAME)) as connection, connection:
        connection.execute("UPDATE contents SET body = x'00'")
    assert recent_rounds(store, PAIR, None) == []


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_new_process_begins_where_the_last_one_was(alpha):
    """An answer from a given seed does not."""
    used, begun = Schedule(COSTS), Schedule(COSTS)
    rounds = [[alpha] * 4] * 20
    for one in rounds:
        used.acceptance.observe(one)
    before = Schedule(COSTS).open(4).choose(4, 0, 100)
    begun.recall(rounds)
    assert begun.open(4).choose(4, 0, 100) == used.open(4).choose(4, 0, 100) != before
    assert begun.open(4, repeatable=True).choose(4, 0, 100) == before
    assert begun.open(4).reads_along(20, 100) == (alpha == 1.0)
