"""The worker where memory runs out: who does not fit waits first in the queue, and is counted once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from draftloop.answers import Completion, PromptProgress
from draftloop.errors import OutOfMemory
from draftloop.server.figures import Outcome
from draftloop.server.queue import FairQueue
from draftloop.server.tickets import Cancelled, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepped import SteppedEngine

    from draftloop.answers import Event
    from draftloop.server.tickets import Job
    from draftloop.server.worker import Worker


async def read(ticket: Ticket) -> list[Event]:
    return [event async for event in ticket]


def make_scarce(
    engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch, work: str, room: int
) -> Callable[[], int]:
    """The target has memory for `room` answers at a time; gives how often it had none."""
    target, refused = engine.pair.target, []
    plain = getattr(target, work)

    def scarce(*jobs: object) -> object:
        # Who asks for caches is no member yet; who reads is one.
        present = len(engine.batches[-1].members) + (work == "new_cache") if engine.batches else 1
        if present > room:
            refused.append(present)
            raise OutOfMemory("memory ran out", remedy="Ask for less.")
        return plain(*jobs)

    monkeypatch.setattr(target, work, scarce)
    return lambda: len(refused)


@pytest.mark.parametrize("work", ["new_cache", "prefill"])
def test_who_does_not_fit_waits_and_is_the_next_one(
    engine: SteppedEngine,
    make_worker: Callable[..., Worker],
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    work: str,
) -> None:
    engine.most_together = 3
    refusals = make_scarce(engine, monkeypatch, work, room=2)
    worker = make_worker()
    names = [("a", "a 0"), ("a", "a 1"), ("a", "a 2"), ("b", "b 0"), ("a", "a 3")]
    jobs = [job(text, client=client) for client, text in names]

    async def ask() -> list[list[Event]]:
        tickets = [worker.submit(one) for one in jobs]
        engine.free()
        return await asyncio.gather(*map(read, tickets))

    told = asyncio.run(ask())
    for one, events in zip(jobs, told, strict=True):
        assert isinstance(events[-1], Completion)
        assert events[-1].token_ids == engine.complete(one.request).token_ids
    # One try after each end at the most: nobody asks again and again.
    assert 1 <= refusals() <= len(jobs)
    counts = worker.snapshot().counts
    assert counts.requests[Outcome.LENGTH] == sum(counts.requests.values()) == len(jobs)
    assert counts.prompt_tokens == sum(len(one.request.prompt_tokens) for one in jobs)
    (first_token,) = worker.figures.first_token_s.collect()
    assert next(one.value for one in first_token.samples if one.name.endswith("_count")) == len(jobs)


def test_alone_it_fails_with_what_ran_out(
    engine: SteppedEngine,
    make_worker: Callable[..., Worker],
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.free()
    make_scarce(engine, monkeypatch, "new_cache", room=0)
    worker = make_worker()

    async def ask() -> None:
        with pytest.raises(OutOfMemory, match="Ask for less"):
            await read(worker.submit(job()))

    asyncio.run(ask())
    assert worker.snapshot().counts.requests[Outcome.FAILED] == 1
    assert worker.snapshot().active == worker.snapshot().queued == 0


def test_who_was_put_off_can_go_away(
    engine: SteppedEngine,
    make_worker: Callable[..., Worker],
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.most_together = 3
    refusals = make_scarce(engine, monkeypatch, "prefill", room=1)
    worker = make_worker()

    async def ask() -> list[Event]:
        stays = worker.submit(job("stays", max_tokens=60, min_tokens=60))
        while len(engine.rounds) < 1 or not engine.rounds[0]:
            engine.step()
            await asyncio.sleep(0)
        goes = worker.submit(job("goes"))
        while not refusals() or worker.snapshot().queued != 1:
            engine.step()
            await asyncio.sleep(0)
        assert worker.snapshot().active == 1
        goes.cancel()
        engine.free()
        with pytest.raises(Cancelled):
            await read(goes)
        return await read(stays)

    events = asyncio.run(ask())
    assert isinstance(events[-1], Completion)
    assert sum(isinstance(event, PromptProgress) for event in events) >= 2
    counts = worker.snapshot().counts.requests
    assert counts[Outcome.CANCELLED] == counts[Outcome.LENGTH] == 1


def test_a_ticket_put_back_is_taken_next_whoever_waits(job: Callable[..., Job]) -> None:
    async def taken() -> list[str]:
        queue = FairQueue()
        for client in ("a", "a", "b", "c"):
            queue.put(Ticket(job(client=client), 0.0, 1.0))
        first = queue.take()
        assert first is not None
        queue.put_back(first)
        order = [queue.take() for _ in range(len(queue))]
        assert order[0] is first
        return [ticket.job.client for ticket in order if ticket is not None]

    assert asyncio.run(taken()) == ["a", "b", "c", "a"]
