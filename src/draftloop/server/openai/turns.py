"""From the API's messages to the turns that the chat template frames.

Contract: what would be lost or misunderstood is refused. Must not know templates, or how an answer is made.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from draftloop.models.messages import Message, ToolCall, is_plain_json
from draftloop.server.openai.errors import ApiError
from draftloop.server.openai.fields import AssistantMessage, SystemMessage, ToolMessage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.server.openai.fields import ChatMessage, Content


def turns_of(messages: Sequence[ChatMessage], *, knows_tools: bool) -> list[Message]:
    """The conversation as the chat template reads it.

    Args:
        messages: what the client sent.
        knows_tools: whether the template writes calls and their results.

    Raises:
        ApiError: a call or a result that the template would leave out, a result that nobody asked for, or a
            call whose arguments are no JSON.
    """
    turns: list[Message] = []
    called: set[str] = set()
    for index, message in enumerate(messages):
        calls = isinstance(message, AssistantMessage) and message.tool_calls
        if not knows_tools and (calls or isinstance(message, ToolMessage)):
            raise ApiError(
                f"messages[{index}]: the model's chat template knows no tools that this server can read.",
                param=f"messages[{index}]",
                code="unsupported_value",
            )
        match message:
            case SystemMessage():
                turns.append(Message("system", _text_of(message.content)))
            case AssistantMessage():
                made = _calls_of(message, index)
                called |= {call.id for call in made}
                turns.append(Message("assistant", _text_of(message.content), made))
            case ToolMessage():
                if message.tool_call_id not in called:
                    raise ApiError(
                        f"messages[{index}].tool_call_id: no message before it made this call.",
                        param=f"messages[{index}].tool_call_id",
                        code="invalid_value",
                    )
                turns.append(Message("tool", _text_of(message.content), tool_call_id=message.tool_call_id))
            case _:
                turns.append(Message("user", _text_of(message.content)))
    return turns


def _text_of(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _calls_of(message: AssistantMessage, index: int) -> tuple[ToolCall, ...]:
    calls = []
    for number, call in enumerate(message.tool_calls or ()):
        arguments = _json_object(call.function.arguments)
        if arguments is None:
            where = f"messages[{index}].tool_calls[{number}].function.arguments"
            raise ApiError(f"{where} is not a JSON object.", param=where, code="invalid_value")
        calls.append(ToolCall(call.id, call.function.name, arguments))
    return tuple(calls)


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and is_plain_json(value) else None
