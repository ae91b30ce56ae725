"""Opening the file: versions, damage, disks that are full or may not be written."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from storage_samples import PAIR, assert_same, make_request

from draftloop.errors import StorageError
from draftloop.storage.database import open_database, open_for_reading
from draftloop.storage.records import AdapterStatus, RunPoint, RunStatus
from draftloop.storage.schema import APPLICATION_ID, MIGRATIONS
from draftloop.storage.store import DATABASE_NAME, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

V1 = Path(__file__).with_name("v1.sql")
NOBODY = 65534
LATER = [*MIGRATIONS, ["CREATE TABLE later (x)"]]


def make_v1(folder: Path) -> Path:
    """A database as version 1 wrote it."""
    path = folder / DATABASE_NAME
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(V1.read_text(encoding="utf-8"))
    return path


def stored(folder: Path, count: int = 3, **changed: Any) -> Path:
    """A database with some requests, closed."""
    with open_store(folder, max_megabytes=10) as store:
        for seed in range(count):
            store.requests.add(make_request(seed=seed, **changed))
    return folder / DATABASE_NAME


def value(path: Path, query: str) -> Any:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchone()[0]


def refuse(folder: Path, **options: Any) -> str:
    """What is said when the store cannot be opened; the file stays as it was."""
    path = folder / DATABASE_NAME
    before = path.read_bytes()
    with pytest.raises(StorageError) as caught:
        open_store(folder, max_megabytes=10, **options)
    assert path.read_bytes() == before
    return str(caught.value)


class TestVersions:
    def test_a_new_folder_gets_the_newest(self, tmp_path: Path) -> None:
        path = stored(tmp_path / "a" / "b", 0)
        assert value(path, "PRAGMA user_version") == len(MIGRATIONS)
        assert value(path, "PRAGMA application_id") == APPLICATION_ID
        assert value(path, "PRAGMA journal_mode") == "wal"

    def test_migration_1_is_frozen(self, tmp_path: Path) -> None:
        def schema(path: Path) -> list[tuple]:
            with closing(sqlite3.connect(path)) as connection:
                return connection.execute(
                    "SELECT type, name, sql FROM sqlite_master ORDER BY name"
                ).fetchall()

        open_database(tmp_path / "now.sqlite", migrations=MIGRATIONS[:1]).close()
        assert schema(tmp_path / "now.sqlite") == schema(make_v1(tmp_path))

    def test_what_version_1_stored_is_read(self, tmp_path: Path) -> None:
        make_v1(tmp_path)
        with open_store(tmp_path, max_megabytes=1) as store:
            listed = store.requests.list(PAIR)
            assert [(one.id, one.trained_by) for one in listed] == [(1, "a0001"), (2, None), (3, None)]
            assert [one.held_out for one in listed].count(True) == 1
            for one, record in enumerate(store.requests.load([1, 2, 3])):
                assert_same(record, make_request(rows=1, prompt=2, seed=one, key=f"prompt {one}"))
            active = store.adapters.active(PAIR)
            assert active is not None
            assert (active.name, active.status, active.run) == ("a0001", AdapterStatus.PROMOTED, 1)
            assert [event.adapter for event in store.adapters.history(PAIR)] == ["a0001"]
            run = store.runs.latest(PAIR)
            assert run is not None
            assert (run.status, run.result) == (RunStatus.PROMOTED, {"gain": 0.125})
            assert store.runs.points(1) == [
                RunPoint(1, 0.5, 0.25, 1e-4, 1.0, None),
                RunPoint(1, 0.5, None, None, None, 0.75),
            ]
            assert store.requests.stored_bytes() == sum(one.stored_bytes for one in listed)
            assert store.vocabularies.answer_tokens(PAIR) == 3
            assert store.requests.add(make_request(rows=5)) == 4
            assert store.vocabularies.answer_tokens(PAIR) == 8

    def test_an_older_one_is_migrated_with_its_rows(self, tmp_path: Path) -> None:
        path = stored(tmp_path)
        later = [
            *MIGRATIONS,
            ["ALTER TABLE requests ADD COLUMN mood TEXT NOT NULL DEFAULT 'calm'"],
            ["CREATE TABLE moods (name TEXT)", "INSERT INTO moods SELECT mood FROM requests"],
        ]
        open_database(path, migrations=later).close()
        assert value(path, "PRAGMA user_version") == len(later)
        assert value(path, "SELECT count(*) FROM moods WHERE name = 'calm'") == 3
        open_database(path, migrations=later).close()
        assert value(path, "SELECT count(*) FROM moods") == 3

    def test_a_migration_that_fails_leaves_the_version_before_it(self, tmp_path: Path) -> None:
        path = stored(tmp_path)
        good, bad = ["CREATE TABLE good (x)"], ["CREATE TABLE half (x)", "INSERT INTO nowhere VALUES (1)"]
        with pytest.raises(StorageError, match="nowhere"):
            open_database(path, migrations=[*MIGRATIONS, good, bad])
        assert value(path, "PRAGMA user_version") == len(MIGRATIONS) + 1
        assert value(path, "SELECT count(*) FROM sqlite_master WHERE name IN ('good', 'half')") == 1
        open_database(path, migrations=[*MIGRATIONS, good, ["CREATE TABLE half (x)"]]).close()

    @pytest.mark.parametrize("read_only", [False, True])
    def test_a_newer_one_is_left_alone(self, tmp_path: Path, read_only: bool) -> None:
        path = stored(tmp_path)
        open_database(path, migrations=LATER).close()
        told = refuse(tmp_path, read_only=read_only)
        assert "made by a newer version of draftloop" in told
        assert "--no-collect" in told

    def test_an_older_one_is_brought_up_to_date_to_be_read(self, tmp_path: Path) -> None:
        path = stored(tmp_path)
        with closing(open_for_reading(path, migrations=LATER)) as database:
            with database.read() as connection:
                assert connection.execute("SELECT count(*) FROM later").fetchone() == (0,)
                assert connection.execute("SELECT count(*) FROM requests").fetchone() == (3,)
            with pytest.raises(StorageError, match="cannot be written"), database.write() as connection:
                connection.execute("INSERT INTO later VALUES (1)")

    def test_an_older_one_that_cannot_be_written_says_what_to_do(self, open_folder: Path) -> None:
        path = stored(open_folder)
        forbid(open_folder)
        with unprivileged(), pytest.raises(StorageError) as caught:
            open_for_reading(path, migrations=LATER)
        assert f"has version {len(MIGRATIONS)}, this program reads version {len(LATER)}" in caught.value.what
        assert "Copy its folder" in caught.value.remedy

    @pytest.mark.parametrize("statement", ["CREATE TABLE notes (x)", "PRAGMA user_version = 1"])
    def test_another_programs_database_is_left_alone(self, tmp_path: Path, statement: str) -> None:
        with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as connection:
            connection.execute(statement)
        assert "another program's database" in refuse(tmp_path)

    def test_an_empty_file_is_a_new_database(self, tmp_path: Path) -> None:
        (tmp_path / DATABASE_NAME).touch()
        assert value(stored(tmp_path), "SELECT count(*) FROM requests") == 3


class TestDamage:
    @pytest.mark.parametrize("read_only", [False, True])
    @pytest.mark.parametrize("content", [b"this is a text file, and a longer one" * 50, b"\0" * 4096, b"xy"])
    def test_a_file_that_is_no_database(self, tmp_path: Path, content: bytes, read_only: bool) -> None:
        (tmp_path / DATABASE_NAME).write_bytes(content)
        told = refuse(tmp_path, read_only=read_only)
        assert "is no database, or damaged" in told
        assert "--no-collect" in told

    @pytest.mark.parametrize("read_only", [False, True])
    @pytest.mark.parametrize("kept", [100, 1024, 4096, 20_000])
    def test_a_truncated_file(self, tmp_path: Path, kept: int, read_only: bool) -> None:
        path = stored(tmp_path, 20, rows=100)
        os.truncate(path, kept)
        assert "damaged" in refuse(tmp_path, read_only=read_only)

    def test_a_file_that_was_overwritten_in_the_middle(self, tmp_path: Path) -> None:
        path = stored(tmp_path, 20, rows=100)
        whole = path.read_bytes()
        for page in range(1, len(whole) // 4096):
            path.write_bytes(whole[: page * 4096] + b"\xa5" * 4096 + whole[(page + 1) * 4096 :])
            told = None
            try:
                with open_store(tmp_path, max_megabytes=10) as store:
                    ids = [one.id for one in store.requests.list(PAIR)]
                    store.requests.load(ids)
                    store.requests.add(make_request(seed=99))
            except StorageError as error:
                told = str(error)
            # Or the page held nothing that was asked for: an index, or a table that is empty.
            assert "damaged" in told if told else ids == list(range(1, 21))
            assert path.stat().st_size >= len(whole)

    def test_damage_that_shows_only_later_is_told_too(self, tmp_path: Path) -> None:
        path = stored(tmp_path, 20, rows=100)
        with open_store(tmp_path, max_megabytes=10) as store:
            root = value(path, "SELECT rootpage FROM sqlite_master WHERE name = 'contents'")
            with path.open("r+b") as file:
                file.seek((root - 1) * 4096)
                file.write(b"\xa5" * 4096)
            with pytest.raises(StorageError, match="is damaged"):
                store.requests.load(range(1, 21))

    def test_a_folder_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / DATABASE_NAME).mkdir()
        with pytest.raises(StorageError, match="cannot be opened"):
            open_store(tmp_path, max_megabytes=10)

    def test_a_file_in_the_folders_place(self, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("a file")
        with pytest.raises(StorageError, match="cannot be used"):
            open_store(tmp_path / "data", max_megabytes=10)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        Path(name).chmod(0o755)
        folder.mkdir()
        yield folder
        folder.chmod(0o755)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permission bits do not bind root, so that root becomes nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def forbid(folder: Path) -> None:
    """Nothing in the folder may be written, and nothing be added."""
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)


class TestReadOnlyDisk:
    def test_a_store_that_cannot_be_written_is_told_when_it_is_opened(self, open_folder: Path) -> None:
        stored(open_folder)
        forbid(open_folder)
        with unprivileged(), pytest.raises(StorageError) as caught:
            open_store(open_folder, max_megabytes=10)
        assert "cannot be" in str(caught.value)
        assert "storage.directory" in caught.value.remedy
        assert "--no-collect" in caught.value.remedy

    def test_a_file_that_cannot_be_written_in_a_folder_that_can(self, open_folder: Path) -> None:
        path = stored(open_folder)
        path.chmod(0o444)
        open_folder.chmod(0o777)
        with unprivileged(), pytest.raises(StorageError, match="cannot be written"):
            open_store(open_folder, max_megabytes=10)

    def test_a_folder_that_cannot_be_made(self, open_folder: Path) -> None:
        forbid(open_folder)
        with unprivileged(), pytest.raises(StorageError, match="cannot be used"):
            open_store(open_folder / "data", max_megabytes=10)
        with unprivileged(), pytest.raises(StorageError, match="cannot be opened"):
            open_store(open_folder, max_megabytes=10)

    def test_it_is_read_all_the_same(self, open_folder: Path) -> None:
        stored(open_folder)
        forbid(open_folder)
        with unprivileged(), open_store(open_folder, max_megabytes=10, read_only=True) as store:
            assert [one.seed for one in store.requests.load([1, 2, 3])] == [0, 1, 2]
            with pytest.raises(StorageError, match="cannot be written"):
                store.requests.add(make_request())

    def test_a_log_that_cannot_be_read_in_is_not_passed_over(self, open_folder: Path, tmp_path: Path) -> None:
        with open_store(tmp_path, max_megabytes=10) as store:
            store.requests.add(make_request())
            for file in (store.path, store.path.with_name(f"{DATABASE_NAME}-wal")):
                shutil.copy(file, open_folder)
        forbid(open_folder)
        with unprivileged(), pytest.raises(StorageError, match="was not closed properly"):
            open_store(open_folder, max_megabytes=10, read_only=True)


class TestReading:
    def test_there_must_be_something_to_read(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="Nothing has been stored"):
            open_store(tmp_path / "nowhere", max_megabytes=10, read_only=True)
        assert not (tmp_path / "nowhere").exists()

    def test_reading_changes_nothing(self, tmp_path: Path) -> None:
        path = stored(tmp_path)
        before = path.read_bytes()
        with open_store(tmp_path, max_megabytes=1, read_only=True) as store:
            assert store.requests.count() == 3
            with pytest.raises(StorageError, match="cannot be written"):
                store.requests.add(make_request())
            assert store.requests.count() == 3
        assert path.read_bytes() == before

    def test_a_folder_with_odd_characters(self, tmp_path: Path) -> None:
        folder = tmp_path / "100 % sure? #1 é"
        path = stored(folder)
        assert path.is_file()
        with open_store(folder, max_megabytes=10, read_only=True) as store:
            assert store.requests.count() == 3


@pytest.fixture
def disk_of_pages(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`disk_of_pages(n)`: SQLite finds the disk full when the database needs more pages than n."""
    connect = sqlite3.connect

    def limit(pages: int) -> None:
        def limited(*args: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*args, **options)
            connection.execute(f"PRAGMA max_page_count = {pages}")
            return connection

        monkeypatch.setattr(sqlite3, "connect", limited)

    return limit


class TestFullDisk:
    def test_a_request_that_finds_no_room_leaves_nothing(
        self, tmp_path: Path, disk_of_pages: Callable[[int], None]
    ) -> None:
        path = stored(tmp_path)
        disk_of_pages(path.stat().st_size // 4096 + 20)
        ids = [1, 2, 3]
        with open_store(tmp_path, max_megabytes=10) as store:

            def add_many() -> None:
                ids.extend(store.requests.add(make_request(rows=100, seed=seed)) for seed in range(3, 20))

            with pytest.raises(StorageError, match="The disk became full") as caught:
                add_many()
            assert "--no-collect" in caught.value.remedy
            assert len(ids) > 4
            assert [one.id for one in store.requests.list(PAIR)] == ids
            # What is small still finds a place.
            ids.append(store.requests.add(make_request(rows=1, seed=50)))
        with open_store(tmp_path, max_megabytes=10) as store:
            assert [one.id for one in store.requests.list(PAIR)] == ids
            store.requests.load(ids)
        assert value(path, "PRAGMA integrity_check") == "ok"

    def test_a_transaction_of_several_leaves_nothing(
        self, tmp_path: Path, disk_of_pages: Callable[[int], None]
    ) -> None:
        path = stored(tmp_path)
        disk_of_pages(path.stat().st_size // 4096 + 20)
        with open_store(tmp_path, max_megabytes=10) as store:

            def add_many() -> None:
                with store.transaction():
                    for seed in range(3, 20):
                        store.requests.add(make_request(rows=100, seed=seed))

            with pytest.raises(StorageError, match="The disk became full"):
                add_many()
            assert [one.id for one in store.requests.list(PAIR)] == [1, 2, 3]
            assert store.requests.add(make_request()) > 3

    def test_who_goes_on_after_a_full_disk_keeps_no_half(
        self, tmp_path: Path, disk_of_pages: Callable[[int], None]
    ) -> None:
        path = stored(tmp_path)
        disk_of_pages(path.stat().st_size // 4096 + 20)
        with open_store(tmp_path, max_megabytes=10) as store:

            def go_on() -> None:
                with store.transaction():
                    store.requests.add(make_request(seed=3))
                    with pytest.raises(StorageError, match="The disk became full"):
                        store.requests.add(make_request(rows=1000, seed=4))
                    store.requests.add(make_request(seed=5))

            with contextlib.suppress(StorageError):
                go_on()
            listed = [one.seed for one in store.requests.load(one.id for one in store.requests.list(PAIR))]
            assert listed in ([0, 1, 2], [0, 1, 2, 3, 5])

    def test_there_is_no_room_for_a_database_at_all(
        self, tmp_path: Path, disk_of_pages: Callable[[int], None]
    ) -> None:
        disk_of_pages(5)
        with pytest.raises(StorageError, match="The disk became full"):
            open_store(tmp_path, max_megabytes=10)
