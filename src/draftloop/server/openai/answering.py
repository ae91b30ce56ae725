"""An answer on its way, from the worker's events to what a reply is made of.

Contract: text and tokens together are the same whether they come in steps or at once. Whoever reads is gone
with its client. Must not know the kinds of reply.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.answers import Completion, RoundDone, TextPiece
from draftloop.server.openai.replies import DraftFigures, PromptDetails, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive

    from draftloop.server.tickets import Ticket
    from draftloop.types import Trace


@dataclass(frozen=True, slots=True)
class Step:
    """What a round added.

    Attributes:
        text: that can be shown now.
        token_ids: emitted; empty where nobody asked for them.
        traces: of the rounds that emitted them.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    traces: tuple[Trace, ...] = ()


@asynccontextmanager
async def cancelled_with_client(ticket: Ticket, receive: Receive) -> AsyncIterator[None]:
    """Give the ticket's place free when its client goes away, and at the end in any case."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        ticket.cancel()


async def whole(ticket: Ticket, receive: Receive) -> Completion:
    """Wait for the answer's end.

    Raises:
        DraftloopError: as the ticket.
    """
    async with cancelled_with_client(ticket, receive):
        async for event in ticket:
            if isinstance(event, Completion):
                return event
    raise RuntimeError("a ticket ended without its completion")


async def in_steps(ticket: Ticket, *, with_tokens: bool) -> AsyncIterator[Step | Completion]:
    """Follow an answer: an empty step with its first sign of life, one for each round that adds something,
    and the completion.

    With tokens each round is held back until the next one is over: a stop string may cut the last of them.

    Raises:
        DraftloopError: as the ticket.
    """
    text, told_tokens, held = "", 0, Step("")
    begun = False
    async for event in ticket:
        if not begun:
            begun = True
            yield Step("")
        if isinstance(event, TextPiece):
            text += event.text
        elif isinstance(event, RoundDone):
            if with_tokens:
                if held.token_ids:
                    told_tokens += len(held.token_ids)
                    yield held
                trace = event.outcome.trace
                held = Step(text, event.outcome.tokens, () if trace is None else (trace,))
                text = ""
            elif text:
                yield Step(text)
                text = ""
        elif isinstance(event, Completion):
            rest = event.token_ids[told_tokens:] if with_tokens else ()
            last = Step(held.text + text, rest, held.traces)
            if last.text or last.token_ids:
                yield last
            yield event


def usage_of(completion: Completion) -> Usage:
    """What an answer took."""
    tally, num_tokens = completion.tally, len(completion.token_ids)
    return Usage(
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=completion.prompt_tokens + num_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=completion.cached_tokens),
        draftloop=DraftFigures(
            rounds=tally.rounds,
            drafted_tokens=tally.drafted_tokens,
            accepted_tokens=tally.accepted_tokens,
            acceptance_rate=tally.acceptance_rate,
            alpha=tally.alpha,
            tau=tally.tau,
            suffix_rounds=tally.suffix_rounds,
            suffix_drafted_tokens=tally.suffix_drafted_tokens,
            suffix_accepted_tokens=tally.suffix_accepted_tokens,
            tokens_per_s=completion.tokens_per_s,
            seed=completion.seed,
            adapter=completion.adapter,
        ),
    )
