"""One SQLite file: opened, brought up to date, written by one at a time; its errors told in our words.

Contract: a file that is damaged, another program's or of a newer version is left as it is. What a block of
`write` changed is there altogether or not at all, also when the process is killed. Threads may share a
`Database`; processes may share a file. Nothing else in a process may open the file while a `Database` has
it: closing it would let go of SQLite's locks. Must not know the tables.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from draftloop.errors import StorageError
from draftloop.storage.schema import APPLICATION_ID, MIGRATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from draftloop.storage.schema import Migration

BUSY_S = 10.0
"""How long a writer waits for another one."""

WAL_BYTES = 16 << 20
"""What the write-ahead log is cut to once its content is in the database."""

PREPARING_S = 60.0
"""How long another process may take to create or migrate the file."""

NO_COLLECT = "Answers work without it: --no-collect, or storage.collect: false."

_FAULTS = {
    sqlite3.SQLITE_NOTADB: (
        "{path} is no database, or damaged ({error})",
        "It is left as it is: move it away to begin anew, or put a copy of it back.",
    ),
    sqlite3.SQLITE_CORRUPT: (
        "{path} is damaged ({error})",
        "It is left as it is: move it away to begin anew, or put a copy of it back.",
    ),
    sqlite3.SQLITE_READONLY: (
        "{path} cannot be written ({error})",
        "Make the file and its folder writable, or set storage.directory to another folder.",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "{path} cannot be opened ({error})",
        "Check the permissions of the file and its folder, or set storage.directory to another folder.",
    ),
    sqlite3.SQLITE_FULL: (
        "The disk became full while writing {path}",
        "Free some space; what was stored before is whole.",
    ),
    sqlite3.SQLITE_IOERR: (
        "{path} could not be read or written ({error})",
        "Check the disk and the space on it; what was stored before is kept.",
    ),
    sqlite3.SQLITE_BUSY: (
        "Another process has been writing {path} for more than " + f"{BUSY_S:.0f} s",
        "Wait until it is done, or end it.",
    ),
}
_OURS = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError)
"""These are mistakes of the caller, which a remedy would hide."""


class Database:
    """An open file (`open_database`, `open_for_reading`)."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()
        self._depth = 0

    def close(self) -> None:
        """Let go of the file."""
        with self._lock, translated(self.path):
            self._connection.close()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A block whose changes are kept together; inside another one it is a part of that.

        An exception takes back what the block changed.

        Raises:
            StorageError: the file cannot be written.
        """
        yield from self._transaction("BEGIN IMMEDIATE")

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A block that sees one state of the file, whatever others write meanwhile.

        Raises:
            StorageError: the file cannot be read.
        """
        yield from self._transaction("BEGIN")

    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, translated(self.path):
            depth = self._depth
            name, nested = f"block{depth}", depth > 0
            try:
                self._depth = depth + 1
                if nested and not self._connection.in_transaction:
                    # A full disk takes all of it back, and a caller who goes on would keep the rest alone.
                    raise sqlite3.OperationalError("an error before has ended the transaction")
                if not nested and self._connection.in_transaction:
                    # Only an interrupt at the wrong moment leaves one open, and nobody was told it is kept.
                    self._connection.execute("ROLLBACK")
                self._connection.execute(f"SAVEPOINT {name}" if nested else begin)
                yield self._connection
                self._connection.execute(f"RELEASE {name}" if nested else "COMMIT")
            except BaseException:
                # SQLite has taken back the whole transaction by itself after some errors.
                if self._connection.in_transaction:
                    self._connection.execute(f"ROLLBACK TO {name}" if nested else "ROLLBACK")
                raise
            finally:
                self._depth = depth


def open_database(path: Path, *, migrations: Sequence[Migration] = MIGRATIONS) -> Database:
    """Open `path` to read and write; create or migrate it where needed.

    Raises:
        StorageError: it is damaged, cannot be written, or was made by another program or a newer version.
    """
    with _system_errors(path), translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = _connect(path, "mode=rwc")
        try:
            _prepare(connection, path, migrations)
        except BaseException:
            connection.close()
            raise
    return Database(path, connection)


def open_for_reading(path: Path, *, migrations: Sequence[Migration] = MIGRATIONS) -> Database:
    """Open `path`, which may lie on a read-only disk or be written by others meanwhile.

    Only a file of an older version is written to: it is brought up to date first.

    Raises:
        StorageError: it is absent, damaged, was made by another program or a newer version, or by an older
            one where nothing can be written.
    """
    with _system_errors(path), translated(path):
        if not path.is_file():
            raise StorageError(
                f"Nothing has been stored in {path.parent} yet",
                remedy="Answer something first, or set storage.directory to the folder where answers are.",
            )
        connection = _connect_for_reading(path)
        try:
            version = _version(connection, path, len(migrations))
            if version < len(migrations):
                connection.close()
                _bring_up_to_date(path, version, migrations)
                connection = _connect_for_reading(path)
        except BaseException:
            connection.close()
            raise
    return Database(path, connection)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn what SQLite says of `path` into a StorageError with a remedy."""
    try:
        yield
    except _OURS:
        raise
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        what, remedy = _FAULTS.get(code, ("{path} could not be used ({error})", "It is left as it is."))
        raise StorageError(what.format(path=path, error=error), remedy=f"{remedy} {NO_COLLECT}") from error
    except UnicodeEncodeError as error:
        raise StorageError(
            f"{error.object!r} cannot be stored: it is no valid Unicode", remedy="Use another name."
        ) from error


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be used ({error})",
            remedy=f"Check the folder, or set storage.directory to another one. {NO_COLLECT}",
        ) from error


def _connect(path: Path, options: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{options}",
        uri=True,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _connect_for_reading(path: Path) -> sqlite3.Connection:
    """Reading a log needs a file beside it; where none can be made, the database is taken as it lies."""
    connection = _connect(path, "mode=ro")
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        log = path.with_name(f"{path.name}-wal")
        unlogged = not log.exists() or log.stat().st_size == 0
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        if not unlogged:
            raise StorageError(
                f"{path} was not closed properly and lies where nothing can be written",
                remedy="Copy its whole folder to a place that can be written, and read it there.",
            ) from error
        return _connect(path, "mode=ro&immutable=1")
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration]) -> None:
    version = _version(connection, path, len(migrations))
    journal = _value(connection, "PRAGMA journal_mode")
    if version < len(migrations) or journal != "wal":
        from filelock import FileLock

        # SQLite lets nobody wait for the change to WAL, so that two who begin together would collide.
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=PREPARING_S):
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            _migrate(connection, path, migrations)
    # A killed process loses nothing with NORMAL; a power cut may lose the last answers, never the file.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    # Some builds write zeros over all that is deleted, which makes eviction ten times slower.
    connection.execute("PRAGMA secure_delete = FAST")
    # SQLite opens what it may not write without a word; better told now than after the first answer.
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"PRAGMA user_version = {len(migrations)}")
    connection.execute("ROLLBACK")


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration]) -> None:
    for number, statements in enumerate(migrations, start=1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            if _version(connection, path, len(migrations)) < number:
                for statement in statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _bring_up_to_date(path: Path, version: int, migrations: Sequence[Migration]) -> None:
    try:
        open_database(path, migrations=migrations).close()
    except StorageError as error:
        raise StorageError(
            f"{path} has version {version}, this program reads version {len(migrations)}, and it cannot be "
            f"brought up to date where it lies ({error.what})",
            remedy="Copy its folder to a place that can be written, and set storage.directory to the copy.",
        ) from error


def _version(connection: sqlite3.Connection, path: Path, newest: int) -> int:
    """The file's version, 0 where it is new.

    Raises:
        StorageError: another program made it, or a newer version of this one.
    """
    version = int(_value(connection, "PRAGMA user_version"))
    tables = _value(connection, "SELECT count(*) FROM sqlite_master")
    if _value(connection, "PRAGMA application_id") != APPLICATION_ID and (tables or version):
        raise StorageError(
            f"{path} is another program's database",
            remedy=f"It is left as it is: set storage.directory to another folder. {NO_COLLECT}",
        )
    if version > newest:
        raise StorageError(
            f"{path} was made by a newer version of draftloop (its version is {version}, known are {newest})",
            remedy=f"Install the newer one, or set storage.directory to another folder. {NO_COLLECT}",
        )
    return version


def _value(connection: sqlite3.Connection, query: str) -> str | int:
    value: str | int = connection.execute(query).fetchone()[0]
    return value
