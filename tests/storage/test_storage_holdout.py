"""A fifth of each domain is held out, and stays so."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import OTHER_PAIR, PAIR, make_request

from draftloop.storage.holdout import BLOCK, is_held_out
from draftloop.storage.store import open_store

if TYPE_CHECKING:
    from draftloop.storage.store import Store

TRAFFIC = st.lists(
    st.tuples(
        st.sampled_from([PAIR, OTHER_PAIR]), st.sampled_from(["law", "code"]), st.integers(0, 25).map(str)
    ),
    max_size=60,
)


def sides(store: Store, traffic: list[tuple]) -> list[bool]:
    """On which side each request of the traffic came."""
    for pair, domain, split_key in traffic:
        store.requests.add(make_request(rows=1, pair=pair, domain=domain, split_key=split_key))
    listed = {one.id: one.held_out for pair in (PAIR, OTHER_PAIR) for one in store.requests.list(pair)}
    return [listed[identity] for identity in sorted(listed)]


@given(TRAFFIC, st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_the_rule(traffic: list[tuple], reopened_at: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with open_store(Path(folder), max_megabytes=10) as store:
            sides(store, traffic[:reopened_at])
        with open_store(Path(folder), max_megabytes=10) as store:
            given_sides = sides(store, traffic[reopened_at:])
    side_of_key = {}
    new_keys = defaultdict(list)
    for (pair, domain, split_key), side in zip(traffic, given_sides, strict=True):
        if (pair, split_key) not in side_of_key:
            side_of_key[pair, split_key] = side
            new_keys[pair, domain].append(side)
        assert side_of_key[pair, split_key] == side
    for new in new_keys.values():
        blocks = [new[start : start + BLOCK] for start in range(0, len(new), BLOCK)]
        assert all(sum(block) == 1 for block in blocks if len(block) == BLOCK)
        assert all(sum(block) <= 1 for block in blocks)


def test_the_place_in_a_block_has_no_pattern() -> None:
    places = [
        next(place for place in range(BLOCK) if is_held_out(PAIR, "law", block * BLOCK + place))
        for block in range(500)
    ]
    counts = [places.count(place) for place in range(BLOCK)]
    # A uniform choice keeps each within 5 standard deviations (9 each) of 100.
    assert all(55 < count < 145 for count in counts)
    others = [
        next(place for place in range(BLOCK) if is_held_out(OTHER_PAIR, "law", block * BLOCK + place))
        for block in range(500)
    ]
    assert places != others


def test_eviction_changes_no_side(tmp_path: Path) -> None:
    traffic = [(PAIR, "law", str(number)) for number in range(60)]
    with open_store(tmp_path / "roomy", max_megabytes=10) as store:
        expected = dict(zip(range(60), sides(store, traffic), strict=True))
    with open_store(tmp_path / "narrow", max_megabytes=1) as store:

        def side(number: int) -> bool:
            identity = store.requests.add(make_request(rows=1000, split_key=str(number)))
            (newest,) = store.requests.list(PAIR, newest=1)
            assert newest.id == identity
            return newest.held_out

        assert {number: side(number) for number in range(60)} == expected
        assert store.requests.count() < 6
        # Their requests are gone: whoever was trained on must not come back as held out.
        assert {number: side(number) for number in range(60)} == expected
