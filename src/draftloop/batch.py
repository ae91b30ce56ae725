"""Several answers on their way, advanced together: who reads its prompt, and one round for all the others.

Contract: answers join and leave between two steps. Each gets the text that it would get alone. An answer that
fails ends alone, but for a round that failed: it was everybody's. Where memory runs out nobody fails others:
who is not yet answered is put off until somebody has left, and a round is taken in parts; only who has no
memory alone fails. A step may be left between any two of its events; what the others have not been told by
then is lost. Must not know adapters, the store or a backend.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from draftloop.answers import Failed, PromptProgress, PutOff, RoundDone
from draftloop.errors import OutOfMemory
from draftloop.speculation.pieces import PieceLengths
from draftloop.speculation.plans import Prospect
from draftloop.speculation.round import run_round
from draftloop.speculation.schedule import HORIZON_TOKENS
from draftloop.speculation.stream import PREFILL_CHUNK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from draftloop.answers import Completion, Event, Request, TextPiece
    from draftloop.member import Member
    from draftloop.speculation.experience import Experience
    from draftloop.speculation.round import Round
    from draftloop.speculation.stream import Conversation, Pair
    from draftloop.speculation.together import TogetherPace

logger = logging.getLogger(__name__)


class Batch:
    """Answers that share rounds. Leaving it as a context breaks off who is not done.

    Args:
        pair: the models.
        begin: opens an answer; told whether it is the only one, so that the draft may change its adapter.
        held_up: whether nobody may join whom others are answered beside: an adapter waits to be worn.
        together: chooses K for several streams at once; None: each one's own pace does.
        most: answers at a time, at least 1.
        whole_prompts: read every prompt at once, for nobody watches the others' tokens come.
        clock: seconds.
    """

    def __init__(
        self,
        pair: Pair,
        begin: Callable[[Request, Conversation | None, Experience | None, bool], Member],
        held_up: Callable[[], bool],
        *,
        together: TogetherPace | None,
        most: int,
        whole_prompts: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pair = pair
        self._begin = begin
        self._held_up = held_up
        self._together = together
        self._most = most
        self._whole_prompts = whole_prompts
        self._clock = clock
        self._members: list[Member] = []
        self._full = False
        """There was no memory for one more; until somebody leaves there will be none."""
        self._pieces = PieceLengths(PREFILL_CHUNK_TOKENS)
        self._shortest = False
        """Whether the reader of the last step was chosen for having the least to read."""

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        first: BaseException | None = None
        for member in self._members:
            try:
                # Ctrl-C comes anywhere, everything else between two events or with the member's own end.
                member.break_off(whole=kind is None or not issubclass(kind, KeyboardInterrupt))
            except BaseException as trouble:
                first = first or trouble
        self._members.clear()
        if first is not None:
            raise first

    @property
    def members(self) -> Sequence[Member]:
        """Who is being answered, in the order in which they joined."""
        return tuple(self._members)

    @property
    def places(self) -> int:
        """How many more may join now; who finds none waits for somebody's end."""
        if not self._members:
            return self._most
        return 0 if self._full or self._held_up() else self._most - len(self._members)

    def join(
        self,
        request: Request,
        conversation: Conversation | None = None,
        experience: Experience | None = None,
    ) -> Member:
        """Answer one more from the next step on; see `Engine.stream`.

        Raises:
            InputError: the request asks what cannot be.
            OutOfMemory: there is none for its caches. Where others are being answered it is put off: it may
                join when there are places again.
            ValueError: there is no place.
        """
        if not self.places:
            raise ValueError(f"{len(self._members)} answers are on their way, and no more may join")
        try:
            member = self._begin(request, conversation, experience, not self._members)
        except OutOfMemory as error:
            self._note_full(error)
            raise
        self._members.append(member)
        return member

    def leave(self, member: Member) -> None:
        """Break off between two events: what was said is stored. Nothing happens where it is over."""
        try:
            member.break_off(whole=True)
        finally:
            self._forget()

    def step(self) -> Iterator[tuple[Member, Event | Failed | PutOff]]:
        """Read one piece of one prompt, or all of them, and run one round for everybody whose prompt is read.

        Yields:
            Each answer's events in their order, an answer's last one being its `Completion`, `Failed` or
            `PutOff`.
        """
        reader = self._reader()
        while reader is not None:
            yield from self._read(reader)
            reader = self._reader() if self._whole_prompts else None
        active = [member for member in self._members if not member.reads]
        if not active:
            return
        if self._together is not None:
            self._together.expect(len(self._members))
        started_s = self._clock()
        try:
            outcomes = run_round(self._pair, [one.stream for one in active], self._clock, self._together)
        except Exception as error:
            failed = [(member, _failed(member, error)) for member in active]
            self._forget()
            yield from failed
            return
        round_s = self._clock() - started_s
        self._pieces.round_took(round_s)
        part_s, spared = round_s / len(active), _spared(active)
        told = [
            [] if one in spared else _taken(one, outcome, part_s)
            for one, outcome in zip(active, outcomes, strict=True)
        ]
        for member, events in zip(active, told, strict=True):
            yield from ((member, event) for event in events)
        for member in active:
            if member.said_all and not member.over:
                yield from ((member, event) for event in _finished(member))
        self._forget()

    def _reader(self) -> Member | None:
        """In turns who is soonest done and who came first: neither waits for the other's end."""
        reading = [member for member in self._members if member.reads and not member.over]
        self._shortest = not self._shortest
        if self._shortest:
            return min(reading, key=lambda member: member.left_tokens, default=None)
        return next(iter(reading), None)

    def _read(self, reader: Member) -> Iterator[tuple[Member, PromptProgress | Failed | PutOff]]:
        """What the caches held, and one piece: beside others no longer than they hardly notice."""
        if not reader.begun:
            yield reader, self._told(reader, lambda: reader.begin(partial(self._draft_reads, reader)))
        if reader.reads and not reader.over:
            num_tokens, left, started_s = self._piece_tokens(), reader.left_tokens, self._clock()
            progress = self._told(reader, lambda: reader.read(num_tokens))
            if left - reader.left_tokens == num_tokens:
                self._pieces.piece_took(num_tokens, self._clock() - started_s)
            yield reader, progress

    def _draft_reads(self, member: Member, backlog_tokens: int) -> bool:
        pace, settings, count = member.stream.pace, member.answer.settings, len(self._members)
        if self._together is None or pace.apart or count == 1:
            return pace.reads_along(backlog_tokens, settings.max_tokens)
        prospect = Prospect(
            chances=tuple(pace.chances(settings.num_draft_tokens)),
            backlog_tokens=backlog_tokens,
            ahead_tokens=min(settings.max_tokens, HORIZON_TOKENS),
        )
        return self._together.reads_along(prospect, count)

    def _told(self, reader: Member, work: Callable[[], PromptProgress]) -> PromptProgress | Failed | PutOff:
        try:
            return reader.with_room(work)
        except Exception as error:
            failed = _failed(reader, error)
        self._forget()
        if not isinstance(failed.error, OutOfMemory) or not self._members:
            return failed
        self._note_full(failed.error)
        return PutOff(failed.error)

    def _note_full(self, error: OutOfMemory) -> None:
        if self._members:
            self._full = True
            logger.warning("%s beside %d others: a request waits", error.what, len(self._members))

    def _piece_tokens(self) -> int:
        if self._whole_prompts or all(member.reads for member in self._members):
            return PREFILL_CHUNK_TOKENS
        return self._pieces.next_tokens()

    def _forget(self) -> None:
        staying = [member for member in self._members if not member.over]
        self._full = self._full and len(staying) == len(self._members)
        self._members = staying


def _spared(members: Sequence[Member]) -> list[Member]:
    """Who lacked memory in a round, where there is more now: the next round is this one again for them."""
    short = [(member, member.stream.shortage) for member in members if member.stream.shortage is not None]
    # What is given up is given up for all of them: nothing is left for a second one to ask for.
    if not short or not short[0][0].make_room(short[0][1]):
        return []
    for member, _ in short:
        member.stream.shortage = None
    return [member for member, _ in short]


def _taken(member: Member, outcome: Round, seconds: float) -> list[TextPiece | RoundDone | Failed]:
    """What a round brought one answer; what fails here is its own."""
    try:
        failure = member.stream.failure
        if failure is None:
            return [*member.take(outcome, seconds)]
        member.break_off(whole=True)
    except Exception as error:
        return [_failed(member, error)]
    return [Failed(failure)]


def _finished(member: Member) -> Iterator[TextPiece | Completion | Failed]:
    """An answer's end; what fails here is its own."""
    try:
        yield from member.finish()
    except Exception as error:
        yield _failed(member, error)


def _failed(member: Member, error: Exception) -> Failed:
    """Let go of what an answer holds that has failed, and that may fail too."""
    try:
        member.close()
    except Exception as trouble:
        return Failed(trouble)
    return Failed(error)
