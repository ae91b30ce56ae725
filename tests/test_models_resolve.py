"""Names to folders: every kind of name, what is made once and found again, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from draftloop.errors import InputError, ModelNotFound, ModelUnreadable, StorageError
from draftloop.folders import cache_root
from draftloop.models.folder import check_folder
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
from models_samples import (
    HUB_NAME,
    RecordedProgress,
    empty_caches,
    package_of,
    put_into_hub_cache,
    write_gguf,
)
from test_models_packages import full_disk


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    empty_caches(tmp_path, monkeypatch)


@pytest.fixture
def tiny(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf").path


@pytest.fixture
def package(monkeypatch, tiny):
    return package_of(tiny, monkeypatch)


def test_a_gguf_file_is_converted_once_and_found_by_its_content(tiny, tmp_path, monkeypatch):
    progress = RecordedProgress()
    assert exists(str(tiny)) is Availability.NEEDS_CONVERSION
    assert locate(str(tiny)) is None
    folder = resolve(str(tiny), progress=progress)
    check_folder(folder)
    assert [task.label for task in progress.tasks] == ["Converting tiny.gguf"], "its digest is known by now"
    again = RecordedProgress()
    moved = tiny.rename(tmp_path / "renamed.gguf")
    monkeypatch.chdir(tmp_path)
    assert resolve("renamed.gguf", progress=again) == folder == locate(str(moved))
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
    assert not [path for path in (cache_root() / "converted").glob("*") if path.is_dir()]


def test_a_gguf_that_lacks_tensors_leaves_no_folder(tmp_path):
    path = write_gguf(tmp_path / "part.gguf", drop=("output_norm.weight",)).path
    with pytest.raises(ModelUnreadable, match=r"part\.gguf makes no whole model.*model\.norm"):
        resolve(str(path))
    assert not [path for path in (cache_root() / "converted").glob("*") if path.is_dir()]


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


def test_a_local_folder_is_itself(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "models" / "mine"
    shutil.copytree(resolve(str(tiny)), folder)
    monkeypatch.chdir(tmp_path)
    assert resolve("models/mine").resolve() == folder
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


def test_the_note_in_a_converted_folder_tells_where_it_came_from(tiny):
    note = json.loads((resolve(str(tiny)) / "draftloop.json").read_text())
    assert note["gguf"] == "tiny.gguf"
    assert len(note["sha256"]) == 64


def test_a_path_that_may_not_be_looked_at_is_said_so(tmp_path, monkeypatch):
    forbidden = tmp_path / "secret" / "model"
    original = Path.stat

    def stat(self, **options):
        if "secret" in str(self):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    for name in (forbidden, f"{forbidden}.gguf"):
        for action in (kind_of, resolve, exists, locate, pull):
            with pytest.raises(ModelUnreadable, match=r"secret.*Permission denied.*permissions"):
                action(str(name))
    with pytest.raises(ModelUnreadable, match="Permission denied"):
        import_gguf(forbidden)


@pytest.mark.parametrize("name", ["./" + "x" * 5000, "/" + "x/" * 2500 + "m.gguf", "~nosuchuser/m"])
def test_a_path_that_cannot_be_is_wrong_input(name):
    for action in (resolve, exists, pull, lambda name: import_gguf(Path(name))):
        with pytest.raises(InputError) as caught:
            action(name)
        assert caught.value.exit_status == 2
        assert len(str(caught.value)) < 400


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ModelUnreadable, match="cannot be read"):
        resolve(str(tmp_path / "a"))


def test_a_cache_below_no_home_is_wrong_input(tiny, monkeypatch):
    monkeypatch.setenv("DRAFTLOOP_CACHE", "~nosuchuser/cache")
    with pytest.raises(InputError, match="DRAFTLOOP_CACHE"):
        resolve(str(tiny))


def test_an_alias_too_long_for_a_file_name_does_no_work(tiny):
    with pytest.raises(InputError, match="200 bytes at most"):
        import_gguf(tiny, "x" * 300)


@pytest.mark.parametrize("stem", ["." + "hidden", "é" * 100, "\U0001f642" * 60, "\udcff"])
def test_any_file_name_can_be_converted_and_found_again(tiny, stem):
    path = tiny.rename(tiny.with_name(f"{stem}.gguf"))
    assert resolve(str(path)) == locate(str(path))
    assert [model.name for model in list_models()] == [str(path)]
