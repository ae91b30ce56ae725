"""A peer in a process of its own: its memory, its threads and what it prints stay apart from ours.

Contract: answers come back in the order of the jobs; what a peer raises becomes one error that names it. Must
not know any peer.
"""

from __future__ import annotations

import multiprocessing
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import psutil

from draftloop.errors import DraftloopError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from pathlib import Path

    from draftloop.benchmarking.contenders import Answer, Job

    Open = Callable[["PeerSetup"], "Program"]

END_TIMEOUT_S = 10


def usable_cores() -> int:
    """Cores that this process may use: all of the machine's, or what it was confined to."""
    allowed = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else None
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return cores if allowed is None else min(cores, allowed)


@dataclass(frozen=True, slots=True)
class PeerSetup:
    """What a peer needs to know of the pair.

    Attributes:
        target, draft: a folder of safetensors, or a GGUF file, as the peer reads; no draft: the target alone.
        num_draft_tokens: K.
        max_context_tokens: prompt and answer together.
        threads: of the processor.
        device: `auto`, `cpu` or `gpu`.
        eos_token_ids: any of them ends an answer.
    """

    target: Path
    draft: Path | None
    num_draft_tokens: int
    max_context_tokens: int
    threads: int
    device: str
    eos_token_ids: tuple[int, ...]


class Program(Protocol):
    """A peer with its models loaded, in the child."""

    @property
    def description(self) -> str:
        """Program, version, how it is set."""
        ...

    def answer(self, job: Job) -> Answer:
        """Decode one answer."""
        ...


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a peer raised, as text: its own types may not exist over here."""

    text: str


class ChildContender:
    """A contender whose program runs in a child. Use it as a context manager.

    Args:
        name: of the mode.
        open_program: loads the program; a function at the top of a module, because the child imports it.
        setup: is handed to it.

    Raises:
        DraftloopError: the program could not be loaded.
    """

    def __init__(self, name: str, open_program: Open, setup: PeerSetup) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, open_program, setup), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.description: str = self._receive()
        except BaseException:
            self.close()
            raise

    def answer(self, job: Job) -> Answer:
        """See `Contender`.

        Raises:
            DraftloopError: the program failed or ended.
        """
        # A child that has ended is told of by what is received from it.
        with suppress(ConnectionError):
            self._pipe.send(job)
        answer: Answer = self._receive()
        return answer

    def close(self) -> None:
        """End the child."""
        self._pipe.close()
        self._process.join(END_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the child, whatever happened."""
        self.close()

    def _receive(self) -> Any:
        try:
            message = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(END_TIMEOUT_S)
            message = _Failure(f"its process ended with exit code {self._process.exitcode}")
        if isinstance(message, _Failure):
            raise DraftloopError(f"{self.name} failed: {message.text}", remedy="Leave it out of the modes.")
        return message


def _serve(pipe: Connection, open_program: Open, setup: PeerSetup) -> None:
    """Answer jobs until the pipe closes. Runs in the child."""
    _silence()
    try:
        program = open_program(setup)
        pipe.send(program.description)
        while True:
            pipe.send(program.answer(pipe.recv()))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(_Failure(f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]))


def _silence() -> None:
    """Peers write as they like, also from C; our stdout and stderr are not theirs."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
