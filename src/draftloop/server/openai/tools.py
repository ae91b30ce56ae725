"""Tools: what a request offers, what the model may write because of it, and what it wrote.

Contract: calls are written in the format of the model's own template. What looks like a call and is none of
an offered function stays text: nothing is lost. Must not know HTTP, or how an answer is made.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.errors import InputError
from draftloop.models.grammar import OPTIONS_KEYWORD
from draftloop.models.messages import ToolCall
from draftloop.server.openai.errors import ApiError
from draftloop.server.openai.fields import NamedTool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from draftloop.models.grammar import Grammar
    from draftloop.models.tokenizer import Tokenizer
    from draftloop.models.tool_calls import CallFormat
    from draftloop.server.openai.fields import ChatFields, FunctionTool
    from draftloop.server.service import Service

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
SPACED_AS_TEMPLATES_WRITE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}
"""llguidance's options for arguments: what the model was trained on, and no room to lose itself in space."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How tools come into one answer.

    Attributes:
        shown: the functions, as the template is given them.
        call_format: how calls are written.
        names: of the functions.
        grammar: what the answer must look like; None leaves it to the model.
        stop: ends the answer behind its first call where there may be one alone.
    """

    shown: tuple[dict[str, Any], ...]
    call_format: CallFormat
    names: frozenset[str]
    grammar: Grammar | None
    stop: tuple[str, ...]


def tool_use(service: Service, fields: ChatFields) -> ToolUse | None:
    """What a request's tools mean; None where it offers none.

    Raises:
        ApiError: the model's template knows no tools, or a function's parameters cannot be held to.
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
    functions = allowed = [tool.function for tool in offered]
    several = fields.parallel_tool_calls is not False
    if isinstance(fields.tool_choice, NamedTool):
        allowed = [one for one in functions if one.name == fields.tool_choice.function.name]
        several = False
    forced = fields.tool_choice not in (None, "auto")
    grammar = None
    if forced or any(function.strict for function in functions):
        text = call_grammar(service.tokenizer, call_format, allowed, forced=forced, several=several)
        grammar = _compiled(service, text)
    return ToolUse(
        shown=tuple(tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in offered),
        call_format=call_format,
        names=frozenset(function.name for function in functions),
        grammar=grammar,
        stop=() if several or grammar is not None else (call_format.closing,),
    )


def _compiled(service: Service, text: str) -> Grammar:
    try:
        return service.grammars.lark(text)
    except InputError as error:
        raise ApiError(f"tools: {error}", param="tools", code="invalid_value") from error


def call_grammar(
    tokenizer: Tokenizer,
    call_format: CallFormat,
    functions: Sequence[FunctionTool],
    *,
    forced: bool,
    several: bool,
) -> str:
    """What an answer with calls looks like, in llguidance's form of Lark.

    Args:
        tokenizer: of the model: it may have tokens for the tags.
        call_format: how calls are written.
        functions: those that may be called.
        forced: nothing but calls; else any text, and calls behind it if the model wants.
        several: whether there may be more than one call.
    """
    opening, closing = (_tag(tokenizer, tag) for tag in (call_format.opening, call_format.closing))
    more = f" ({json.dumps(call_format.between)} {opening} call)*" if several else ""
    chosen = " | ".join(f"call_{index}" for index in range(len(functions)))
    before, after = json.dumps(call_format.before), json.dumps(call_format.after)
    lines = [f"call: {before} ({chosen}) {after} {closing}"]
    if forced:
        lines.append(f"start: {opening} call{more}")
    else:
        written = re.escape(call_format.opening).replace("/", "\\/")
        lines.append(f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{written}(.|\\n)*/")
        if opening.startswith("<"):
            lines.append(f"start: TEXT ({opening} call{more})?")
        else:
            # Spelt out, a tag would be taken for text until it is complete, and then for neither.
            lines += [f"start: TEXT | opened call{more}", f"opened[lazy]: /(.|\\n)*{written}/"]
    for index, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function.name)}, {json.dumps(call_format.arguments_key)}: '
        lines.append(f"call_{index}: {json.dumps(head)} arguments_{index} {json.dumps('}')}")
        # A schema of its own, so that what it refers to inside itself is found.
        schema = {"type": "object"} | (function.parameters or NO_PARAMETERS)
        schema[OPTIONS_KEYWORD] = SPACED_AS_TEMPLATES_WRITE
        lines.append(f"arguments_{index}: %json {json.dumps(schema)}")
    return "\n".join(lines)


def _tag(tokenizer: Tokenizer, tag: str) -> str:
    """A tag in a grammar: the token that the model has for it, which text alone would not match."""
    tokens = tokenizer.encode(tag)
    return f"<[{tokens[0]}]>" if len(tokens) == 1 else json.dumps(tag)


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
