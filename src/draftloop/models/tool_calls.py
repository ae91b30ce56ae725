"""How a model's chat template writes calls of functions, and how they are read again.

Contract: the format is found by rendering a call and looking at what was written, never by a model's name.
Known is the tagged kind (Hermes, Qwen): a tag, one JSON object with a name and arguments, a tag. Must not
know HTTP, or how an answer is made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.errors import InputError
from draftloop.models.messages import Message, ToolCall, is_plain_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from draftloop.models.tokenizer import Tokenizer

_NAME, _KEY = "draftloop_probe", "draftloop_key"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "?",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}
_USER = Message("user", "?")


@dataclass(frozen=True, slots=True)
class CallFormat:
    """Calls between tags.

    Attributes:
        opening, closing: the tags, without space around them.
        before, after: what stands between a tag and the JSON, mostly a line's end.
        between: what stands between one call and the next.
        arguments_key: what the JSON calls the arguments.
    """

    opening: str
    closing: str
    before: str
    after: str
    between: str
    arguments_key: str

    def read(self, text: str) -> tuple[str, Mapping[str, Any]] | None:
        """The name and the arguments of a call, from the text between its tags; None where it is none."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or not is_plain_json(call):
            return None
        if call.keys() - {"name", self.arguments_key}:
            return None
        name, arguments = call.get("name"), call.get(self.arguments_key, {})
        return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def call_format_of(tokenizer: Tokenizer) -> CallFormat | None:
    """How the model writes calls; None where its template, if there is one, knows none or another format."""
    call = ToolCall("callprobe", _NAME, {_KEY: "?"})
    try:
        if tokenizer.chat_text([_USER], tools=[_TOOL]) == tokenizer.chat_text([_USER]):
            return None
        header, one, two = (
            tokenizer.chat_text(turns, tools=[_TOOL], add_generation_prompt=prompt)
            for turns, prompt in (
                ([_USER], True),
                ([_USER, Message("assistant", "", (call,))], False),
                ([_USER, Message("assistant", "", (call, call))], False),
            )
        )
    except InputError:
        return None
    # A template may end the header with a line's end that it leaves out before a call.
    start = len(header.rstrip())
    if one[:start] != header.rstrip():
        return None
    return _format_of(one[start:], two[start:], tokenizer)


def _format_of(one: str, two: str, tokenizer: Tokenizer) -> CallFormat | None:
    """From what was written for one call, and for two of the same."""
    found = _json_object(one)
    if found is None:
        return None
    start, end, call = found
    keys = [key for key, value in call.items() if value == {_KEY: "?"}]
    if call.get("name") != _NAME or len(keys) != 1 or len(call) != 2:
        return None
    opening, again = one[:start].strip(), two[end:].partition(one[start:end])[0]
    # Behind the first of two calls stand a closing tag, what separates them, and an opening tag.
    closing, found_opening, before = again.partition(opening) if opening else ("", "", "")
    tag = closing.strip()
    if not (found_opening and tag and all(_is_seen(one, tokenizer) for one in (opening, tag))):
        return None
    after, _, between = closing.partition(tag)
    return CallFormat(opening, tag, before, after, between, keys[0])


def _json_object(text: str) -> tuple[int, int, dict[str, Any]] | None:
    """Where the first JSON object of a text begins and ends, and what it is."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            start = text.find("{", start + 1)
            continue
        return start, end, value
    return None


def _is_seen(tag: str, tokenizer: Tokenizer) -> bool:
    """Whether a tag that the model writes shows in its text: special tokens do not."""
    return tokenizer.decode(tokenizer.encode(tag)) == tag
