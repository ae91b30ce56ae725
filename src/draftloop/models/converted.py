"""The cache of GGUF models converted to 4-bit folders, found again by their content.

Contract: a folder is named after the SHA-256 of its GGUF file and the converter's version, so it is never
taken for another model's; `imported:` names give such a folder a name of its own. Must not know other kinds
of models.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.errors import InputError, ModelNotFound, ModelUnreadable
from draftloop.models.cache import cache_root, exclusive, make_folder, new_file, new_folder, require_space
from draftloop.models.folder import check_folder
from draftloop.models.gguf import CONVERTER_VERSION, convert_gguf, converted_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from draftloop.models.progress import Progress

IMPORTED_PREFIX = "imported:"
_NOTE = "draftloop.json"
_READ_BYTES = 1 << 22
_TOKENIZER_BYTES = 32 << 20
"""Room for the tokenizer's files beside the weights; the largest in use take half."""


@dataclass(frozen=True, slots=True)
class ConvertedModel:
    """One converted folder: what it was called when it was made, and where it is."""

    name: str
    folder: Path


def content_sha256(path: Path, progress: Progress) -> str:
    """The SHA-256 of a file, remembered while its size, times and inode stay the same.

    Raises:
        ModelUnreadable: the file cannot be read.
    """
    try:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        memo = cache_root() / "digests" / f"{key}.json"
        known = _read_json(memo)
        if known.get("stamp") == stamp:
            return str(known["sha256"])
        digest = hashlib.sha256()
        with path.open("rb") as file, progress.task(f"Reading {path.name}", status.st_size) as task:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                task.advance(len(block))
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error}", remedy="Check its permissions.") from error
    _write_json(memo, {"stamp": stamp, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def find(sha256: str) -> Path | None:
    """The folder converted from the GGUF file with this digest, by this version of the converter."""
    return next(iter(_root().glob(f"*-{_suffix(sha256)}")), None)


def convert(path: Path, sha256: str, name: str, progress: Progress) -> Path:
    """The 4-bit folder of the GGUF file `path`, converted where that has not been done.

    Args:
        path: the GGUF file.
        sha256: its digest.
        name: how lists shall call it.
        progress: is told of the conversion.

    Raises:
        ModelUnreadable: the file is damaged, or describes what no backend runs.
        StorageError: the disk is full or cannot be written.
    """
    with exclusive(_root() / _suffix(sha256)):
        found = find(sha256)
        if found is not None:
            return found
        folder = _root() / f"{path.stem}-{_suffix(sha256)}"
        require_space(
            make_folder(_root()), converted_bytes(path) + _TOKENIZER_BYTES, f"Converting {path.name}"
        )
        with new_folder(folder) as temporary:
            convert_gguf(path, temporary, progress)
            _check_converted(path, temporary)
            note = {"name": name, "gguf": path.name, "sha256": sha256, "converter": CONVERTER_VERSION}
            (temporary / _NOTE).write_text(json.dumps(note, indent=2), encoding="utf-8")
        return folder


def _check_converted(path: Path, folder: Path) -> None:
    """A GGUF file may lack tensors: then nothing is kept."""
    try:
        check_folder(folder)
    except ModelUnreadable as error:
        raise ModelUnreadable(f"{path} makes no whole model: {error.what}", remedy=error.remedy) from error


def list_converted() -> list[ConvertedModel]:
    """Every folder in the cache, imported ones under the name that they were given."""
    folders = [path for path in sorted(_root().glob("[!.]*")) if (path / _NOTE).is_file()]
    names = {folder: str(_read_json(folder / _NOTE).get("name", folder.name)) for folder in folders}
    aliases = {
        imported_folder(f"{IMPORTED_PREFIX}{file.stem}"): file.stem for file in _aliases().glob("*.json")
    }
    names |= {folder: f"{IMPORTED_PREFIX}{name}" for folder, name in aliases.items() if folder in names}
    return [ConvertedModel(name=name, folder=folder) for folder, name in names.items()]


def check_alias(name: str) -> None:
    """Whether `imported:NAME` may be called so.

    Raises:
        InputError: the name holds characters that a file name should not.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(
            f"{name!r} cannot name a model", remedy="Use letters, digits, '.', '-', '_' and '+'."
        )


def remember(folder: Path, name: str) -> str:
    """Give the converted `folder` the name `imported:NAME`; returns it."""
    _write_json(_aliases() / f"{name}.json", {"folder": folder.name})
    return f"{IMPORTED_PREFIX}{name}"


def imported_folder(name: str) -> Path | None:
    """The folder that `imported:NAME` stands for; None where it is gone.

    Raises:
        ModelNotFound: nothing was imported under this name.
    """
    stem = name.removeprefix(IMPORTED_PREFIX)
    known = {file.stem: file for file in _aliases().glob("*.json")}
    if stem not in known:
        raise ModelNotFound(
            f"Nothing was imported as {stem!r}", remedy="Run `draftloop models list` to see what was."
        )
    folder = _root() / str(_read_json(known[stem]).get("folder"))
    return folder if (folder / _NOTE).is_file() else None


def _suffix(sha256: str) -> str:
    return f"{sha256[:16]}-v{CONVERTER_VERSION}"


def _root() -> Path:
    return cache_root() / "converted"


def _aliases() -> Path:
    return cache_root() / "imported"


def _read_json(path: Path) -> dict[str, object]:
    """A small file of our own; one that is absent or damaged counts as empty, for it can be made again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, object]) -> None:
    make_folder(path.parent)
    with exclusive(path), new_file(path) as partial:
        partial.write_text(json.dumps(value), encoding="utf-8")
