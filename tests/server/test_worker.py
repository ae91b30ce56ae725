"""The worker through its tickets: order, fairness, bounds, cancellation, failures, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING

import pytest

from draftloop.answers import Completion, Event, RoundDone
from draftloop.batch import Batch
from draftloop.errors import ContextFull
from draftloop.member import Member
from draftloop.server.figures import Outcome
from draftloop.server.queue import FairQueue
from draftloop.server.tickets import AnswerFailed, Cancelled, QueueFull, ShuttingDown, TimedOut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stepped import SteppedEngine

    from draftloop.answers import Failed, PutOff
    from draftloop.server.tickets import Job, Ticket
    from draftloop.server.worker import Worker


async def read(ticket: Ticket) -> list[Event]:
    return [event async for event in ticket]


async def ask_once(worker: Worker, job: Job) -> list[Event]:
    return await read(worker.submit(job))


def completion_of(events: list[Event]) -> Completion:
    assert isinstance(events[-1], Completion)
    return events[-1]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_a_ticket_gives_what_the_engine_gives_made_by_one_thread(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    engine.free()
    expected = engine.complete(job("One").request)
    engine.threads.clear()
    worker = make_worker()

    async def ask() -> list[list[Event]]:
        return await asyncio.gather(*(read(worker.submit(job("One"))) for _ in range(3)))

    for events in asyncio.run(ask()):
        assert completion_of(events).token_ids == expected.token_ids
        assert sum(isinstance(event, RoundDone) for event in events) == expected.tally.rounds
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads
    assert worker.snapshot().counts.requests[Outcome.LENGTH] == 3


def test_clients_take_turns(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    worker = make_worker()

    async def ask() -> None:
        greedy = [worker.submit(job(f"greedy {number}", client="greedy")) for number in range(4)]
        await until(lambda: worker.snapshot().active == 1)
        others = [worker.submit(job(f"other {name}", client=name)) for name in ("b", "c")]
        engine.free()
        await asyncio.gather(*(read(ticket) for ticket in [*greedy, *others]))

    asyncio.run(ask())
    texts = [text.partition("user\n")[2].partition("\n")[0] for text in engine.begun]
    assert texts == ["greedy 0", "greedy 1", "other b", "other c", "greedy 2", "greedy 3"]


def test_nobody_looks_into_the_queue_without_its_lock(
    engine: SteppedEngine,
    make_worker: Callable[..., Worker],
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, count = make_worker(), FairQueue.__len__

    def counted(queue: FairQueue) -> int:
        # Who counts while another thread adds a client would fail, and the models' thread with him.
        assert worker._changed._is_owned()  # type: ignore[attr-defined]
        return count(queue)

    monkeypatch.setattr(FairQueue, "__len__", counted)
    engine.free()

    async def ask() -> None:
        tickets = [worker.submit(job(client=name)) for name in ("a", "b", "c")]
        for ticket in tickets:
            completion_of(await read(ticket))

    asyncio.run(ask())
    assert worker.snapshot().ready


def test_the_queue_is_bounded_and_cancelling_frees_a_place_in_it(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    worker = make_worker(max_queued_requests=2)

    async def ask() -> None:
        tickets = [worker.submit(job()) for _ in range(3)]
        await until(lambda: worker.snapshot().active == 1)
        with pytest.raises(QueueFull, match="2 requests wait") as refused:
            worker.submit(job())
        assert refused.value.retry_after_s >= 1
        tickets[1].cancel()
        tickets[1].cancel()
        assert worker.snapshot().queued == 1
        tickets.append(worker.submit(job()))
        engine.free()
        with pytest.raises(Cancelled):
            await read(tickets[1])
        for index in (0, 2, 3):
            completion_of(await read(tickets[index]))

    asyncio.run(ask())
    counts = worker.snapshot().counts
    assert counts.requests[Outcome.QUEUE_FULL] == 1
    assert counts.requests[Outcome.CANCELLED] == 1


def test_a_burst_fills_the_queue_whether_or_not_the_worker_was_quicker(
    make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    worker = make_worker(max_queued_requests=3)

    async def ask() -> None:
        for _ in range(4):
            worker.submit(job())
        with pytest.raises(QueueFull):
            worker.submit(job())

    asyncio.run(ask())


def test_a_reader_that_leaves_frees_its_place_within_one_round(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    worker = make_worker()

    async def ask() -> int:
        gone, other = worker.submit(job("gone")), worker.submit(job("other"))
        events = aiter(gone)
        first = asyncio.ensure_future(anext(events))
        while not engine.rounds or engine.rounds[0] < 2:
            engine.step()
            await asyncio.sleep(0)
        await first
        await events.aclose()  # type: ignore[attr-defined]
        before = engine.rounds[0]
        engine.free()
        completion_of(await read(other))
        return engine.rounds[0] - before

    assert asyncio.run(ask()) <= 1


def test_an_answer_that_fails_ends_alone(
    engine: SteppedEngine,
    make_worker: Callable[..., Worker],
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine.free()
    worker, words = make_worker(), "the words of a prompt"

    def broken(*_: object) -> None:
        raise RuntimeError(words)

    async def ask() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine.pair.target, "verify", broken)
            with pytest.raises(AnswerFailed) as failed:
                await read(worker.submit(job()))
        assert "RuntimeError" in str(failed.value)
        assert words not in str(failed.value) + caplog.text
        with pytest.raises(ContextFull):
            await read(worker.submit(job("long " * 200)))
        completion_of(await read(worker.submit(job())))

    asyncio.run(ask())
    counts = worker.snapshot().counts
    assert counts.requests[Outcome.FAILED] == counts.requests[Outcome.REFUSED] == 1


def test_time_runs_from_the_arrival_in_the_queue_too(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    now_s = [0.0]
    worker = make_worker(request_timeout_s=5.0, clock=lambda: now_s[0])

    async def ask() -> None:
        first, waits = worker.submit(job("first")), worker.submit(job("waits"))
        await until(lambda: worker.snapshot().active == 1)
        now_s[0] = 4.0
        late = worker.submit(job("late"))
        now_s[0] = 6.0
        engine.free()
        for ticket in (first, waits):
            with pytest.raises(TimedOut, match="5 s"):
                await read(ticket)
        completion_of(await read(late))

    asyncio.run(ask())
    assert len(engine.begun) == 2
    assert worker.snapshot().counts.requests[Outcome.TIMED_OUT] == 2


def test_draining_sends_the_queue_away_and_finishes_what_streams(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    worker = make_worker()

    async def ask() -> None:
        streams, waits = worker.submit(job("streams")), worker.submit(job("waits"))
        await until(lambda: worker.snapshot().active == 1)
        worker.drain()
        with pytest.raises(ShuttingDown):
            await read(waits)
        with pytest.raises(ShuttingDown):
            worker.submit(job("too late"))
        assert not worker.snapshot().ready
        engine.free()
        completion_of(await read(streams))

    asyncio.run(ask())


def test_stopping_breaks_off_what_streams(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    worker = make_worker()

    async def ask() -> None:
        ticket = worker.submit(job(max_tokens=100, min_tokens=100))
        await until(lambda: worker.snapshot().active == 1)
        stopping = asyncio.create_task(asyncio.to_thread(worker.stop, 10))
        await until(lambda: worker.snapshot().draining)
        while not stopping.done():
            engine.step()
            await asyncio.sleep(0)
        assert await stopping
        with pytest.raises(ShuttingDown):
            await read(ticket)

    asyncio.run(ask())


def test_calls_run_between_answers(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    worker = make_worker()

    async def ask() -> list[int]:
        first, second = worker.submit(job("first")), worker.submit(job("second"))
        await until(lambda: worker.snapshot().active == 1)
        called = worker.call(lambda engine: len(engine.begun))
        engine.free()
        await asyncio.gather(read(first), read(second))
        with pytest.raises(ZeroDivisionError):
            await worker.call(lambda _: 1 // 0)
        return [await called]

    assert asyncio.run(ask()) == [1]


def test_as_many_are_answered_together_as_there_is_room_for(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    engine.most_together = 3
    worker = make_worker(max_queued_requests=2)
    jobs = [job(f"Number {number}", max_tokens=60, min_tokens=60) for number in range(5)]

    async def ask() -> list[Completion]:
        tickets = [worker.submit(one) for one in jobs]
        with pytest.raises(QueueFull):
            worker.submit(job())
        while len(engine.rounds) < 3 or min(engine.rounds) == 0:
            engine.step()
            await asyncio.sleep(0)
        assert worker.snapshot().active == 3
        assert worker.snapshot().kv_bytes > 0
        tickets[1].cancel()
        engine.free()
        with pytest.raises(Cancelled):
            await read(tickets[1])
        return [completion_of(await read(tickets[index])) for index in (0, 2, 3, 4)]

    together = asyncio.run(ask())
    assert len(engine.begun) == 5
    for number, completion in zip((0, 2, 3, 4), together, strict=True):
        assert completion.token_ids == engine.complete(jobs[number].request).token_ids
    counts = worker.snapshot().counts
    assert counts.tokens_per_s is not None
    assert counts.requests[Outcome.LENGTH] == 4


def test_a_step_that_breaks_ends_who_shared_it_and_nobody_else(
    engine: SteppedEngine,
    make_worker: Callable[..., Worker],
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.free()
    engine.most_together = 2
    worker = make_worker()

    def broken(*_: object) -> None:
        raise KeyError

    async def ask() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "step", broken)
            for ticket in [worker.submit(job()) for _ in range(2)]:
                with pytest.raises(AnswerFailed):
                    await read(ticket)
        completion_of(await read(worker.submit(job())))

    asyncio.run(ask())
    assert worker.snapshot().active == 0


def test_who_had_his_end_before_a_step_broke_keeps_it(
    engine: SteppedEngine,
    make_worker: Callable[..., Worker],
    job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.free()
    engine.most_together = 2
    worker, step, close = make_worker(), Batch.step, Member.close

    def closes_badly(member: Member) -> None:
        close(member)
        raise KeyError

    def breaks_after_an_end(batch: Batch) -> Iterator[tuple[Member, Event | Failed | PutOff]]:
        for member, event in step(batch):
            yield member, event
            if isinstance(event, Completion):
                monkeypatch.setattr(Member, "close", closes_badly)
                raise KeyError

    async def ask() -> None:
        monkeypatch.setattr(Batch, "step", breaks_after_an_end)
        short, long = worker.submit(job()), worker.submit(job(max_tokens=60, min_tokens=60))
        completion_of(await read(short))
        with pytest.raises(AnswerFailed):
            await read(long)
        monkeypatch.undo()
        completion_of(await read(worker.submit(job())))

    asyncio.run(ask())
    assert worker.snapshot().active == 0


@pytest.mark.parametrize("wanted", [True, False])
def test_prompts_and_answers_are_logged_only_where_that_is_wanted(
    engine: SteppedEngine,
    make_worker: Callable[..., Worker],
    job: Callable[..., Job],
    caplog: pytest.LogCaptureFixture,
    wanted: bool,
) -> None:
    engine.free()
    worker = make_worker(log_prompts=wanted)
    with caplog.at_level(logging.DEBUG, "draftloop"):
        completion = completion_of(asyncio.run(ask_once(worker, job("a secret"))))
    assert ("a secret" in caplog.text) is wanted
    assert (repr(completion.text) in caplog.text) is wanted


class Listener:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def began(self) -> None:
        self.heard.append("began")

    def ended(self) -> None:
        self.heard.append("ended")


def test_the_learner_hears_of_work_and_of_rest(
    engine: SteppedEngine, make_worker: Callable[..., Worker], job: Callable[..., Job]
) -> None:
    listener = Listener()
    worker = make_worker(learner=listener)

    async def ask() -> None:
        tickets = [worker.submit(job()) for _ in range(3)]
        engine.free()
        await asyncio.gather(*(read(ticket) for ticket in tickets))
        await worker.call(lambda _: None)
        assert listener.heard == ["began", "ended"]
        await read(worker.submit(job()))
        await worker.call(lambda _: None)

    asyncio.run(ask())
    assert listener.heard == ["began", "ended", "began", "ended"]
