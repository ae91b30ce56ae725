"""`/v1/chat/completions`.

Contract: messages in, the assistant's next one out, whole or as it grows; both are the same. Must not know
how an answer is made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from draftloop.errors import ContextFull, InputError
from draftloop.learning.recorder import digest
from draftloop.models.messages import Message
from draftloop.server.openai.answering import in_steps, whole
from draftloop.server.openai.asking import Subject, check_model, client_of, request_of
from draftloop.server.openai.chat_reply import ChatReply
from draftloop.server.openai.counting import CountedRoute
from draftloop.server.openai.errors import ApiError, documented
from draftloop.server.openai.events import STREAMED, EventStream
from draftloop.server.openai.fields import ChatFields, JsonFormat, SchemaFormat
from draftloop.server.openai.replies import ChatCompletion, to_json
from draftloop.server.openai.tools import ToolUse, tool_use
from draftloop.server.openai.turns import turns_of
from draftloop.server.service import Service, get_service
from draftloop.server.tickets import Job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.answers import Request as EngineRequest
    from draftloop.models.grammar import Grammar

router = APIRouter(route_class=CountedRoute)


@router.post(
    "/v1/chat/completions",
    response_class=Response,
    responses={
        200: {
            "model": ChatCompletion,
            "description": "The answer; with `stream` as events, each a `chat.completion.chunk`.",
            "content": STREAMED,
        },
        **documented(400, 401, 403, 404, 408, 413, 429, 500, 503, 504),
    },
)
async def create_chat_completion(
    fields: ChatFields, request: Request, service: Annotated[Service, Depends(get_service)]
) -> Response:
    """Answer a conversation."""
    check_model(service, fields.model)
    asked = await to_thread.run_sync(prepare, service, fields)
    ticket = service.worker.submit(Job(asked.request, client_of(request, fields)))
    reply = ChatReply(service, fields, asked.tools)
    if fields.stream:
        steps = in_steps(ticket, with_tokens=bool(fields.logprobs))
        return EventStream(ticket, reply.chunks(steps))
    completion = await whole(ticket, request.receive)
    return Response(to_json(reply.completed(completion)), media_type="application/json")


@dataclass(frozen=True, slots=True)
class AskedChat:
    """A conversation, ready for the engine."""

    request: EngineRequest
    tools: ToolUse | None


def prepare(service: Service, fields: ChatFields) -> AskedChat:
    """Tokens and grammar of a conversation.

    Raises:
        ApiError: a field cannot act here, or the prompt is too long.
    """
    messages = turns_of(fields.messages, knows_tools=service.call_format is not None)
    system = service.config.chat.system_message or ""
    if any(message.role == "system" for message in messages):
        system = next(message.content for message in messages if message.role == "system")
    elif system:
        messages = [Message("system", system), *messages]
    tools = tool_use(service, fields)
    grammar = tools.grammar if tools else _format_grammar(service, fields)
    try:
        return AskedChat(
            request_of(
                service,
                fields,
                service.tokenizer.chat_tokens(messages, tools=tools.shown if tools else ()),
                max_tokens=fields.max_completion_tokens or fields.max_tokens,
                subject=Subject(_domain_text(system, tools), _conversation(messages)),
                grammar=grammar,
                stop=tools.stop if tools else (),
                trace=bool(fields.logprobs),
            ),
            tools,
        )
    except ContextFull as error:
        raise ApiError(str(error), param="messages", code="context_length_exceeded") from error
    except InputError as error:
        raise ApiError(str(error), param="messages", code="invalid_value") from error


def _domain_text(system: str, tools: ToolUse | None) -> str:
    """The system message as the template writes it, with the tools: they are a subject of their own."""
    return system + json.dumps(tools.shown) if tools else system


def _conversation(messages: Sequence[Message]) -> str:
    """What all turns of one conversation share: its beginning, up to the first thing that the user says."""
    first = next((i for i, message in enumerate(messages) if message.role == "user"), len(messages) - 1)
    return digest(json.dumps([[one.role, one.content] for one in messages[: first + 1]]))


def _format_grammar(service: Service, fields: ChatFields) -> Grammar | None:
    """What `response_format` demands.

    Raises:
        ApiError: a schema says something that cannot be held to.
    """
    try:
        match fields.response_format:
            case JsonFormat():
                return service.grammars.json_object()
            case SchemaFormat(json_schema=named):
                return service.grammars.json_schema(named.schema_)
    except InputError as error:
        raise ApiError(f"response_format: {error}", param="response_format", code="invalid_value") from error
    return None
