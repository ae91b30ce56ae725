"""The turns of a chat, as chat templates frame them.

Contract: plain data. Must not know tokens, or any model's format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def is_plain_json(value: object) -> bool:
    """Whether a value can be written as JSON in UTF-8: no NaN, no lone surrogates, not a thousand levels."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant's message calls.

    Attributes:
        id: names the call; the message with its result has the same.
        name: the function's.
        arguments: as JSON has them.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: `system`, `user`, `assistant`, or `tool` for what a function gave.
        content: its text.
        tool_calls: of an assistant's message.
        tool_call_id: of a tool's message: whose result it is.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def as_template_reads_it(self) -> dict[str, Any]:
        """The mapping that chat templates are written for, which is that of the OpenAI API."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn
