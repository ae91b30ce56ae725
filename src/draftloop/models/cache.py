"""Draftloop's own cache of models: room on the disk, locks, and writes that appear whole.

Contract: nothing half-written is ever found under its final name, two processes that want the same thing
wait for each other, and what a killed one left is taken away by the next. Must not know what is stored.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

SPARE_BYTES = 64 << 20
"""What must stay free beside the files themselves: the rest of the system writes too."""


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that begins with `what` ("writing …")."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk became full while {what}",
                remedy="Free some space and run the same command again; what is complete is kept.",
            ) from error
        raise StorageError(
            f"An error stopped {what}: {error}",
            remedy="Check the folder and its permissions. DRAFTLOOP_CACHE says where models lie, "
            "storage.directory everything else.",
        ) from error


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents where they are missing."""
    with storage_errors(f"creating {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        StorageError: `folder`'s disk has less than `needed_bytes` free.
    """
    with storage_errors(f"measuring the free space of {folder}"):
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + SPARE_BYTES:
        raise StorageError(
            f"{purpose} needs {needed_bytes + SPARE_BYTES:,} bytes in {folder}, and {free_bytes:,} are free",
            remedy="Free some space, or point DRAFTLOOP_CACHE at a folder on another disk.",
        )


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`; another process that wants it waits."""
    from filelock import FileLock

    make_folder(path.parent)
    with storage_errors(f"locking {path}"):
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    The caller holds a lock for `path`, so temporary folders of the same name are what a killed process left;
    they are removed. If `path` has come into being meanwhile, it is kept: both hold the same.
    """
    make_folder(path.parent)
    prefix = f".{path.name}."
    with storage_errors(f"writing {path}"):
        remove_folders(path.parent, prefix)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if not path.exists():
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folders(parent: Path, prefix: str) -> None:
    """Remove the folders in `parent` whose names begin with `prefix`; files stay.

    Raises:
        OSError: one of them cannot be removed.
    """
    for folder in parent.iterdir():
        if folder.name.startswith(prefix) and folder.is_dir():
            shutil.rmtree(folder)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A `.partial` path that becomes `path` when the block ends well, and vanishes when it does not."""
    partial = path.with_name(f"{path.name}.partial")
    with storage_errors(f"writing {path}"):
        try:
            yield partial
            _flush(partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, object]:
    """A small file of our own; one that is absent or damaged counts as empty, for it can be made again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, object]) -> None:
    """Write a small file of our own, whole or not at all."""
    make_folder(path.parent)
    with exclusive(path), new_file(path) as partial:
        partial.write_text(json.dumps(value), encoding="utf-8")


def _flush(file: Path) -> None:
    """Bring the content to the disk before the name: after a loss of power a name must not hold zeros."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
