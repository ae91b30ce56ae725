"""SHA-256 digests of large files, remembered so that a file is read once and not at every start.

Contract: a digest is believed while the file's size, times and inode stay the same. Must not know what the
files hold.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from draftloop.errors import ModelUnreadable
from draftloop.folders import cache_root
from draftloop.models.cache import read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.models.progress import Progress

_READ_BYTES = 1 << 22


def content_sha256(path: Path, progress: Progress) -> str:
    """The SHA-256 of a file's content.

    Raises:
        ModelUnreadable: the file cannot be read.
        StorageError: the digest cannot be stored.
    """
    try:
        status = path.stat()
        known = read_json(_memo(path))
        if known.get("stamp") == _stamp(status):
            return str(known["sha256"])
        digest = hashlib.sha256()
        with path.open("rb") as file, progress.task(f"Reading {path.name}", status.st_size) as task:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                task.advance(len(block))
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error}", remedy="Check its permissions.") from error
    _remember(path, status, digest.hexdigest())
    return digest.hexdigest()


def remember_sha256(path: Path, sha256: str) -> None:
    """Store the digest of a file that has just been written, and hashed on the way."""
    _remember(path, path.stat(), sha256)


def _remember(path: Path, status: os.stat_result, sha256: str) -> None:
    write_json(_memo(path), {"stamp": _stamp(status), "sha256": sha256})


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _memo(path: Path) -> Path:
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return cache_root() / "digests" / f"{key}.json"
