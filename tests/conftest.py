"""Fixtures for every test: toy models, written once a session and shared. Treat the folders as read-only."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

import pupils
import toys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/conformance --device gpu` holds a GPU to the same suite."""
    parser.addoption("--device", choices=("cpu", "gpu"), default="cpu", help="where backends run")


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`toy_folder(**options)`: the folder of one toy (`toys.write_toy_folder`)."""
    written: dict[str, Path] = {}

    def write(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in written:
            written[key] = toys.write_toy_folder(tmp_path_factory.mktemp("toy"), **options)
        return written[key]

    return write


@pytest.fixture(scope="session")
def toy_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`toy_pair(**options)`: the folders of a target and its draft (`toys.write_toy_pair`)."""
    written: dict[str, tuple[Path, Path]] = {}

    def write(**options: Any) -> tuple[Path, Path]:
        key = repr(sorted(options.items()))
        if key not in written:
            written[key] = toys.write_toy_pair(tmp_path_factory.mktemp("pair"), **options)
        return written[key]

    return write


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classroom that is only copied from (`pupils.furnish`)."""
    folder = tmp_path_factory.mktemp("classroom")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pupils.furnish(folder, monkeypatch)
    return folder


@pytest.fixture
def classroom(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pupils.Classroom:
    """A classroom of one's own, and the current folder: a pair, and the requests that it answered."""
    folder = tmp_path / "classroom"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    return pupils.Classroom(folder)
