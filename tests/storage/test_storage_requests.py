"""Requests go in and come out; what is asked of them."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_samples import OTHER_PAIR, PAIR, add_promoted, assert_same, make_request

from draftloop.errors import StorageError
from draftloop.storage.records import PairKey
from draftloop.storage.store import open_store
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from draftloop.storage.store import Store

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
COUNT = st.integers(0, 2**40)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path, max_megabytes=10) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with open_store(tmp_path_factory.mktemp("store"), max_megabytes=100) as opened:
        yield opened


@given(
    changed=st.fixed_dictionaries(
        {
            "created_s": FLOAT,
            "adapter": st.none() | TEXT,
            "domain": TEXT,
            "source": TEXT,
            "key": st.none() | TEXT,
            "split_key": TEXT,
            "sampling": st.builds(Sampling, FLOAT, FLOAT, COUNT, FLOAT),
            "min_tokens": COUNT,
            "num_draft_tokens": COUNT,
            "seed": st.integers(0, 2**130),
            "finish_reason": TEXT,
            "rounds": COUNT,
            "drafted_tokens": COUNT,
            "accepted_tokens": COUNT,
            "tested_tokens": COUNT,
            "alpha_sum": FLOAT,
            "prompt_s": FLOAT,
            "decode_s": FLOAT,
            "suffix_rounds": COUNT,
            "suffix_tokens": COUNT,
            "suffix_drafted_tokens": COUNT,
            "suffix_accepted_tokens": COUNT,
            "suffix_s": FLOAT,
        }
    ),
    rows=st.integers(0, 6),
    prompt=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_a_request_comes_back_as_it_was(shared_store, changed, rows, prompt) -> None:
    before = make_request(rows=rows, prompt=prompt, **changed)
    assert_same(shared_store.requests.load([shared_store.requests.add(before)])[0], before)


def test_it_is_there_after_the_store_was_closed(tmp_path: Path) -> None:
    before = make_request()
    with open_store(tmp_path, max_megabytes=10) as store:
        identity = store.requests.add(before)
    with open_store(tmp_path, max_megabytes=10) as store:
        assert_same(store.requests.load([identity])[0], before)


def test_numpy_numbers_are_stored_too(store: Store) -> None:
    before = make_request(
        alpha_sum=np.float32(1.5),  # type: ignore[arg-type]
        accepted_tokens=np.int64(2),  # type: ignore[arg-type]
        seed=np.int64(7),  # type: ignore[arg-type]
    )
    assert_same(store.requests.load([store.requests.add(before)])[0], before)


def test_a_summary_tells_what_was_stored(store: Store) -> None:
    record = make_request(rows=6, prompt=9, adapter="a0001")
    identity = store.requests.add(record)
    (summary,) = store.requests.list(PAIR)
    assert (summary.id, summary.num_prompt_tokens, summary.num_answer_tokens) == (identity, 9, 6)
    assert summary.trained_by is None
    assert summary.held_out in (True, False)
    assert isinstance(summary.held_out, bool)
    assert summary.temperature == 0.7
    same = "created_s adapter domain source num_draft_tokens rounds drafted_tokens accepted_tokens "
    same += "tested_tokens alpha_sum prompt_s decode_s"
    for name in same.split():
        assert getattr(summary, name) == getattr(record, name), name


def test_requests_are_listed_oldest_first_pair_by_pair(store: Store) -> None:
    ids = [store.requests.add(make_request(seed=seed)) for seed in range(5)]
    other = store.requests.add(make_request(pair=OTHER_PAIR))

    def listed(**options: int | None) -> list[int]:
        return [one.id for one in store.requests.list(PAIR, **options)]

    assert listed() == ids
    assert listed(since_id=ids[1]) == ids[2:]
    assert listed(newest=2) == ids[3:]
    assert listed(newest=0) == []
    assert listed(since_id=ids[2], newest=1) == ids[4:]
    assert listed(before_id=ids[3], newest=2) == ids[1:3]
    assert listed(since_id=ids[0], before_id=ids[2]) == ids[1:2]
    assert [one.id for one in store.requests.list(OTHER_PAIR)] == [other]
    assert store.requests.pairs() == {OTHER_PAIR: 1, PAIR: 5}
    assert store.requests.count() == 6


def test_requests_are_loaded_in_the_order_asked(store: Store) -> None:
    ids = [store.requests.add(make_request(seed=seed)) for seed in range(3)]
    asked = [ids[2], ids[0], ids[0], ids[1]]
    assert [one.seed for one in store.requests.load(asked)] == [2, 0, 0, 1]
    assert store.requests.load([]) == []


def test_a_request_that_is_gone_is_named(store: Store) -> None:
    with pytest.raises(StorageError, match="request 17 is not stored any more"):
        store.requests.load([17])


def test_the_keys_of_collected_prompts(store: Store) -> None:
    for seed, key in enumerate(["one", None, "two", "one"]):
        store.requests.add(make_request(seed=seed, key=key))
    store.requests.add(make_request(key="other", pair=OTHER_PAIR))
    assert store.requests.collected_keys(PAIR) == {"one", "two"}


def test_who_learnt_from_a_request_first_keeps_it(store: Store) -> None:
    ids = [store.requests.add(make_request(seed=seed)) for seed in range(3)]
    add_promoted(store, "a0001", "a0002")
    store.requests.mark_trained(ids[:2], "a0001")
    store.requests.mark_trained([*ids[1:], 999], "a0002")

    def trained_by() -> list[str | None]:
        return [one.trained_by for one in store.requests.list(PAIR)]

    assert trained_by() == ["a0001", "a0001", "a0002"]
    store.requests.mark_untrained("a0001")
    assert trained_by() == [None, None, "a0002"]


def test_a_request_whose_arrays_do_not_belong_together_is_not_stored(store: Store) -> None:
    wrong = make_request(rows=3, answer_tokens=np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="round_index"):
        store.requests.add(wrong)
    assert store.requests.count() == 0


@pytest.mark.parametrize("field", ["domain", "split_key", "key"])
def test_text_that_is_no_unicode_is_told_and_leaves_nothing(store: Store, field: str) -> None:
    with pytest.raises(StorageError, match="no valid Unicode"):
        store.requests.add(make_request(**{field: "\ud800"}))
    assert store.requests.count() == 0
    assert store.requests.pairs() == {}


@pytest.mark.parametrize("sql", ["SET body = substr(body, 1, 99)", "SET body = x''", "SET body = 'text'"])
def test_a_damaged_request_is_named_and_the_others_are_read(store: Store, sql: str) -> None:
    ids = [store.requests.add(make_request(seed=seed)) for seed in range(2)]
    with sqlite3.connect(store.path) as connection:
        connection.execute(f"UPDATE contents {sql} WHERE request_id = ?", (ids[0],))
    connection.close()
    with pytest.raises(StorageError, match=f"request {ids[0]} is damaged"):
        store.requests.load(ids)
    assert store.requests.load(ids[1:])[0].seed == 1


@pytest.mark.parametrize(
    ("max_tokens", "seeds"), [(0, []), (3, []), (4, [3]), (8, [3]), (9, [1, 3]), (99, [0, 1, 3])]
)
def test_the_newest_answers_that_fit_come_oldest_first(
    store: Store, max_tokens: int, seeds: list[int]
) -> None:
    """Of one target, whoever drafted."""
    rows = {0: 2, 1: 5, 2: 1, 3: 4}
    pairs = {1: OTHER_PAIR, 2: PairKey("org/another-target", PAIR.draft)}
    for seed, length in rows.items():
        store.requests.add(make_request(seed=seed, rows=length, pair=pairs.get(seed, PAIR)))
    answers = store.requests.recent_answers(PAIR.target, max_tokens)
    expected = [make_request(seed=seed, rows=rows[seed]).answer_tokens for seed in seeds]
    assert [answer.tolist() for answer in answers] == [answer.tolist() for answer in expected]
