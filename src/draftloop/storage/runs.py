"""Training runs and their curves.

Contract: each change is a transaction of its own. Must not know how training works or where checkpoints lie.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from draftloop.errors import InputError
from draftloop.storage.records import PairKey, RunPoint, RunRecord, RunStatus
from draftloop.storage.rows import PAIR_ID, ensure_pair, names, reading, to_json

if TYPE_CHECKING:
    import builtins
    import sqlite3
    from collections.abc import Callable, Mapping

    from draftloop.storage.database import Database

_SELECT = (
    "SELECT runs.id, target, draft, parent, started_s, ended_s, status, recipe, result FROM runs "
    "JOIN pairs ON pairs.id = pair_id"
)
_POINT = ", ".join(RunPoint.__slots__)


class Runs:
    """The training runs of a store.

    Args:
        database: where they are.
        clock: Unix time, for their beginning and end.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def start(self, pair: PairKey, parent: str | None, recipe: Mapping[str, Any]) -> int:
        """Write down that a run has begun; its id, higher than every one before.

        Raises:
            ValueError: the recipe holds a number that is not finite.
        """
        with self._database.write() as connection:
            identity = connection.execute(
                "INSERT INTO runs (pair_id, parent, started_s, status, recipe, result) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    ensure_pair(connection, pair),
                    parent,
                    self._clock(),
                    RunStatus.RUNNING.value,
                    to_json(recipe),
                    to_json({}),
                ),
            ).lastrowid
        if identity is None:
            raise ValueError("SQLite gave no id")
        return identity

    def reopen(self, run_id: int, *, after_step: int) -> None:
        """The run goes on from a checkpoint: it is running again, and later points are forgotten.

        Args:
            run_id: which.
            after_step: the checkpoint's step, 0 to begin at the beginning.

        Raises:
            InputError: there is no such run.
        """
        with self._database.write() as connection:
            self._change(
                connection,
                run_id,
                "UPDATE runs SET status = ?, ended_s = NULL WHERE id = ?",
                (RunStatus.RUNNING.value, run_id),
            )
            connection.execute("DELETE FROM run_points WHERE run_id = ? AND step > ?", (run_id, after_step))

    def add_point(self, run_id: int, point: RunPoint) -> None:
        """Add to the curve. One training and one validation point a step: a second takes the first's place.

        NaN becomes None.
        """
        with self._database.write() as connection:
            connection.execute(
                f"INSERT OR REPLACE INTO run_points (run_id, validates, {_POINT}) "  # noqa: S608
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run_id,
                    point.validation_alpha is not None,
                    *(getattr(point, name) for name in RunPoint.__slots__),
                ),
            )

    def points(self, run_id: int) -> builtins.list[RunPoint]:
        """The curve, by step; at one step training comes before validation."""
        query = f"SELECT {_POINT} FROM run_points WHERE run_id = ? ORDER BY step, validates"  # noqa: S608
        with self._database.read() as connection:
            return [RunPoint(*row) for row in connection.execute(query, (run_id,))]

    def finish(self, run_id: int, status: RunStatus, result: Mapping[str, Any]) -> None:
        """The run has ended, for now (`interrupted`) or for good.

        Raises:
            InputError: there is no such run.
            ValueError: the result holds a number that is not finite.
        """
        with self._database.write() as connection:
            self._change(
                connection,
                run_id,
                "UPDATE runs SET status = ?, ended_s = ?, result = ? WHERE id = ?",
                (status.value, self._clock(), to_json(result), run_id),
            )

    def list(self, pair: PairKey) -> builtins.list[RunRecord]:
        """A pair's runs, oldest first."""
        query = f"{_SELECT} WHERE pair_id = {PAIR_ID} ORDER BY runs.id"
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(query, names(pair))]

    def latest(self, pair: PairKey) -> RunRecord | None:
        """The pair's newest run."""
        query = f"{_SELECT} WHERE pair_id = {PAIR_ID} ORDER BY runs.id DESC LIMIT 1"
        return self._one(query, names(pair))

    def get(self, run_id: int) -> RunRecord | None:
        """The run with that id, None where there is none."""
        return self._one(f"{_SELECT} WHERE runs.id = ?", (run_id,))

    def _one(self, query: str, parameters: tuple[Any, ...]) -> RunRecord | None:
        with self._database.read() as connection:
            row = connection.execute(query, parameters).fetchone()
        return None if row is None else _record(row)

    @staticmethod
    def _change(connection: sqlite3.Connection, run_id: int, query: str, parameters: tuple[Any, ...]) -> None:
        if connection.execute(query, parameters).rowcount == 0:
            raise InputError(f"there is no training run {run_id}", remedy="draftloop report lists them.")


def _record(row: tuple[Any, ...]) -> RunRecord:
    identity, target, draft, parent, started_s, ended_s, status, recipe, result = row
    with reading(f"training run {identity}", "Train without --resume, or put a copy of the database back."):
        return RunRecord(
            id=identity,
            pair=PairKey(target, draft),
            parent=parent,
            started_s=started_s,
            ended_s=ended_s,
            status=RunStatus(status),
            recipe=json.loads(recipe),
            result=json.loads(result),
        )
