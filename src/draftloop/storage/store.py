"""The store: everything that Draftloop remembers, in one file.

Contract: `<directory>/draftloop.sqlite` holds requests, adapters, runs and vocabularies. Several processes
may have it open; one writes at a time. Must not know models, backends or what learning does with the rows.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from draftloop.storage.adapters import Adapters
from draftloop.storage.database import open_database, open_for_reading
from draftloop.storage.requests import Requests
from draftloop.storage.runs import Runs
from draftloop.storage.vocabularies import Vocabularies

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from draftloop.storage.database import Database

DATABASE_NAME = "draftloop.sqlite"


class Store:
    """An open store (`open_store`). Threads may share it.

    Attributes:
        requests: requests with their traces.
        adapters: adapters and which one is active.
        runs: training runs and their curves.
        vocabularies: what the draft's head was cut to.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_megabytes: int,
        failure_threshold: float,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self.requests = Requests(database, max_megabytes=max_megabytes, failure_threshold=failure_threshold)
        self.adapters = Adapters(database, self.requests, clock)
        self.runs = Runs(database, clock)
        self.vocabularies = Vocabularies(database)

    @property
    def path(self) -> Path:
        """The database."""
        return self._database.path

    def transaction(self) -> AbstractContextManager[object]:
        """A block whose changes are kept together or not at all, whatever happens in between.

        Other writers wait for its end: nothing slow belongs into it.
        """
        return self._database.write()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store(
    directory: Path,
    *,
    max_megabytes: int,
    failure_threshold: float = 0.5,
    read_only: bool = False,
    clock: Callable[[], float] = time.time,
) -> Store:
    """The store in `directory`; both are created where they are missing.

    Args:
        directory: `storage.directory`.
        max_megabytes: the bound on the stored requests, in millions of bytes.
        failure_threshold: requests with a lower acceptance rate are evicted last.
        read_only: write nothing, except that a database of an older version is brought up to date; the disk
            may be read-only.
        clock: Unix time.

    Raises:
        StorageError: the database is damaged, cannot be written (or, read-only, is absent), or was made by
            another program or a newer version.
    """
    path = directory / DATABASE_NAME
    database = open_for_reading(path) if read_only else open_database(path)
    return Store(database, max_megabytes=max_megabytes, failure_threshold=failure_threshold, clock=clock)
