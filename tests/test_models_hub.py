"""Models of the Hub: cached, downloaded, refused, broken off, mended."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from draftloop.errors import DownloadError, ModelNotFound, ModelUnreadable, StorageError
from draftloop.models import cache
from draftloop.models.folder import check_folder
from draftloop.models.resolve import Availability, exists, locate, pull, resolve
from models_samples import HUB_NAME, RecordedProgress, empty_caches, put_into_hub_cache, write_gguf


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    empty_caches(tmp_path, monkeypatch)


@pytest.fixture
def tiny(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf").path


def test_a_cached_hub_model_needs_no_network(tiny, tmp_path):
    folder = put_into_hub_cache(resolve(str(tiny)), tmp_path)
    assert resolve(HUB_NAME) == folder
    assert exists(HUB_NAME) is Availability.CACHED


@pytest.mark.parametrize("action", [resolve, exists, pull])
def test_without_a_connection_the_offline_pair_is_named(action):
    with pytest.raises(DownloadError, match=r"cannot be reached.*configs/offline\.yaml"):
        action(HUB_NAME)


def test_a_half_downloaded_hub_model_is_not_taken_for_whole(tiny, tmp_path):
    folder = put_into_hub_cache(resolve(str(tiny)), tmp_path)
    (folder / "model.safetensors").unlink()
    assert locate(HUB_NAME) is None
    with pytest.raises(DownloadError, match=r"configs/offline\.yaml"):
        resolve(HUB_NAME)


class Response:
    """As much of an HTTP response as the Hub's errors keep."""

    def __init__(self, status_code):
        self.status_code, self.headers, self.request, self.text = status_code, {}, None, ""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (hub_errors.RepositoryNotFoundError("404", response=Response(404)), ModelNotFound, "shows no model"),
        (hub_errors.GatedRepoError("403", response=Response(403)), ModelNotFound, "gated"),
        (hub_errors.HfHubHTTPError("500 broken", response=Response(500)), DownloadError, "500 broken"),
        (hub_errors.OfflineModeIsEnabled("offline mode"), DownloadError, r"configs/offline\.yaml"),
    ],
)
def test_what_the_hub_answers_becomes_one_clear_error(monkeypatch, error, kind, message):
    def model_info(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(kind, match=message):
        exists(HUB_NAME)


@pytest.fixture
def hub(monkeypatch, tiny, tmp_path):
    """A Hub with one model, whose download lays it down in the cache."""
    source = resolve(str(tiny))
    files = [huggingface_hub.hf_api.RepoSibling(p.name, size=p.stat().st_size) for p in source.iterdir()]

    Hub = SimpleNamespace(files_listed=files, failure=None, folder=None, config={}, asked=[])

    def model_info(self, repo, **_):
        return huggingface_hub.hf_api.ModelInfo(
            id=repo,
            sha="a" * 40,
            siblings=[{"rfilename": f.rfilename, "size": f.size} for f in Hub.files_listed],
        )

    real = huggingface_hub.snapshot_download

    def snapshot_download(repo, *, local_files_only=False, allow_patterns=None, tqdm_class=None, **options):
        if local_files_only:
            return real(repo, local_files_only=True, allow_patterns=allow_patterns)
        Hub.asked.append(allow_patterns)
        if "local_dir" in options:
            config = {**json.loads((source / "config.json").read_text()), **Hub.config}
            (Path(options["local_dir"]) / "config.json").write_text(json.dumps(config))
            return options["local_dir"]
        if Hub.failure:
            raise Hub.failure
        if options.get("force_download"):
            for name in allow_patterns:
                shutil.copy(source / name, Hub.folder / name)
            return str(Hub.folder)
        bar = tqdm_class(total=0, unit="B", name="huggingface_hub.snapshot_download", disable=False)
        tqdm_class(total=0, unit="B", name="huggingface_hub.snapshot_download.transfer").update(77)
        bar.update(100)
        bar.update(50)
        if Hub.folder is None:
            Hub.folder = put_into_hub_cache(source, tmp_path)
        return str(Hub.folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return Hub


def test_a_hub_model_is_downloaded_with_progress(hub):
    assert exists(HUB_NAME) is Availability.DOWNLOADABLE
    progress = RecordedProgress()
    folder = resolve(HUB_NAME, progress=progress)
    check_folder(folder)
    (task,) = progress.tasks
    assert task.label == f"Downloading {HUB_NAME}"
    assert task.total_bytes == sum(file.size for file in hub.files_listed)
    assert task.done_bytes == 150


def test_a_hub_repository_without_safetensors_is_refused(hub):
    hub.files_listed = [huggingface_hub.hf_api.RepoSibling("model-q4.gguf", size=5)]
    with pytest.raises(ModelNotFound, match=r"has no model\*\.safetensors"):
        resolve(HUB_NAME)


def test_no_room_for_a_hub_model(hub, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(StorageError, match="1,000 are free"):
        resolve(HUB_NAME)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "disk became full"),
        (ConnectionResetError(104, "Connection reset by peer"), DownloadError, "broke off.*it goes on"),
        (RuntimeError("Data processing error"), DownloadError, "broke off"),
    ],
)
def test_a_hub_download_that_breaks(hub, failure, kind, message):
    hub.failure = failure
    with pytest.raises(kind, match=message):
        resolve(HUB_NAME)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


EIGHT_BITS = {"quantization": {"group_size": 64, "bits": 8}}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("action", [resolve, exists, locate])
def test_a_cached_model_that_no_backend_runs_is_refused_as_such(tiny, tmp_path, action, complete):
    folder = put_into_hub_cache(resolve(str(tiny)), tmp_path)
    change_config(folder, **EIGHT_BITS)
    if not complete:
        (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnreadable, match=r"Name-4bit.*8-bit weights.*unsupported"):
        action(HUB_NAME)


def test_a_model_that_no_backend_runs_is_refused_before_its_weights_are_downloaded(hub):
    hub.config = EIGHT_BITS
    with pytest.raises(
        ModelUnreadable, match=rf"{HUB_NAME} on the Hub cannot be used: config\.json: .*8-bit"
    ):
        resolve(HUB_NAME)
    assert hub.asked == [["config.json"]]
    assert not (Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--owner--Name-4bit").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pull_downloads_a_damaged_file_again(hub, name):
    damaged = resolve(HUB_NAME) / name
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-5])
    if name != "tokenizer.json":
        with pytest.raises(ModelUnreadable, match=rf"{name}.*[Pp]ull"):
            resolve(HUB_NAME)
    hub.asked.clear()
    check_folder(pull(HUB_NAME))
    assert damaged.read_bytes() == whole
    assert hub.asked[-1] == [name]
