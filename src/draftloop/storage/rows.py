"""What the tables' modules share: pairs by name, JSON columns, and a damaged row told in our words."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from draftloop.errors import RecordLost

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping

    from draftloop.storage.records import PairKey

PAIR_ID = "(SELECT id FROM pairs WHERE target = ? AND draft = ?)"
"""A pair's id in SQL; NULL, which equals nothing, where the pair is unknown."""


def names(pair: PairKey) -> tuple[str, str]:
    """The parameters of `PAIR_ID`."""
    return pair.target, pair.draft


def ensure_pair(connection: sqlite3.Connection, pair: PairKey) -> int:
    """The id of a pair, which is made known where it was not."""
    connection.execute("INSERT OR IGNORE INTO pairs (target, draft) VALUES (?, ?)", names(pair))
    return int(connection.execute(f"SELECT {PAIR_ID}", names(pair)).fetchone()[0])


def to_json(values: Mapping[str, Any]) -> str:
    """One line of JSON.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value is no plain JSON.
    """
    return json.dumps(values, allow_nan=False, ensure_ascii=True)


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Turn a value that cannot be understood into a StorageError that names `what`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise RecordLost(f"{what} is damaged: {error}", remedy=remedy) from error
