"""A server in a process of its own, and what it tells of itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
from prometheus_client.parser import text_string_to_metric_families
from traffic import get

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

WAIT_S = 120


@dataclass(frozen=True, slots=True)
class Running:
    """One that serves.

    Attributes:
        process: `draftloop serve`.
        port: on this machine.
        model: the one that is served.
        said: its lines on stderr, so far.
    """

    process: subprocess.Popen[str]
    port: int
    model: str
    said: list[str]

    @property
    def resident_bytes(self) -> int:
        """Memory that it holds."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def bound_files(self, max_bytes: int) -> None:
        """From now on it can write no file longer than that, as on a full disk; -1 lifts the bound."""
        psutil.Process(self.process.pid).rlimit(psutil.RLIMIT_FSIZE, (max_bytes, psutil.RLIM_INFINITY))

    async def figures(self) -> dict[str, float]:
        """`/metrics`: each sample by its name and labels' values."""
        _, text = await get(self.port, "/metrics")
        return {
            " ".join([sample.name.removeprefix("draftloop_"), *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
        }

    async def at_rest(self) -> dict[str, float]:
        """The same, once nobody is answered and nobody waits."""
        while True:
            now = await self.figures()
            if now["requests_active"] == now["requests_queued"] == 0:
                return now


@contextlib.contextmanager
def running(
    options: Sequence[str],
    folder: Path,
    *flags: str,
) -> Iterator[Running]:
    """`draftloop <options> serve <flags>` in `folder`, at a free port; killed at the end, if it still runs.

    Args:
        options: global ones.
        folder: the current one.
        *flags: of the command.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "draftloop", *options, "serve", "--port", "0", *flags],
        cwd=folder,
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said: list[str] = []
    try:
        model, port = _served(process, said)
        yield Running(process, port, model, said)
    finally:
        process.kill()
        process.wait(WAIT_S)


def _served(process: subprocess.Popen[str], said: list[str]) -> tuple[str, int]:
    """What it serves and where. A thread reads what it says from then on, or it would wait for a reader."""
    stream = process.stderr
    assert stream is not None
    for line in stream:
        said.append(line)
        if line.startswith("serving "):
            threading.Thread(target=_read, args=(stream, said), daemon=True).start()
            model, _, address = line.removeprefix("serving ").partition(" at ")
            return model, int(address.split()[0].rpartition(":")[2])
    raise AssertionError(f"it ended before it served: {''.join(said)}")


def _read(stream: object, said: list[str]) -> None:
    with contextlib.suppress(ValueError):
        said.extend(stream)  # type: ignore[call-overload]
