"""Several processes and threads at one file, some of them killed."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from storage_samples import PAIR, add_promoted, assert_same, failure, make_adapter, make_request

from draftloop.errors import StorageError
from draftloop.storage import database
from draftloop.storage.records import AdapterStatus
from draftloop.storage.store import DATABASE_NAME, open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

CHILD = Path(__file__).with_name("store_child.py")


@contextmanager
def child(directory: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything and waits for a line."""
    command = [sys.executable, str(CHILD), str(directory), *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def kill_at_random(process: subprocess.Popen[str], chance: random.Random, most_lines: int) -> list[str]:
    """Kill it after some lines and a moment more; everything it has said."""
    assert process.stdout is not None
    begin(process)
    said = [process.stdout.readline() for _ in range(chance.randrange(most_lines))]
    until = time.perf_counter() + chance.random() * 0.004
    while time.perf_counter() < until:
        pass
    process.kill()
    said += process.stdout.readlines()
    # A line without an end was cut off: nothing was acknowledged by it.
    return [line.strip() for line in said if line.endswith("\n")]


def assert_whole(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_what_was_acknowledged_survives_twenty_kills(tmp_path: Path) -> None:
    chance = random.Random(1)
    acknowledged: list[int] = []
    for _ in range(20):
        with child(tmp_path, "add", 100) as process:
            said = kill_at_random(process, chance, 12)
        acknowledged += [int(line) for line in said if line != "open"]
        with open_store(tmp_path, max_megabytes=100) as store:
            listed = store.requests.list(PAIR)
            ids = [one.id for one in listed]
            assert set(acknowledged) <= set(ids)
            # Unacknowledged, but written: at most the one in flight at each kill.
            assert len(ids) <= len(acknowledged) + 20
            assert store.requests.stored_bytes() == sum(one.stored_bytes for one in listed)
            for one in store.requests.load(ids):
                assert_same(one, make_request(rows=60, seed=one.seed))
        assert_whole(tmp_path / DATABASE_NAME)
    assert len(acknowledged) > 40


def test_a_kill_while_the_file_is_made_or_others_make_room(tmp_path: Path) -> None:
    chance = random.Random(2)
    for number in range(8):
        # The first four begin with no file at all, the last four with a full one.
        folder = tmp_path / str(min(number, 4))
        with child(folder, "add", 1) as process:
            said = kill_at_random(process, chance, 2 if number < 4 else 150)
        with open_store(folder, max_megabytes=1) as store:
            listed = store.requests.list(PAIR)
            assert store.requests.stored_bytes() == sum(one.stored_bytes for one in listed) <= 1_000_000
            if said[1:]:
                assert int(said[-1]) in [one.id for one in listed]
            assert store.requests.add(make_request(seed=77)) > max((one.id for one in listed), default=0)
        assert_whole(folder / DATABASE_NAME)


def test_a_promotion_is_whole_or_absent_after_a_kill(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=100) as store:
        for seed in range(50):
            store.requests.add(failure(seed))
    chance = random.Random(3)
    for _ in range(8):
        with child(tmp_path, "promote", 0) as process:
            kill_at_random(process, chance, 12)
        with open_store(tmp_path, max_megabytes=100) as store:
            active = store.adapters.active(PAIR)
            name = None if active is None else active.name
            learnt = {one.trained_by for one in store.requests.list(PAIR)}
            assert learnt == ({None} if name in (None, "a0001") else {name})
            promoted = [one.name for one in store.adapters.list(PAIR) if one.status is AdapterStatus.PROMOTED]
            assert promoted == sorted({"a0001", name} - {None}) if name else promoted in ([], ["a0001"])
        assert_whole(tmp_path / DATABASE_NAME)


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    with child(tmp_path, "some", 150, "one") as one, child(tmp_path, "some", 150, "two") as two:
        # Neither finds a file: they also make it at once.
        begin(one)
        begin(two)
        said = [process.communicate()[0].split() for process in (one, two)]
        assert (one.returncode, two.returncode) == (0, 0)
    ids = [int(line) for lines in said for line in lines]
    assert len(set(ids)) == len(ids) == 300
    with open_store(tmp_path, max_megabytes=100) as store:
        listed = store.requests.list(PAIR)
        assert sorted(ids) == [entry.id for entry in listed]
        for lines, source in zip(said, ("one", "two"), strict=True):
            assert {entry.source for entry in listed if str(entry.id) in lines} == {source}
        # Both used the same 150 split keys.
        assert sum(entry.held_out for entry in listed) == 60
    assert_whole(tmp_path / DATABASE_NAME)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_reader_sees_whole_requests_while_a_writer_writes(tmp_path: Path, read_only: bool) -> None:
    open_store(tmp_path, max_megabytes=100).close()
    with child(tmp_path, "add", 100) as process:
        assert process.stdout is not None
        begin(process)
        assert process.stdout.readline() == "open\n"
        seen = 0
        with open_store(tmp_path, max_megabytes=100, read_only=read_only) as store:
            for _ in range(15):
                acknowledged = int(process.stdout.readline())
                ids = [one.id for one in store.requests.list(PAIR)]
                assert acknowledged in ids
                for one in store.requests.load(ids[seen:]):
                    assert_same(one, make_request(rows=60, seed=one.seed))
                seen = len(ids)


def test_a_new_adapter_is_seen_by_another_store(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=1) as one, open_store(tmp_path, max_megabytes=1) as two:
        before = two.adapters.generation(PAIR)
        add_promoted(one, "a0001")
        assert two.adapters.generation(PAIR) > before
        active = two.adapters.active(PAIR)
        assert active is not None
        assert active.name == "a0001"


def test_who_writes_too_long_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path, max_megabytes=1) as patient:
        monkeypatch.setattr(database, "BUSY_S", 0.01)
        with open_store(tmp_path, max_megabytes=1) as hasty, patient.transaction():
            # It has only read so far: whoever begins first also writes first.
            assert patient.adapters.active(PAIR) is None
            with pytest.raises(StorageError, match="Another process has been writing"):
                hasty.requests.add(make_request())
            assert hasty.requests.count() == 0
            patient.requests.add(make_request())
            assert hasty.requests.count() == 0
        assert patient.requests.count() == 1


def test_who_makes_the_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "PREPARING_S", 0.01)
    with FileLock(tmp_path / f".{DATABASE_NAME}.lock"):
        with pytest.raises(StorageError, match="cannot be used"):
            open_store(tmp_path, max_megabytes=1)
        assert not (tmp_path / DATABASE_NAME).exists() or (tmp_path / DATABASE_NAME).stat().st_size == 0
    open_store(tmp_path, max_megabytes=1).close()
    with FileLock(tmp_path / f".{DATABASE_NAME}.lock"):
        open_store(tmp_path, max_megabytes=1).close()


def test_threads_share_a_store(tmp_path: Path) -> None:
    with open_store(tmp_path, max_megabytes=100) as store:
        run = store.runs.start(PAIR, None, {})
        failed: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for step in range(25):
                    with store.transaction():
                        identity = store.requests.add(make_request(seed=number * 100 + step))
                        assert store.requests.load([identity])[0].seed == number * 100 + step
                    store.adapters.generation(PAIR)
                    store.requests.list(PAIR)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        store.adapters.add(make_adapter("a0001", run=run))
        store.adapters.promote("a0001", reason="better")
        for thread in threads:
            thread.join()
        assert failed == []
        assert store.requests.count() == 100


def test_a_write_that_the_system_refuses_is_told(tmp_path: Path) -> None:
    limit_bytes = 600_000
    with child(tmp_path, "limit", limit_bytes) as process:
        begin(process)
        said = process.communicate()[0].splitlines()
        assert process.returncode == 0
    told, ids = said[-1], [int(line) for line in said[:-1]]
    assert told.startswith("told: ")
    assert "could not be read or written" in told
    assert "--no-collect" in told
    assert len(ids) > 5
    with open_store(tmp_path, max_megabytes=100) as store:
        assert [one.id for one in store.requests.list(PAIR)] == ids
        store.requests.load(ids)
    assert_whole(tmp_path / DATABASE_NAME)
