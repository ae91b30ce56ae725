"""`/v1/completions`: a text goes on, without a chat template.

Contract: one prompt, as text or as token ids; the text comes out whole or as it grows; both are the same.
Must not know how an answer is made.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from draftloop.answers import Completion
from draftloop.errors import ContextFull
from draftloop.server.openai.answering import in_steps, usage_of, whole
from draftloop.server.openai.asking import Subject, check_model, check_tokens, client_of, request_of
from draftloop.server.openai.counting import CountedRoute
from draftloop.server.openai.errors import ApiError, documented
from draftloop.server.openai.events import STREAMED, EventStream
from draftloop.server.openai.fields import CompletionFields  # noqa: TC001  # FastAPI reads annotations
from draftloop.server.openai.logprobs import CompletionPositions, positions
from draftloop.server.openai.replies import CompletionChoice, TextCompletion, Usage, to_json
from draftloop.server.service import Service, get_service
from draftloop.server.tickets import Job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from draftloop.answers import Request as EngineRequest
    from draftloop.server.openai.answering import Step
    from draftloop.server.openai.replies import CompletionLogprobs, Finish
    from draftloop.types import Trace

router = APIRouter(route_class=CountedRoute)


@router.post(
    "/v1/completions",
    response_class=Response,
    responses={
        200: {
            "model": TextCompletion,
            "description": "The text that follows; with `stream` as events of the same form.",
            "content": STREAMED,
        },
        **documented(400, 401, 403, 404, 408, 413, 429, 500, 503, 504),
    },
)
async def create_completion(
    fields: CompletionFields, request: Request, service: Annotated[Service, Depends(get_service)]
) -> Response:
    """Go on with a text."""
    check_model(service, fields.model)
    asked = await to_thread.run_sync(prepare, service, fields)
    ticket = service.worker.submit(Job(asked, client_of(request, fields)))
    reply = CompletionReply(service, fields)
    if fields.stream:
        steps = in_steps(ticket, with_tokens=fields.logprobs is not None)
        return EventStream(ticket, reply.chunks(steps))
    completion = await whole(ticket, request.receive)
    return Response(to_json(reply.completed(completion)), media_type="application/json")


def prepare(service: Service, fields: CompletionFields) -> EngineRequest:
    """What the engine is asked.

    Raises:
        ApiError: a field cannot act here, or the prompt is empty or too long.
    """
    tokens = _prompt_tokens(service, fields)
    if not tokens:
        raise ApiError("prompt: there must be something to go on with.", param="prompt", code="invalid_value")
    try:
        return request_of(
            service,
            fields,
            tokens,
            max_tokens=fields.max_tokens,
            subject=Subject(),
            trace=fields.logprobs is not None,
        )
    except ContextFull as error:
        raise ApiError(str(error), param="prompt", code="context_length_exceeded") from error


def _prompt_tokens(service: Service, fields: CompletionFields) -> list[int]:
    prompt = fields.prompt if isinstance(fields.prompt, str) else _only(fields.prompt)
    if isinstance(prompt, str):
        return service.tokenizer.encode(prompt, add_special_tokens=True)
    check_tokens(service, prompt, "prompt")
    return prompt


def _only(prompt: Sequence[int | str | list[int]]) -> str | list[int]:
    """The prompt of a list that holds one; or the list itself, which is its tokens."""
    first = prompt[0]
    return [token for token in prompt if isinstance(token, int)] if isinstance(first, int) else first


class CompletionReply:
    """One answer as `text_completion`, whole or in parts."""

    def __init__(self, service: Service, fields: CompletionFields) -> None:
        self._tokenizer = service.tokenizer
        self._fields = fields
        self._positions = CompletionPositions(service.tokenizer)
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = service.model

    def completed(self, completion: Completion) -> TextCompletion:
        """The whole answer."""
        logprobs = self._logprobs(completion.token_ids, completion.traces)
        choice = self._choice(completion.text, logprobs, completion.finish_reason.value)
        return self._reply([choice], usage_of(completion))

    async def chunks(self, steps: AsyncIterator[Step | Completion]) -> AsyncIterator[TextCompletion]:
        """The answer as it grows: its text, why it ended, and what it took if that is wanted."""
        async for step in steps:
            if isinstance(step, Completion):
                yield self._part(self._choice("", None, step.finish_reason.value))
                if self._fields.include_usage:
                    yield self._reply([], usage_of(step))
            elif step.text or step.token_ids:
                yield self._part(self._choice(step.text, self._logprobs(step.token_ids, step.traces), None))

    def _logprobs(self, token_ids: Sequence[int], traces: Sequence[Trace]) -> CompletionLogprobs | None:
        if self._fields.logprobs is None:
            return None
        return self._positions.add(positions(self._tokenizer, token_ids, traces, self._fields.logprobs))

    def _choice(
        self, text: str, logprobs: CompletionLogprobs | None, finish: Finish | None
    ) -> CompletionChoice:
        return CompletionChoice(index=0, text=text, logprobs=logprobs, finish_reason=finish)

    def _part(self, choice: CompletionChoice) -> TextCompletion:
        """An event; where usage is wanted the others say that theirs is none."""
        reply = self._reply([choice])
        if self._fields.include_usage:
            reply.usage = None
        return reply

    def _reply(self, choices: list[CompletionChoice], usage: Usage | None = None) -> TextCompletion:
        reply = TextCompletion(
            id=self._id, object="text_completion", created=self._created, model=self._model, choices=choices
        )
        if usage is not None:
            reply.usage = usage
        return reply
