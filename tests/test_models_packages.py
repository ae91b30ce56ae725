"""Models inside packages: going on after interruptions, refusing what is wrong, leaving nothing half."""

from __future__ import annotations

import errno
import hashlib
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from draftloop import folders
from draftloop.errors import DownloadError, ModelNotFound, StorageError
from draftloop.folders import cache_root
from draftloop.models import cache, packages
from draftloop.models.packages import PackageModel, download, gguf_path, package_model
from draftloop.models.progress import SilentProgress
from models_samples import RecordedProgress

CONTENT = np.random.default_rng(0).integers(0, 256, 2500, dtype=np.uint8).tobytes()
MODEL = PackageModel(
    name="package:tiny",
    project="tiny-part{part}==1.0",
    member="tiny_part{part}/data/part{part:02d}.bin",
    num_parts=3,
    part_bytes=1000,
    total_bytes=2500,
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


class Index:
    """Stands for pip: writes the wheel asked for, and fails where it is told to."""

    def __init__(self, content=CONTENT):
        self.content = content
        self.fetched = []
        self.fail_at = None

    def __call__(self, requirement, folder):
        part = int(requirement.split("part")[1].split("=")[0])
        if part == self.fail_at:
            raise DownloadError(f"the line broke at {requirement}", remedy="Try again.")
        self.fetched.append(part)
        wheel = Path(folder) / f"tiny_part{part}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"tiny_part{part}/__init__.py", "raise SystemExit('code was run')")
            data = self.content[(part - 1) * 1000 : part * 1000]
            archive.writestr(f"tiny_part{part}/data/part{part:02d}.bin", data)
        return wheel


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "cache"))


def files_in_cache():
    """Every file and its parts in the cache, but not the locks."""
    folder = cache_root() / "packages"
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock"))


def full_disk(monkeypatch, ending):
    """From now on files whose name ends so cannot be written: the disk is full."""
    original = Path.open

    def opened(self, mode="r", *args, **kwargs):
        file = original(self, mode, *args, **kwargs)
        if "w" not in mode or not self.name.endswith(ending):
            return file

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                file.write(data[:10])
                raise OSError(errno.ENOSPC, "No space left on device")

        return Full()

    monkeypatch.setattr(Path, "open", opened)


def test_the_parts_become_one_file_and_nothing_else_stays():
    progress = RecordedProgress()
    path = download(MODEL, progress, Index())
    assert path == gguf_path(MODEL)
    assert path.read_bytes() == CONTENT
    assert files_in_cache() == ["tiny.gguf"]
    assert [(task.done_bytes, task.total_bytes) for task in progress.tasks] == [(2500, 2500), (2500, 2500)]


def test_what_is_there_is_not_fetched_again():
    download(MODEL, SilentProgress(), Index())
    index = Index()
    assert download(MODEL, SilentProgress(), index).read_bytes() == CONTENT
    assert index.fetched == []


def test_an_interrupted_download_goes_on_with_the_next_part():
    index = Index()
    index.fail_at = 3
    with pytest.raises(DownloadError, match="the line broke"):
        download(MODEL, SilentProgress(), index)
    assert not gguf_path(MODEL).exists()
    assert files_in_cache() == ["part01", "part02"]
    index.fail_at, index.fetched = None, []
    assert download(MODEL, SilentProgress(), index).read_bytes() == CONTENT
    assert index.fetched == [3]


def test_a_wrong_digest_is_refused_and_everything_is_deleted():
    changed = CONTENT[:1700] + bytes([CONTENT[1700] ^ 1]) + CONTENT[1701:]
    with pytest.raises(DownloadError, match=MODEL.sha256):
        download(MODEL, SilentProgress(), Index(changed))
    assert files_in_cache() == []
    assert download(MODEL, SilentProgress(), Index()).read_bytes() == CONTENT


def test_a_part_of_the_wrong_size_is_refused_and_not_kept():
    with pytest.raises(DownloadError, match=r"part03\.bin.*400 bytes instead of 500"):
        download(MODEL, SilentProgress(), Index(CONTENT[:2400]))
    assert files_in_cache() == ["part01", "part02"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "member"])
def test_a_damaged_wheel_is_refused(damage):
    def fetch(requirement, folder):
        wheel = Index()(requirement, folder)
        data = bytearray(wheel.read_bytes())
        if damage == "truncated":
            wheel.write_bytes(data[:-40])
        elif damage == "flipped":
            data[data.index(CONTENT[:50]) + 20] ^= 255
            wheel.write_bytes(data)
        else:
            wheel.write_bytes(data.replace(b"part01.bin", b"part09.bin"))
        return wheel

    with pytest.raises(DownloadError, match="damaged or lacks"):
        download(MODEL, SilentProgress(), fetch)
    assert files_in_cache() == []


@pytest.mark.parametrize(
    ("ending", "kept"), [("part02.partial", ["part01"]), ("gguf.partial", ["part01", "part02", "part03"])]
)
def test_a_disk_that_fills_up_leaves_the_finished_parts(monkeypatch, ending, kept):
    with monkeypatch.context() as patch:
        full_disk(patch, ending)
        with pytest.raises(StorageError, match="disk became full"):
            download(MODEL, SilentProgress(), Index())
    assert files_in_cache() == kept
    index = Index()
    assert download(MODEL, SilentProgress(), index).read_bytes() == CONTENT
    assert index.fetched == [part for part in (1, 2, 3) if f"part{part:02d}" not in kept]


def test_too_little_room_is_said_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 70_000_000})())
    monkeypatch.setattr(cache, "SPARE_BYTES", 69_999_000)
    index = Index()
    with pytest.raises(StorageError, match=r"needs 70,005,000 bytes.*70,000,000 are free"):
        download(MODEL, SilentProgress(), index)
    assert index.fetched == []


def test_two_at_once_fetch_each_part_once():
    index, other_is_in = Index(), threading.Event()
    paths = []

    def fetch(requirement, folder):
        if requirement in seen:
            other_is_in.set()
        seen.append(requirement)
        other_is_in.wait(0.05)
        return index(requirement, folder)

    seen = []
    threads = [
        threading.Thread(target=lambda: paths.append(download(MODEL, SilentProgress(), fetch)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT]
    assert index.fetched == [1, 2, 3]


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="DRAFTLOOP_CACHE"):
        download(MODEL, SilentProgress(), Index())


def test_the_table_is_consistent():
    for model in packages.PACKAGE_MODELS:
        sizes = [model.bytes_of_part(part) for part in range(1, model.num_parts + 1)]
        assert sum(sizes) == model.total_bytes
        assert 0 < sizes[-1] <= model.part_bytes
        assert len(model.sha256) == 64
        assert package_model(model.name) is model


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ModelNotFound, match="package:smollm2-135m-instruct"):
        package_model("package:gpt-5")


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            "WARNING: x\nERROR: No matching distribution found for a==1\n",
            "No matching distribution.*it goes on",
        ),
        ("/bin/python: No module named pip\n", "ensurepip"),
        ("", "exit status 1"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'refused'\nERROR: No matching\n",
            "connection broken by 'refused'",
        ),
    ],
)
def test_pips_last_error_is_passed_on(monkeypatch, tmp_path, stderr, message):
    result = type("Result", (), {"returncode": 1, "stderr": stderr, "stdout": ""})()
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: result)
    with pytest.raises(DownloadError, match=message):
        packages.fetch_with_pip("a==1", tmp_path)


def test_pip_finds_a_wheel_where_the_users_settings_say(monkeypatch, tmp_path):
    """The real pip, from a folder: no index is asked."""
    shelf, target = tmp_path / "shelf", tmp_path / "target"
    shelf.mkdir()
    target.mkdir()
    with zipfile.ZipFile(shelf / "tiny_part1-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(
            "tiny_part1-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-part1\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_part1-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    assert packages.fetch_with_pip("tiny-part1==1.0", target).parent == target
    with pytest.raises(DownloadError, match="tiny-part2"):
        packages.fetch_with_pip("tiny-part2==1.0", target / "empty")


@pytest.mark.parametrize(
    ("own", "xdg", "platform", "expected"),
    [
        ("/own", "/xdg", "linux", "/own"),
        ("", "/xdg", "linux", "/xdg/draftloop"),
        ("", "", "linux", "~/.cache/draftloop"),
        ("", "", "darwin", "~/Library/Caches/draftloop"),
    ],
)
def test_where_the_cache_is(monkeypatch, own, xdg, platform, expected):
    monkeypatch.setenv("DRAFTLOOP_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setattr(folders.sys, "platform", platform)
    assert cache_root() == Path(expected).expanduser()
