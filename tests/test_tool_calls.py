"""How chat templates write calls: found by rendering one, and read again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from draftloop.models.messages import Message, ToolCall
from draftloop.models.tokenizer import Tokenizer
from draftloop.models.tool_calls import CallFormat, call_format_of
from toy_tokenizers import CHAT_TEMPLATE, SPECIALS, TOOL_TEMPLATE, byte_level

if TYPE_CHECKING:
    from pathlib import Path

HERMES = CallFormat("<tool_call>", "</tool_call>", "\n", "\n", "\n", "arguments")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TOOL_TEMPLATE, HERMES),
        (
            TOOL_TEMPLATE.replace("tool_call>", "call>").replace('"arguments": ', '"parameters": '),
            CallFormat("<call>", "</call>", "\n", "\n", "\n", "parameters"),
        ),
        (
            TOOL_TEMPLATE.replace("\n</tool_call>", "</tool_call>"),
            CallFormat("<tool_call>", "</tool_call>", "\n", "", "\n", "arguments"),
        ),
        (CHAT_TEMPLATE, None),
        (None, None),
        (TOOL_TEMPLATE.replace("<tool_call>", "").replace("</tool_call>", ""), None),
        (TOOL_TEMPLATE.replace("tojson }}}", "tojson }}"), None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_format_is_found_by_rendering_a_call(
    tmp_path: Path, template: str | None, expected: CallFormat | None
) -> None:
    assert call_format_of(Tokenizer.load(byte_level(tmp_path, chat_template=template))) == expected


def test_a_tag_that_the_answers_text_will_not_show_is_no_use(tmp_path: Path) -> None:
    hidden = byte_level(tmp_path, chat_template=TOOL_TEMPLATE, specials=(*SPECIALS, "<tool_call>"))
    assert call_format_of(Tokenizer.load(hidden)) is None


def test_calls_and_results_reach_the_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level(tmp_path, chat_template=TOOL_TEMPLATE))
    messages = [
        Message("user", "1+2?"),
        Message("assistant", "", (ToolCall("c1", "add", {"a": 1}),)),
        Message("tool", "3", tool_call_id="c1"),
    ]
    text = tokenizer.chat_text(messages, tools=[TOOL])
    assert '{"name": "add", "arguments": {"a": 1}}' in text
    assert '"parameters": {"type": "object"}' in text
    assert "<|im_start|>tool\n3<|im_end|>" in text
    assert tokenizer.chat_tokens(messages, tools=[TOOL]) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "add", "arguments": {"a": 1}}', ("add", {"a": 1})),
        ('\n{"arguments": {}, "name": "add"}\n', ("add", {})),
        ('{"name": "add"}', ("add", {})),
        ('{"name": "add", "arguments": [1]}', None),
        ('{"name": 1, "arguments": {}}', None),
        ('{"name": "add", "arguments": {}, "more": 1}', None),
        ('{"name": "add", "arguments": {', None),
        ("[" * 100_000, None),
        ("[1]", None),
    ],
)
def test_a_call_is_read_or_is_none(text: str, call: tuple[str, dict[str, object]] | None) -> None:
    assert HERMES.read(text) == call
