"""What a run reads of the store: a lost request is left out, a store that fails is told of."""

from __future__ import annotations

import sqlite3

import pytest

from draftloop.errors import StorageError
from draftloop.learning.selection import load_examples
from draftloop.storage.store import DATABASE_NAME


def test_lost_requests_are_left_out_and_a_broken_store_is_told(classroom):
    limits = {"max_sequence_tokens": 64, "eos_token_ids": ()}
    with classroom.store() as store:
        first, second, *_ = (one.id for one in store.requests.list(classroom.pair))
        with sqlite3.connect(classroom.data / DATABASE_NAME) as connection:
            connection.execute("UPDATE contents SET body = x'00' WHERE request_id = ?", (first,))
        connection.close()
        assert list(load_examples(store, [first, second, 10**6], **limits)) == [second]
    with classroom.store() as store:
        with sqlite3.connect(classroom.data / DATABASE_NAME) as connection:
            connection.execute("DROP TABLE contents")
        connection.close()
        with pytest.raises(StorageError):
            load_examples(store, [second], **limits)
