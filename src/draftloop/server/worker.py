"""The thread that owns the models: requests go in, tickets come out.

Contract: the engine is touched by this thread and no other. As many requests are answered together as the
memory plan has room for; they join and leave between two rounds, so that a cancelled or late one ends within
one. Who finds no memory beside the others waits again, first in the queue. Whatever happens, every ticket
gets its end. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from draftloop.answers import Completion, Failed, PutOff, RoundDone
from draftloop.errors import DraftloopError, InputError, OutOfMemory
from draftloop.server.figures import Figures, Outcome, Snapshot
from draftloop.server.logs import where_raised
from draftloop.server.queue import FairQueue
from draftloop.server.tickets import AnswerFailed, Cancelled, QueueFull, ShuttingDown, Ticket, TimedOut

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from draftloop.answers import Event
    from draftloop.batch import Batch
    from draftloop.engine import Engine
    from draftloop.member import Member
    from draftloop.server.tickets import Job
    from draftloop.speculation.round import Round

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Attendant(Protocol):
    """Who wants to know when the models are busy: learning, which then holds back."""

    def began(self) -> None:
        """Somebody is being answered."""
        ...

    def ended(self) -> None:
        """Nobody is, and nobody waits."""
        ...


@dataclass(slots=True, eq=False)
class _Active:
    """One answer being made.

    Attributes:
        ticket: whose.
        member: of the batch, once it has joined.
        token_s: when the newest tokens came; None before the first.
    """

    ticket: Ticket
    member: Member | None = None
    token_s: float | None = None

    @property
    def kv_bytes(self) -> int:
        """What both models' caches hold of it."""
        if self.member is None:
            return 0
        conversation = self.member.stream.conversation
        caches = (conversation.target_cache, conversation.draft_cache)
        return sum(cache.position * cache.bytes_per_token for cache in caches if cache is not None)


class Worker:
    """Answers requests in a thread of its own.

    Attributes:
        figures: what is counted.

    Args:
        engine: whose models; from `start` on it is this thread's.
        max_queued_requests: so many may wait beside those being answered.
        request_timeout_s: how long an answer may take, counted from its arrival.
        learner: told when the models are busy.
        log_prompts: write prompts and answers to the log; else no text of either is in it.
        clock: seconds, growing.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued_requests: int,
        request_timeout_s: float,
        learner: Attendant | None = None,
        log_prompts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._most_active = engine.most_together
        self._max_queued_requests = max_queued_requests
        self._request_timeout_s = request_timeout_s
        self._learner = learner
        self._log_prompts = log_prompts
        self._clock = clock
        self.figures = Figures()
        self._changed = threading.Condition()
        """Guards everything below, and wakes the thread."""
        self._queue = FairQueue()
        self._calls: list[tuple[Callable[[Engine], Any], Future[Any]]] = []
        self._active: list[_Active] = []
        self._adapter = engine.adapter
        self._kv_bytes = self._prefix_cache_bytes = 0
        self._busy = False
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, job: Job) -> Ticket:
        """Take a request; called on the event loop that reads the ticket.

        Raises:
            QueueFull: as many wait as may.
            ShuttingDown: nothing is taken any more.
        """
        arrived_s = self._clock()
        ticket = Ticket(job, arrived_s, arrived_s + self._request_timeout_s)
        with self._changed:
            if self._draining or self._stopping:
                self.figures.ended(Outcome.SHUTTING_DOWN)
                raise ShuttingDown
            if len(self._queue) >= self._room():
                self._drop_from_queue(lambda one: one.cancelled, Cancelled(), Outcome.CANCELLED)
            if len(self._queue) >= self._room():
                self.figures.ended(Outcome.QUEUE_FULL)
                raise QueueFull(len(self._queue), self._retry_after_s())
            self._queue.put(ticket)
            self._changed.notify_all()
        return ticket

    def call(self, work: Callable[[Engine], T]) -> Awaitable[T]:
        """Have `work` done on the models' thread while nobody is answered; called on an event loop.

        Raises:
            ShuttingDown: the thread is gone, or goes before its turn.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._stopping:
                raise ShuttingDown
            self._calls.append((work, future))
            self._changed.notify_all()
        return asyncio.wrap_future(future)

    def drain(self) -> None:
        """Take nothing any more; who waits is sent away, who is being answered gets the rest."""
        with self._changed:
            self._draining = True
            self._drop_from_queue(lambda _: True, ShuttingDown(), Outcome.SHUTTING_DOWN)

    def stop(self, timeout_s: float) -> bool:
        """Break off what is being answered and end the thread; whether it has ended within that time."""
        self.drain()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def snapshot(self) -> Snapshot:
        """How things stand; from any thread."""
        with self._changed:
            return Snapshot(
                ready=self._thread.is_alive() and not self._draining,
                draining=self._draining,
                active=len(self._active),
                queued=sum(not ticket.cancelled for ticket in self._queue),
                adapter=self._adapter,
                kv_bytes=self._kv_bytes,
                prefix_cache_bytes=self._prefix_cache_bytes,
                counts=self.figures.counts(),
            )

    def _room(self) -> int:
        """Places to wait in: a request that can be answered at once only passes through."""
        return self._max_queued_requests + self._most_active - len(self._active)

    def _retry_after_s(self) -> int:
        """A place is free when the next answer is done."""
        return max(1, math.ceil(self.figures.counts().mean_answer_s or 1))

    def _drop_from_queue(
        self, where: Callable[[Ticket], bool], error: DraftloopError, outcome: Outcome
    ) -> None:
        for ticket in self._queue.remove(where):
            self.figures.ended(outcome)
            ticket.deliver(error)

    def _run(self) -> None:
        """The thread: heed who went away, admit who waits, advance everybody by one round."""
        try:
            with self._engine.batch() as batch:
                while self._wait_for_work():
                    self._do_calls()
                    self._let_go(batch)
                    self._admit(batch)
                    self._step(batch)
                    self._look_around()
        except BaseException as error:
            logger.error("the models' thread ended: %s", where_raised(error))
            raise
        finally:
            self._leave()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False where it is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._active or len(self._queue) or self._calls or self._stopping)
            return not self._stopping

    def _do_calls(self) -> None:
        if self._active:
            return
        with self._changed:
            calls, self._calls = self._calls, []
        for work, future in calls:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(self._engine))
                except Exception as error:
                    future.set_exception(error)

    def _let_go(self, batch: Batch) -> None:
        """End what nobody waits for any more, or not longer: between two events, so that it is stored."""
        now_s, late = self._clock(), TimedOut(self._request_timeout_s)
        with self._changed:
            self._drop_from_queue(lambda one: one.cancelled, Cancelled(), Outcome.CANCELLED)
            self._drop_from_queue(lambda one: now_s >= one.deadline_s, late, Outcome.TIMED_OUT)
        for answer in list(self._active):
            if answer.ticket.cancelled:
                self._break_off(batch, answer, Cancelled(), Outcome.CANCELLED)
            elif now_s >= answer.ticket.deadline_s:
                self._break_off(batch, answer, late, Outcome.TIMED_OUT)

    def _admit(self, batch: Batch) -> None:
        """Let the next ones join, where there is a place and no call waits for a pause."""
        while self._somebody_waits() and batch.places:
            with self._changed:
                ticket = None if self._calls else self._queue.take()
                if ticket is None:
                    return
                answer = _Active(ticket)
                self._active.append(answer)
            self._join(batch, answer)

    def _somebody_waits(self) -> bool:
        with self._changed:
            return len(self._queue) > 0

    def _join(self, batch: Batch, answer: _Active) -> None:
        if self._learner is not None and not self._busy:
            self._learner.began()
        self._busy = True
        try:
            if not batch.members:
                self._follow_adapter()
            answer.member = batch.join(answer.ticket.job.request)
        except Exception as error:
            if isinstance(error, OutOfMemory) and batch.members:
                self._put_back(answer)
            else:
                self._fail(answer, error)

    def _follow_adapter(self) -> None:
        """Another adapter may have become active; a damaged one costs nobody an answer."""
        try:
            self._engine.follow_adapter()
        except DraftloopError as error:
            logger.warning("the draft goes on with what it wears: %s", error)

    def _step(self, batch: Batch) -> None:
        """One round for everybody, and its events to their readers."""
        began_s, told, broken = self._clock(), [], None
        try:
            for member, event in batch.step():
                told.append((member, event))
        except Exception as error:
            broken = error
        self._tell(told, began_s)
        if broken is not None:
            # It was nobody's own: what the caches hold is unknown. Who was told his end before has it.
            for answer in list(self._active):
                if answer.member is not None:
                    self._let_close(batch, answer.member)
                self._fail(answer, broken)

    def _let_close(self, batch: Batch, member: Member) -> None:
        try:
            member.close()
        except Exception as trouble:
            logger.error("an answer did not end well: %s", where_raised(trouble))
        batch.leave(member)

    def _tell(self, told: Sequence[tuple[Member, Event | Failed | PutOff]], began_s: float) -> None:
        """What a step brought, to the figures and to its readers."""
        answers = {answer.member: answer for answer in self._active}
        rounds = [(answers[member], event.outcome) for member, event in told if isinstance(event, RoundDone)]
        self._count(rounds, began_s)
        for member, event in told:
            answer = answers[member]
            if isinstance(event, Failed):
                self._fail(answer, event.error)
                continue
            if isinstance(event, PutOff):
                self._put_back(answer)
                continue
            if isinstance(event, Completion):
                self._remove(answer)
                self.figures.completed(event)
                self._log_text(answer.ticket, event)
            answer.ticket.deliver(event)

    def _count(self, rounds: list[tuple[_Active, Round]], began_s: float) -> None:
        """Rounds that are over; before anybody hears of them, so that figures are never behind."""
        now_s = self._clock()
        for answer, outcome in rounds:
            first = answer.token_s is None
            before_s = answer.ticket.arrived_s if answer.token_s is None else answer.token_s
            share_s = (now_s - began_s) / len(rounds)
            self.figures.round_done(outcome, share_s, now_s - before_s, first=first)
            answer.token_s = now_s

    def _log_text(self, ticket: Ticket, completion: Completion) -> None:
        if self._log_prompts:
            prompt = self._engine.tokenizer.decode(ticket.job.request.prompt_tokens)
            logger.info("prompt: %r; answer: %r", prompt, completion.text)

    def _break_off(self, batch: Batch, answer: _Active, error: DraftloopError, outcome: Outcome) -> None:
        """End an answer before its end: what was said is stored."""
        if answer.member is not None:
            try:
                batch.leave(answer.member)
            except Exception as trouble:
                logger.error("an answer did not end well: %s", where_raised(trouble))
        self._remove(answer)
        self.figures.ended(outcome)
        answer.ticket.deliver(error)

    def _put_back(self, answer: _Active) -> None:
        """There was no memory for it beside the others: it waits for somebody's end, first of all."""
        with self._changed:
            self._active.remove(answer)
            self._queue.put_back(answer.ticket)

    def _remove(self, answer: _Active) -> None:
        """Its place is free."""
        with self._changed:
            self._active.remove(answer)

    def _fail(self, answer: _Active, error: Exception) -> None:
        """An answer ends with an error; the batch has let go of it."""
        self._remove(answer)
        if not isinstance(error, DraftloopError):
            logger.error("an answer failed: %s", where_raised(error))
            error = AnswerFailed(error)
        self.figures.ended(Outcome.REFUSED if isinstance(error, InputError) else Outcome.FAILED)
        answer.ticket.deliver(error)

    def _look_around(self) -> None:
        """Note what others ask about, and tell the learner where nobody is answered and nobody waits."""
        self._adapter = self._engine.adapter
        self._kv_bytes = sum(answer.kv_bytes for answer in self._active)
        self._prefix_cache_bytes = self._engine.prefix_cache_bytes
        if self._busy and not self._active and not self._somebody_waits():
            self._busy = False
            if self._learner is not None:
                self._learner.ended()

    def _leave(self) -> None:
        """The thread ends, as it was told or because it broke: nobody is left waiting."""
        with self._changed:
            # Not draining: that is for who was told to end.
            self._stopping = True
            self._drop_from_queue(lambda _: True, ShuttingDown(), Outcome.SHUTTING_DOWN)
            calls, self._calls = self._calls, []
        for answer in list(self._active):
            # The batch, as it was left, has stored what was said.
            self._remove(answer)
            self.figures.ended(Outcome.SHUTTING_DOWN)
            answer.ticket.deliver(ShuttingDown())
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(ShuttingDown())
