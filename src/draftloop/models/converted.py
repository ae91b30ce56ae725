"""The cache of GGUF models converted to 4-bit folders, found again by their content.

Contract: a folder is named after the SHA-256 of its GGUF file and the converter's version, so it is never
taken for another model's; `imported:` names give such a folder a name of its own. Must not know other kinds
of models.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.errors import InputError, ModelNotFound, ModelUnreadable
from draftloop.folders import cache_root
from draftloop.models.cache import (
    exclusive,
    make_folder,
    new_folder,
    read_json,
    require_space,
    storage_errors,
    write_json,
)
from draftloop.models.digests import content_sha256
from draftloop.models.folder import check_folder, damaged_files
from draftloop.models.gguf import CONVERTER_VERSION, convert_gguf, converted_bytes
from draftloop.models.gguf_file import read_gguf
from draftloop.models.progress import SilentProgress

if TYPE_CHECKING:
    from draftloop.models.progress import Progress

logger = logging.getLogger(__name__)

IMPORTED_PREFIX = "imported:"
_NOTE = "draftloop.json"
_MAX_STEM = 50
"""Characters of the GGUF file's name that its folder keeps; a file name has room for 255 bytes."""

_MAX_ALIAS_BYTES = 200

_TOKENIZER_BYTES = 32 << 20
"""Room for the tokenizer's files beside the weights; the largest in use take half."""


@dataclass(frozen=True, slots=True)
class ConvertedModel:
    """One converted folder: what it was called when it was made, and where it is."""

    name: str
    folder: Path


def find(sha256: str) -> Path | None:
    """The folder converted from the GGUF file with this digest, by this version of the converter.

    None where there is none, or a damaged one: then `convert` makes it again.
    """
    folder = _folder_of(sha256)
    return folder if folder is not None and _is_whole(folder) else None


def convert(path: Path, sha256: str, name: str, progress: Progress) -> Path:
    """The 4-bit folder of the GGUF file `path`; converted where that has not been done, or was damaged since.

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
        found = _folder_of(sha256)
        if found is not None and _is_whole(found) and not damaged_files(found):
            return found
        gguf = read_gguf(path)
        if found is not None:
            logger.warning("%s is damaged; it is deleted and made again", found)
            with storage_errors(f"deleting {found}"):
                shutil.rmtree(found)
        # Names that begin with a dot are the locks' and the unfinished folders'.
        folder = _root() / f"{path.stem[:_MAX_STEM].lstrip('.')}-{_suffix(sha256)}"
        require_space(
            make_folder(_root()), converted_bytes(gguf) + _TOKENIZER_BYTES, f"Converting {path.name}"
        )
        with new_folder(folder) as temporary:
            convert_gguf(gguf, temporary, progress)
            _check_converted(path, temporary)
            if content_sha256(path, SilentProgress()) != sha256:
                raise ModelUnreadable(
                    f"{path} was changed while it was converted", remedy="Run the same command again."
                )
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
    """Every name of every folder in the cache.

    An imported one has its aliases; the name under which it was made is a path then, and is left out.
    """
    aliases = [
        ConvertedModel(f"{IMPORTED_PREFIX}{file.stem}", _root() / str(read_json(file).get("folder")))
        for file in sorted(_aliases().glob("*.json"))
    ]
    imported = {alias.folder for alias in aliases}
    folders = [path for path in sorted(_root().glob("[!.]*")) if (path / _NOTE).is_file()]
    found = [alias for alias in aliases if alias.folder in folders]
    for folder in folders:
        name = str(read_json(folder / _NOTE).get("name", folder.name))
        if folder not in imported or not Path(name).is_absolute():
            found.append(ConvertedModel(name, folder))
    return found


def check_alias(name: str) -> None:
    """Whether `imported:NAME` may be called so.

    Raises:
        InputError: the name is too long, or holds characters that a file name should not.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(name.encode()) > _MAX_ALIAS_BYTES:
        raise InputError(
            f"{name!r:.99} cannot name a model",
            remedy=f"Use letters, digits, '.', '-', '_' and '+', {_MAX_ALIAS_BYTES} bytes at most.",
        )


def remember(folder: Path, name: str, source: Path) -> str:
    """Give the folder converted from `source` the name `imported:NAME`; returns it."""
    write_json(_aliases() / f"{name}.json", {"folder": folder.name, "source": str(source.absolute())})
    return f"{IMPORTED_PREFIX}{name}"


def imported_folder(name: str) -> Path | None:
    """The folder that `imported:NAME` stands for; None where it is gone or damaged.

    Raises:
        ModelNotFound: nothing was imported under this name.
    """
    folder = _root() / str(_alias(name).get("folder"))
    return folder if _is_whole(folder) else None


def imported_source(name: str, progress: Progress) -> Path:
    """The GGUF file that `imported:NAME` was made from.

    Raises:
        ModelNotFound: nothing was imported under this name, or the file is gone or another one by now.
    """
    alias = _alias(name)
    source = Path(str(alias.get("source")))
    try:
        unchanged = str(alias.get("folder")).endswith(_suffix(content_sha256(source, progress)))
    except ModelUnreadable:
        unchanged = False
    if not unchanged:
        raise ModelNotFound(
            f"{name} was removed from the cache or is damaged there", remedy="Import its .gguf file again."
        )
    return source


def _alias(name: str) -> dict[str, object]:
    stem = name.removeprefix(IMPORTED_PREFIX)
    known = {file.stem: file for file in _aliases().glob("*.json")}
    if stem not in known:
        raise ModelNotFound(
            f"Nothing was imported as {stem!r:.99}", remedy="Run `draftloop models list` to see what was."
        )
    return read_json(known[stem])


def _folder_of(sha256: str) -> Path | None:
    return next(iter(_root().glob(f"*-{_suffix(sha256)}")), None)


def _is_whole(folder: Path) -> bool:
    """Whether every tensor is there, and the note, which is written last."""
    try:
        check_folder(folder)
    except ModelUnreadable:
        return False
    return "sha256" in read_json(folder / _NOTE)


def _suffix(sha256: str) -> str:
    return f"{sha256[:16]}-v{CONVERTER_VERSION}"


def _root() -> Path:
    return cache_root() / "converted"


def _aliases() -> Path:
    return cache_root() / "imported"
