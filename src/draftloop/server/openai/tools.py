"""Tools: what a request offers, what the model may write because of it, and what it wrote.

Contract: calls are written in the format of the model's own template. What looks like a call and is none of
an offered function stays text: nothing is lost. Must not know HTTP, or how an answer is made.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.models.messages import ToolCall
from draftloop.server.openai.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from draftloop.models.tool_calls import CallFormat
    from draftloop.server.openai.fields import ChatFields
    from draftloop.server.service import Service


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How tools come into one answer.

    Attributes:
        shown: the functions, as the template is given them.
        call_format: how calls are written.
        names: of the functions.
        stop: ends the answer behind its first call where there may be one alone.
    """

    shown: tuple[dict[str, Any], ...]
    call_format: CallFormat
    names: frozenset[str]
    stop: tuple[str, ...]


def tool_use(service: Service, fields: ChatFields) -> ToolUse | None:
    """What a request's tools mean; None where it offers none.

    Raises:
        ApiError: the model's template knows no tools.
    """
    offered = fields.offered_tools
    if not offered:
        return None
    call_format = service.call_format
    if call_format is None:
        raise ApiError(
            f"tools: the chat template of {service.model} knows none, or writes calls in a format that this "
            "server cannot read.",
            param="tools",
            code="unsupported_parameter",
        )
    return ToolUse(
        shown=tuple(tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in offered),
        call_format=call_format,
        names=frozenset(tool.function.name for tool in offered),
        stop=(call_format.closing,) if fields.parallel_tool_calls is False else (),
    )


class CallReader:
    """Splits an answer's text into what is said and the functions that are called, as it comes.

    Args:
        call_format: how calls are written.
        names: functions that may be called.
    """

    def __init__(self, call_format: CallFormat, names: frozenset[str]) -> None:
        self._format = call_format
        self._names = names
        self._pending = ""
        self._opened = ""
        """What stood before the call that is being read: space, and its tag. "" outside of calls."""
        self.num_calls = 0

    def add(self, text: str) -> Iterator[str | ToolCall]:
        """Read on."""
        self._pending += text
        while True:
            found = self._inside() if self._opened else self._outside()
            if found is None:
                return
            yield from found

    def end(self) -> Iterator[str | ToolCall]:
        """Nothing follows: what was held back is told, and a call that lacks nothing but its tag counts."""
        rest, self._pending = self._pending, ""
        call = self._call(rest) if self._opened else None
        if call is not None:
            yield call
        elif self._opened or not self.num_calls or rest.strip():
            text = self._opened + rest
            yield from [text] if text else []

    def _outside(self) -> list[str | ToolCall] | None:
        before, tag, rest = self._pending.partition(self._format.opening)
        said = before.rstrip()
        if tag:
            self._opened, self._pending = before[len(said) :] + tag, rest
            return [said] if said else []
        held = len(before) - len(said)
        held = max(held, _begun(before, self._format.opening))
        shown = before[: len(before) - held]
        # Space before a tag goes with it.
        shown = shown.rstrip() if held else shown
        self._pending = before[len(shown) :]
        if shown:
            return [shown]
        return None

    def _inside(self) -> list[str | ToolCall] | None:
        body, tag, rest = self._pending.partition(self._format.closing)
        if not tag:
            return None
        call = self._call(body)
        told: str | ToolCall = self._opened + body + tag if call is None else call
        self._opened, self._pending = "", rest
        return [told]

    def _call(self, body: str) -> ToolCall | None:
        read = self._format.read(body)
        if read is None or read[0] not in self._names:
            return None
        self.num_calls += 1
        return ToolCall(f"call_{uuid.uuid4().hex[:24]}", *read)


def _begun(text: str, tag: str) -> int:
    """How many of a text's last characters may be the beginning of `tag`."""
    return next((n for n in range(min(len(tag), len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
