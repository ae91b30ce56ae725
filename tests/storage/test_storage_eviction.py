"""The bound on the stored requests, who goes first, and what the file makes of it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from storage_samples import OTHER_PAIR, PAIR, add_promoted, failure, make_request, replay

from draftloop.errors import StorageError
from draftloop.storage.requests import ROW_BYTES
from draftloop.storage.store import open_store

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.storage.records import RequestRecord
    from draftloop.storage.store import Store

ROWS = 436
"""With 4 prompt tokens, ten such requests fit into 95 % of a megabyte and eleven into no megabyte."""
BOUND = 1_000_000


def add(store: Store, record: RequestRecord, rows: int = ROWS) -> int:
    """Store a request of that kind and a tenth of the bound."""
    sized = make_request(rows=rows, seed=record.seed)
    return store.requests.add(
        make_request(
            rows=rows,
            seed=record.seed,
            pair=record.pair,
            drafted_tokens=record.drafted_tokens,
            accepted_tokens=record.accepted_tokens,
            traces=sized.traces,
        )
    )


def kept(store: Store) -> list[int]:
    return [one.id for pair in store.requests.pairs() for one in store.requests.list(pair)]


def test_the_oldest_replay_goes_first_and_untrained_failures_last(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1) as store:
        trained, fresh = (add(store, failure(seed)) for seed in (0, 1))
        good = [add(store, replay(seed)) for seed in (2, 3)]
        undrafted = add(store, make_request(seed=4, drafted_tokens=0, accepted_tokens=0))
        add_promoted(store, "a0001")
        store.requests.mark_trained([trained], "a0001")
        at_threshold = add(store, make_request(seed=5, accepted_tokens=4))
        later = [add(store, failure(seed)) for seed in range(6, 10)]
        assert len(kept(store)) == 10
        order = [trained, *good, undrafted, at_threshold, fresh, *later]
        for gone, seed in enumerate(range(10, 20), start=1):
            newest = add(store, failure(seed))
            assert set(order) - set(kept(store)) == set(order[:gone]), gone
            assert newest in kept(store)


def test_the_threshold_says_what_a_failure_is(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1, failure_threshold=0.2) as store:
        first = add(store, failure(0))
        for seed in range(1, 11):
            add(store, make_request(seed=seed, accepted_tokens=1))
        assert first not in kept(store)
        assert len(kept(store)) == 10


def test_other_pairs_count_too(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1) as store:
        first = add(store, failure(0, pair=OTHER_PAIR))
        for seed in range(1, 11):
            add(store, failure(seed))
        assert first not in kept(store)
        assert store.requests.pairs()[OTHER_PAIR] == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_after_every_request(tmp_path: Path, seed: int) -> None:
    sizes = random.Random(seed)
    with open_store(tmp_path, max_megabytes=1) as store:
        for number in range(60):
            identity = add(store, failure(number), rows=sizes.choice([1, 50, 500, 4000]))
            listed = store.requests.list(PAIR)
            total = sum(one.stored_bytes for one in listed)
            assert total == store.requests.stored_bytes() <= BOUND
            assert listed[-1].id == identity


def test_no_more_than_a_twentieth_and_one_request_go_at_once(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1) as store:
        lowest_bytes = BOUND
        for number in range(500):
            add(store, failure(number), rows=10)
            if number > 360:
                lowest_bytes = min(lowest_bytes, store.requests.stored_bytes())
        assert store.requests.count() < 370
        assert BOUND * 0.945 < lowest_bytes <= BOUND * 0.95


def test_a_request_larger_than_the_bound_is_refused_and_costs_no_other(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1) as store:
        first = add(store, failure(0))
        with pytest.raises(StorageError, match=r"storage\.max_megabytes = 1 "):
            add(store, failure(1), rows=5000)
        assert kept(store) == [first]


def test_a_request_that_fills_the_bound_by_itself_is_kept_alone(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1) as store:
        add(store, failure(0))
        alone = add(store, failure(1), rows=4680)
        assert kept(store) == [alone]
        assert BOUND * 0.95 < store.requests.stored_bytes() <= BOUND


def test_a_freed_page_is_used_again(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1) as store:
        sizes = []
        for number in range(300):
            add(store, failure(number), rows=90)
            sizes.append(store.path.stat().st_size)
        log = store.path.with_name(store.path.name + "-wal")
        assert log.stat().st_size < 17 << 20
    assert max(sizes) < 1.3 * BOUND + 200_000
    assert store.path.stat().st_size < 1.3 * BOUND + 200_000


def test_small_requests_do_not_outgrow_the_bound_either(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1) as store:
        for number in range(1800):
            store.requests.add(make_request(rows=1, seed=number))
        assert store.requests.count() < 1500
    assert store.path.stat().st_size < 1.3 * BOUND + 200_000


def test_a_lower_bound_gives_the_disk_its_room_back(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=20) as store:
        for number in range(90):
            add(store, failure(number), rows=1000)
    assert store.path.stat().st_size > 18_000_000
    with open_store(tmp_path, max_megabytes=2) as store:
        for number in range(20):
            add(store, failure(number), rows=10)
        assert store.requests.stored_bytes() < 2_000_000
    assert store.path.stat().st_size < 1.3 * 2_000_000 + 200_000


def test_a_row_counts(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1) as store:
        store.requests.add(make_request(rows=0, prompt=0))
        assert store.requests.stored_bytes() == ROW_BYTES + 14
