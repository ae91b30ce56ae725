"""Requests with their traces.

Contract: a request is stored whole or not at all; the side of the held-out split is decided when it comes;
all requests together stay below a bound. Must not know what is done with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from draftloop.errors import RecordLost, StorageError
from draftloop.storage.eviction import evict, return_free_pages
from draftloop.storage.holdout import choose_side
from draftloop.storage.packing import Contents, pack, unpack
from draftloop.storage.records import PairKey, RequestRecord, RequestSummary
from draftloop.storage.rows import PAIR_ID, ensure_pair, names, reading
from draftloop.types import Sampling

if TYPE_CHECKING:
    import builtins
    import sqlite3
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from draftloop.storage.database import Database

ROW_BYTES = 512
"""What a request takes beside its arrays: its row, its place in the indexes, its split key."""

MEGABYTE = 1_000_000

LARGEST_ID = 2**63 - 1
"""Of an INTEGER in SQLite; no request comes so far."""

_SUMMARY = ", ".join(RequestSummary.__slots__)
_HELD_OUT = RequestSummary.__slots__.index("held_out")
_SCALARS = (
    "created_s",
    "adapter",
    "domain",
    "source",
    "key",
    "split_key",
    "min_tokens",
    "num_draft_tokens",
    "finish_reason",
    "rounds",
    "drafted_tokens",
    "accepted_tokens",
    "tested_tokens",
    "alpha_sum",
    "prompt_s",
    "decode_s",
    "suffix_rounds",
    "suffix_tokens",
    "suffix_drafted_tokens",
    "suffix_accepted_tokens",
    "suffix_s",
    "vocabulary",
)
"""Fields of a record that are a column as they are."""
_SAMPLING = Sampling.__slots__
_COLUMNS = (
    *_SCALARS,
    *_SAMPLING,
    *("pair_id", "held_out", "num_prompt_tokens", "num_answer_tokens", "seed", "stored_bytes"),
)
_INSERT = (
    f"INSERT INTO requests ({', '.join(_COLUMNS)}) VALUES ({', '.join(f':{name}' for name in _COLUMNS)})"  # noqa: S608
)
_LOAD = (
    f"SELECT target, draft, body, seed, {', '.join((*_SCALARS, *_SAMPLING))} FROM requests "  # noqa: S608
    "JOIN pairs ON pairs.id = pair_id JOIN contents ON request_id = requests.id WHERE requests.id = ?"
)


class Requests:
    """The requests of a store.

    Args:
        database: where they are.
        max_megabytes: the bound on all of them, in millions of bytes.
        failure_threshold: a request with a lower acceptance rate is a failure, to be evicted last.
    """

    def __init__(self, database: Database, *, max_megabytes: int, failure_threshold: float) -> None:
        self._database = database
        self._bound_bytes = max_megabytes * MEGABYTE
        self.failure_threshold = failure_threshold

    def add(self, record: RequestRecord) -> int:
        """Store one request, and evict others where the bound asks for it.

        Returns:
            Its id, higher than every one before.

        Raises:
            StorageError: it could not be written, or is larger than the bound by itself.
            ValueError: the arrays do not belong together.
        """
        body = pack(Contents(record.prompt_tokens, record.answer_tokens, record.traces))
        stored_bytes = len(body) + ROW_BYTES
        if stored_bytes > self._bound_bytes:
            raise StorageError(
                f"a request of {stored_bytes:,} bytes is larger than "
                f"storage.max_megabytes = {self._bound_bytes // MEGABYTE} allows for all of them",
                remedy="Raise storage.max_megabytes.",
            )
        with self._database.write() as connection:
            pair_id = ensure_pair(connection, record.pair)
            held_out = choose_side(connection, pair_id, record.pair, record.domain, record.split_key)
            identity = connection.execute(
                _INSERT,
                {
                    **{name: _plain(getattr(record, name)) for name in _SCALARS},
                    **{name: _plain(getattr(record.sampling, name)) for name in _SAMPLING},
                    "pair_id": pair_id,
                    "held_out": held_out,
                    "num_prompt_tokens": len(record.prompt_tokens),
                    "num_answer_tokens": len(record.answer_tokens),
                    "seed": str(record.seed),
                    "stored_bytes": stored_bytes,
                },
            ).lastrowid
            if identity is None:
                raise ValueError("SQLite gave no id")
            connection.execute("INSERT INTO contents VALUES (?, ?)", (identity, body))
            evict(
                connection,
                bound_bytes=self._bound_bytes,
                failure_threshold=self.failure_threshold,
                spared_id=identity,
            )
            return_free_pages(connection)
        return identity

    def list(
        self,
        pair: PairKey,
        *,
        since_id: int | None = None,
        before_id: int | None = None,
        newest: int | None = None,
    ) -> builtins.list[RequestSummary]:
        """A pair's requests, oldest first.

        Args:
            pair: whose.
            since_id: only later ones than this.
            before_id: only earlier ones than this.
            newest: only so many of the last.
        """
        query = (
            f"SELECT {_SUMMARY} FROM requests WHERE pair_id = {PAIR_ID} AND id > ? AND id < ? "  # noqa: S608
            "ORDER BY id DESC LIMIT ?"
        )
        before = LARGEST_ID if before_id is None else min(before_id, LARGEST_ID)
        limit = -1 if newest is None else max(newest, 0)
        with self._database.read() as connection:
            rows = connection.execute(query, (*names(pair), since_id or 0, before, limit)).fetchall()
        return [_summary(row) for row in reversed(rows)]

    def load(self, ids: Iterable[int]) -> builtins.list[RequestRecord]:
        """Whole requests, in the order of `ids`.

        Raises:
            StorageError: one of them is damaged, or has been evicted.
        """
        with self._database.read() as connection:
            return [_load(connection, identity) for identity in ids]

    def recent_answers(self, target: str, max_tokens: int) -> builtins.list[NDArray[np.int32]]:
        """A target's newest answers, whoever drafted, that have `max_tokens` together at most, oldest first.

        Raises:
            StorageError: one of them is damaged.
        """
        chosen, room = [], max_tokens
        query = (
            "SELECT id, num_answer_tokens FROM requests "
            "WHERE pair_id IN (SELECT id FROM pairs WHERE target = ?) ORDER BY id DESC"
        )
        with self._database.read() as connection:
            for identity, tokens in connection.execute(query, (target,)):
                room -= tokens
                if room < 0:
                    break
                chosen.append(identity)
            return [_load(connection, identity).answer_tokens for identity in reversed(chosen)]

    def collected_keys(self, pair: PairKey) -> set[str]:
        """The keys of the pair's stored requests that have one."""
        query = f"SELECT DISTINCT key FROM requests WHERE pair_id = {PAIR_ID} AND key IS NOT NULL"  # noqa: S608
        with self._database.read() as connection:
            return {key for (key,) in connection.execute(query, names(pair))}

    def pairs(self) -> dict[PairKey, int]:
        """Every pair that was ever stored, by name, with the number of its requests."""
        query = (
            "SELECT target, draft, count(requests.id) FROM pairs LEFT JOIN requests ON pair_id = pairs.id "
            "GROUP BY pairs.id ORDER BY target, draft"
        )
        with self._database.read() as connection:
            return {PairKey(target, draft): count for target, draft, count in connection.execute(query)}

    def count(self) -> int:
        """Stored requests, of all pairs."""
        return self._number("SELECT count(*) FROM requests")

    def stored_bytes(self) -> int:
        """What the bound is compared with: all `stored_bytes` together."""
        return self._number("SELECT stored_bytes FROM totals")

    def mark_trained(self, ids: Iterable[int], adapter: str) -> None:
        """An adapter has learnt from these. Who learnt from one first keeps it; evicted ones are skipped."""
        with self._database.write() as connection:
            connection.executemany(
                "UPDATE requests SET trained_by = ? WHERE id = ? AND trained_by IS NULL",
                [(adapter, int(identity)) for identity in ids],
            )

    def mark_untrained(self, adapter: str) -> None:
        """What this adapter learnt from can be learnt from again."""
        with self._database.write() as connection:
            connection.execute("UPDATE requests SET trained_by = NULL WHERE trained_by = ?", (adapter,))

    def _number(self, query: str) -> int:
        with self._database.read() as connection:
            return int(connection.execute(query).fetchone()[0])


def _plain(value: Any) -> Any:
    """SQLite takes Python's numbers, not NumPy's."""
    return value.item() if isinstance(value, np.generic) else value


def _summary(row: tuple[Any, ...]) -> RequestSummary:
    values = list(row)
    values[_HELD_OUT] = bool(values[_HELD_OUT])
    return RequestSummary(*values)


def _load(connection: sqlite3.Connection, identity: int) -> RequestRecord:
    # SQLite takes no number beyond its own, and no request has one below 1.
    known = int(identity) if 0 < identity <= LARGEST_ID else 0
    row = connection.execute(_LOAD, (known,)).fetchone()
    if row is None:
        raise RecordLost(
            f"request {identity} is not stored any more",
            remedy="It made room for others: raise storage.max_megabytes, and start again without it.",
        )
    target, draft, body, seed, *values = row
    scalars, sampling = values[: len(_SCALARS)], values[len(_SCALARS) :]
    with reading(f"request {identity}", "Put a copy of the database back, or move it away to begin anew."):
        contents = unpack(body)
        return RequestRecord(
            **dict(zip(_SCALARS, scalars, strict=True)),
            pair=PairKey(target, draft),
            sampling=Sampling(*sampling),
            seed=int(seed),
            prompt_tokens=contents.prompt_tokens,
            answer_tokens=contents.answer_tokens,
            traces=contents.traces,
        )
