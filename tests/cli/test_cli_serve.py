"""`draftloop serve`: what it refuses, what it says, and how it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from cli_runner import settings

from draftloop.server.serving import bind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cli_runner import Result

WAIT_S = 60


@contextmanager
def running(
    options: list[str], folder: Path, *flags: str
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A server in a process of its own, and what it said until it served."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DRAFTLOOP_CACHE": str(folder / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "draftloop", *options, "serve", "--port", "0", *flags],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, said_by(process)
    finally:
        process.kill()
        process.wait(WAIT_S)
        assert process.stderr is not None
        process.stderr.close()


def said_by(process: subprocess.Popen[str]) -> list[str]:
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line.rstrip())
        if line.startswith("serving "):
            return said
    raise AssertionError(f"it ended before it served: {said}")


def address_in(said: list[str]) -> str:
    return said[-1].partition(" at ")[2].split()[0]


def test_beyond_loopback_a_key_is_demanded(
    draftloop: Callable[..., Result], toys_on_numpy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRAFTLOOP_API_KEY", raising=False)
    for words in (("serve", "--host", "0.0.0.0"), (*settings(**{"server.host": "::"}), "serve")):
        draftloop(*toys_on_numpy, *words).assert_wrong_input("server.host", "DRAFTLOOP_API_KEY")


def test_a_port_in_use_is_refused_before_the_models_are_loaded(
    draftloop: Callable[..., Result], toys_on_numpy: list[str]
) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        draftloop(*toys_on_numpy, "serve", "--port", port).assert_wrong_input(str(port), "in use", "--port")


def test_a_wrong_port_names_the_flag(draftloop: Callable[..., Result]) -> None:
    draftloop("serve", "--port", "65536").assert_wrong_input("server.port", "65536", "--port")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_key_is_not_shown_with_the_settings(draftloop: Callable[..., Result], flags: list[str]) -> None:
    shown = draftloop(*settings(**{"server.api_key": "let-me-in"}), "config", "show", *flags)
    shown.assert_done()
    assert "server.api_key" in shown.out
    assert "let-me-in" not in shown.out


def test_without_its_packages_it_says_what_to_install(
    draftloop: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    draftloop("serve").assert_wrong_input("uvicorn", "pip install 'draftloop[server]'")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_stops_when_told(
    toys_on_numpy: list[str], tmp_path: Path, sign: signal.Signals
) -> None:
    with running(toys_on_numpy, tmp_path / "here", "--no-collect", "--no-learn") as (process, said):
        with urllib.request.urlopen(f"{address_in(said)}/ready", timeout=WAIT_S) as response:
            assert response.read() == b'{"status":"ready"}'
        process.send_signal(sign)
        assert process.wait(WAIT_S) == 0
    assert not (tmp_path / "here" / "data").exists()


def test_without_a_terminal_each_stage_is_a_line_when_it_begins(
    toys_on_numpy: list[str], tmp_path: Path
) -> None:
    adaptive = [*toys_on_numpy, *settings(**{"speculative.schedule": "adaptive"})]
    with running(adaptive, tmp_path / "here", "--no-collect") as (_, said):
        assert said[:-1] == [
            "preparing the models",
            "loading the models",
            "note: measuring what rounds cost here (once for this pair)",
        ]


def test_a_key_is_not_shown_to_who_starts_it(toys_on_numpy: list[str], tmp_path: Path) -> None:
    keyed = [*toys_on_numpy, *settings(**{"server.api_key": "let-me-in"})]
    with running(keyed, tmp_path / "here", "--no-collect") as (process, said):
        assert process.stderr is not None
        said.append(process.stderr.readline())
        assert said[-1].endswith("OPENAI_API_KEY=<your key>\n")
        assert "let-me-in" not in "".join(said)
