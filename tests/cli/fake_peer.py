"""A peer of the benchmark that decodes nothing: it gives the figures that a test wants. Runs in a child."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.benchmarking.contenders import Answer
from draftloop.benchmarking.peers import Peer

if TYPE_CHECKING:
    from draftloop.benchmarking.child import PeerSetup
    from draftloop.benchmarking.contenders import Job

MARKED_TOKENS = 7
"""An answer of so many tokens makes `BREAKS` fail."""


@dataclass(frozen=True, slots=True)
class FakeProgram:
    """Ten tokens, at a speed that depends on the mode and the prompt."""

    setup: PeerSetup

    @property
    def description(self) -> str:
        return (
            f"fake, {'drafting' if self.setup.draft else 'alone'}, {self.setup.num_draft_tokens} draft tokens"
        )

    def answer(self, job: Job) -> Answer:
        print("a peer's chatter")
        print("a peer's log", file=sys.stderr)
        even = sum(job.prompt_tokens) % 2 == 0
        return Answer(tokens=10, seconds=1.0 if even == bool(self.setup.draft) else 2.0, rounds=5)


def open_fake(setup: PeerSetup) -> FakeProgram:
    return FakeProgram(setup)


def open_broken(setup: PeerSetup) -> FakeProgram:
    raise RuntimeError(f"no room for\n{setup.target.name}")


class Dying(FakeProgram):
    def answer(self, job: Job) -> Answer:
        if job.max_tokens == MARKED_TOKENS:
            sys.exit(3)
        return FakeProgram.answer(self, job)


def open_dying(setup: PeerSetup) -> FakeProgram:
    return Dying(setup)


PEERS = (
    Peer("fake", ("json",), "pip install fake", {"fake": False, "fake+draft": True}, open_fake),
    Peer("broken", ("json",), "pip install broken", {"broken": True}, open_broken, apple_only=True),
    Peer("dying", ("json",), "pip install dying", {"dying": True}, open_dying, apple_only=True),
    Peer("absent", ("no_such_module",), "pip install absent", {"absent": True}, open_fake),
    Peer("gguf", ("json",), "pip install gguf", {"gguf": True}, open_fake, reads_gguf=True),
)
