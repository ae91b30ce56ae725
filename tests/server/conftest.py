"""A worker with toys behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from stepped import SteppedEngine

from draftloop.answers import Request
from draftloop.backends.numpy.backend import NumpyBackend
from draftloop.models.tokenizer import Message, Tokenizer
from draftloop.server.tickets import Job
from draftloop.server.worker import Worker
from draftloop.speculation.stream import Pair
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def engine(toy_pair: Callable[..., tuple[Path, Path]]) -> SteppedEngine:
    target, draft = toy_pair(noise=0.05)
    backend = NumpyBackend()
    pair = Pair(*(backend.load(folder, max_kv_cache_tokens=160) for folder in (target, draft)))
    return SteppedEngine(backend, pair, Tokenizer.load(target), cache_clear_frequency=3)


@pytest.fixture
def make_worker(engine: SteppedEngine) -> Iterator[Callable[..., Worker]]:
    """`make_worker(**options)`: one that runs, and ends with the test."""
    made: list[Worker] = []

    def make(**options: Any) -> Worker:
        worker = Worker(engine, **{"max_queued_requests": 8, "request_timeout_s": 60.0, **options})
        worker.start()
        made.append(worker)
        return worker

    yield make
    engine.free()
    for worker in made:
        assert worker.stop(10)


@pytest.fixture
def job(engine: SteppedEngine) -> Callable[..., Job]:
    """`job("text", client="a", **request)`."""

    def make(text: str = "Hello", client: str = "somebody", **options: Any) -> Job:
        values = {"sampling": Sampling(), "max_tokens": 12, "min_tokens": 12, "num_draft_tokens": 4}
        tokens = engine.tokenizer.chat_tokens([Message("user", text)])
        return Job(Request(tokens, **{**values, **options}), client)

    return make
