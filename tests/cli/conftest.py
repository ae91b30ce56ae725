"""Runs the command line as a user does: in this process, without a terminal; stdin is bytes, as in a pipe."""

from __future__ import annotations

import io
import logging
import sys
from typing import TYPE_CHECKING

import pytest
from cli_runner import Result, settings

from draftloop.cli.main import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def draftloop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Result]]:
    """`draftloop(*arguments, stdin=b"")`, in an empty folder, with caches of its own and no Hub."""
    from huggingface_hub import constants

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DRAFTLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    logger = logging.getLogger("draftloop")
    before = logger.handlers[:], logger.level

    def run_command(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        exit_status = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(exit_status, captured.out, captured.err)

    yield run_command
    logger.handlers[:], logger.level = before


@pytest.fixture
def toys_on_numpy(toy_pair: Callable[..., tuple[Path, Path]]) -> list[str]:
    """Global options that choose a toy pair and the reference backend."""
    target, draft = toy_pair()
    return settings(
        backend="numpy",
        **{"models.target.name": target, "models.draft.name": draft, "generation.max_tokens": 12},
        # A toy draft costs as much as its target: adaptive rounds would seldom draft.
        **{"speculative.schedule": "fixed"},
    )
