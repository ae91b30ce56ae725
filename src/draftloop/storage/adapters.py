"""Adapters, and which one is active.

Contract: a promotion or a revert happens altogether in one transaction. Files of adapters lie elsewhere;
this module knows their names only.
"""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING, Any

from draftloop.errors import InputError, StorageError
from draftloop.storage.records import Activation, AdapterRecord, AdapterStatus, PairKey
from draftloop.storage.rows import PAIR_ID, ensure_pair, names, reading, to_json

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Iterable

    from draftloop.storage.database import Database
    from draftloop.storage.requests import Requests

_SELECT = (
    "SELECT name, target, draft, parent, created_s, status, form, run_id, reason, metrics FROM adapters "
    "JOIN pairs ON pairs.id = pair_id"
)
_INSERT = (
    "INSERT INTO adapters (name, pair_id, parent, created_s, status, form, run_id, reason, metrics) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_ACTIVATIONS = (
    "SELECT activations.id, target, draft, adapter, created_s, reason, request_id FROM activations "  # noqa: S608
    f"JOIN pairs ON pairs.id = pair_id WHERE pair_id = {PAIR_ID} ORDER BY activations.id"
)


class Adapters:
    """The adapters of a store.

    Args:
        database: where they are.
        requests: those that an adapter learnt from are marked.
        clock: Unix time, for the history of activations.
    """

    def __init__(self, database: Database, requests: Requests, clock: Callable[[], float]) -> None:
        self._database = database
        self._requests = requests
        self._clock = clock

    def next_name(self) -> str:
        """The first name after all that were ever added: "a0001"."""
        query = "SELECT max(CAST(substr(name, 2) AS INTEGER)) FROM adapters WHERE name GLOB 'a[0-9]*'"
        with self._database.read() as connection:
            return f"a{(connection.execute(query).fetchone()[0] or 0) + 1:04d}"

    def add(self, record: AdapterRecord) -> None:
        """Write an adapter down; it is not active by that.

        Raises:
            StorageError: there is one of that name, or its parent or its run is unknown.
        """
        with self._database.write() as connection:
            values = (
                record.name,
                ensure_pair(connection, record.pair),
                record.parent,
                record.created_s,
                record.status.value,
                record.form,
                record.run,
                record.reason,
                to_json(record.metrics),
            )
            try:
                connection.execute(_INSERT, values)
            except sqlite3.IntegrityError as error:
                raise StorageError(
                    f"adapter {record.name} (parent {record.parent}, run {record.run}) cannot be stored "
                    f"({error})",
                    remedy="Another process may have added one meanwhile: train again.",
                ) from error

    def list(self, pair: PairKey) -> builtins.list[AdapterRecord]:
        """A pair's adapters, oldest first."""
        query = f"{_SELECT} WHERE pair_id = {PAIR_ID} ORDER BY adapters.id"
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(query, names(pair))]

    def get(self, name: str) -> AdapterRecord | None:
        """The adapter of that name, None where there is none."""
        with self._database.read() as connection:
            row = connection.execute(f"{_SELECT} WHERE name = ?", (name,)).fetchone()
        return None if row is None else _record(row)

    def active(self, pair: PairKey) -> AdapterRecord | None:
        """The adapter that the pair's draft wears; None is the bare draft."""
        query = (
            f"{_SELECT} WHERE name = (SELECT adapter FROM activations WHERE pair_id = {PAIR_ID} "  # noqa: S608
            "ORDER BY id DESC LIMIT 1)"
        )
        with self._database.read() as connection:
            row = connection.execute(query, names(pair)).fetchone()
        return None if row is None else _record(row)

    def generation(self, pair: PairKey) -> int:
        """Grows when another adapter becomes active; 0 before the first. One look-up in an index."""
        query = f"SELECT max(id) FROM activations WHERE pair_id = {PAIR_ID}"  # noqa: S608
        with self._database.read() as connection:
            return int(connection.execute(query, names(pair)).fetchone()[0] or 0)

    def history(self, pair: PairKey) -> builtins.list[Activation]:
        """Every change of the active adapter, oldest first."""
        with self._database.read() as connection:
            return [
                Activation(generation, PairKey(target, draft), *rest)
                for generation, target, draft, *rest in connection.execute(_ACTIVATIONS, names(pair))
            ]

    def promote(self, name: str, *, trained_request_ids: Iterable[int] = (), reason: str) -> None:
        """Make an adapter its pair's active one and mark what it learnt from, in one transaction.

        Raises:
            InputError: there is no adapter of that name.
        """
        with self._database.write():
            pair = self._known(name).pair
            self.set_status(name, AdapterStatus.PROMOTED, reason)
            self._requests.mark_trained(trained_request_ids, name)
            self.activate(pair, name, reason=reason)

    def activate(self, pair: PairKey, name: str | None, *, reason: str = "chosen by hand") -> None:
        """Make `name` (None: the bare draft) active and change nothing else.

        Raises:
            InputError: there is no adapter of that name, or it is another pair's.
        """
        with self._database.write() as connection:
            if name is not None and (owner := self._known(name).pair) != pair:
                raise InputError(
                    f"adapter {name} is for the draft {owner.draft} under {owner.target}, "
                    f"not for {pair.draft} under {pair.target}",
                    remedy="draftloop adapters list names those of this pair.",
                )
            active = self.active(pair)
            if (None if active is None else active.name) == name:
                return
            connection.execute(
                "INSERT INTO activations (pair_id, adapter, created_s, reason, request_id) "
                "VALUES (?, ?, ?, ?, coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'requests'), 0))",
                (ensure_pair(connection, pair), name, self._clock(), reason),
            )

    def set_status(self, name: str, status: AdapterStatus, reason: str) -> None:
        """Say what became of an adapter.

        Raises:
            InputError: there is no adapter of that name.
        """
        with self._database.write() as connection:
            self._known(name)
            connection.execute(
                "UPDATE adapters SET status = ?, reason = ? WHERE name = ?", (status.value, reason, name)
            )

    def revert(self, pair: PairKey, reason: str) -> AdapterRecord | None:
        """Take the active adapter back, in one transaction; what it learnt from can be learnt from again.

        Its nearest ancestor that was not itself rejected or reverted takes its place.

        Returns:
            The adapter that is active now; None is the bare draft.

        Raises:
            InputError: the draft is bare already.
        """
        with self._database.write():
            active = self.active(pair)
            if active is None:
                raise InputError(
                    f"no adapter of {pair.draft} is active, so there is none to revert",
                    remedy="draftloop adapters list shows which there are.",
                )
            self.set_status(active.name, AdapterStatus.REVERTED, reason)
            self._requests.mark_untrained(active.name)
            parent = active.parent
            while parent is not None and (ancestor := self._known(parent)).status != AdapterStatus.PROMOTED:
                parent = ancestor.parent
            self.activate(pair, parent, reason=reason)
            return self.active(pair)

    def _known(self, name: str) -> AdapterRecord:
        record = self.get(name)
        if record is None:
            raise InputError(f"there is no adapter {name!r}", remedy="draftloop adapters list names them.")
        return record


def _record(row: tuple[Any, ...]) -> AdapterRecord:
    name, target, draft, parent, created_s, status, form, run, reason, metrics = row
    with reading(f"adapter {name}", "Promote another one, or put a copy of the database back."):
        return AdapterRecord(
            name=name,
            pair=PairKey(target, draft),
            parent=parent,
            created_s=created_s,
            status=AdapterStatus(status),
            form=form,
            run=run,
            reason=reason,
            metrics=json.loads(metrics),
        )
