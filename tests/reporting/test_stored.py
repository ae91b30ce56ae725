"""Reading the store for the report, while others write to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from draftloop.errors import StorageError
from draftloop.reporting.stored import TRACED_REQUESTS, read_stored
from draftloop.storage.records import PairKey
from draftloop.storage.store import Store, open_store
from reporting.sample import PAIR, sample_requests, write_store

if TYPE_CHECKING:
    from pathlib import Path


def test_everything_of_one_pair_is_read(filled_directory: Path) -> None:
    with open_store(filled_directory, max_megabytes=1000, read_only=True) as store:
        stored = read_stored(store, PAIR)
        other = read_stored(store, PairKey("other", "pair"))
    assert len(stored.requests) == 400
    assert [one.adapter for one in stored.history] == ["a0001", "a0003", "a0001"]
    assert [run.id for run in stored.runs] == [3, 2, 1]
    assert [len(stored.points[run.id]) for run in stored.runs] == [127, 127, 127]
    assert stored.mistakes.requests == min(388, TRACED_REQUESTS)
    assert stored.active == "a0001"
    assert (other.requests, other.active, other.runs, other.other_pairs) == ([], None, [], {PAIR: 400})


def remember_one_more(store: Store, monkeypatch: pytest.MonkeyPatch, *, still_listed: bool) -> None:
    """The first listing also has a request that cannot be loaded; later ones have it where `still_listed`."""
    really_list = store.requests.list
    last = really_list(PAIR)[-1]
    gone = type(last)(**{name: getattr(last, name) for name in last.__slots__} | {"id": last.id + 1})
    listings = []

    def list_(pair: PairKey, **options: int) -> list[object]:
        listings.append(pair)
        return [*really_list(pair, **options), *([gone] if still_listed or len(listings) == 1 else [])]

    monkeypatch.setattr(store.requests, "list", list_)


def test_a_request_that_is_evicted_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path, sample_requests(20))
    with open_store(tmp_path, max_megabytes=1, read_only=True) as store:
        remember_one_more(store, monkeypatch, still_listed=False)
        stored = read_stored(store, PAIR)
    assert len(stored.requests) == 21
    assert stored.mistakes.requests == 8


def test_a_request_that_is_there_and_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path, sample_requests(20))
    with open_store(tmp_path, max_megabytes=1, read_only=True) as store:
        remember_one_more(store, monkeypatch, still_listed=True)
        with pytest.raises(StorageError):
            read_stored(store, PAIR)
