"""A filled store, written once and only read afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from reporting.sample import write_store

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def filled_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `storage.directory` with the sample's store. Read it only."""
    directory = tmp_path_factory.mktemp("filled")
    write_store(directory)
    return directory
