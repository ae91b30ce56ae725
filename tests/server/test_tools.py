"""Calls in an answer's text: read as it comes, whatever the pieces, and nothing is lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloop.models.grammar import Grammars
from draftloop.models.messages import ToolCall
from draftloop.models.tokenizer import Tokenizer
from draftloop.models.tool_calls import CallFormat
from draftloop.server.openai.fields import FunctionTool
from draftloop.server.openai.tools import CallReader, call_grammar
from toy_tokenizers import byte_level

if TYPE_CHECKING:
    from pathlib import Path

HERMES = CallFormat("<tool_call>", "</tool_call>", "\n", "\n", "\n", "arguments")
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
SUB = '<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call>'


def read(*pieces: str) -> list[object]:
    """Texts joined, calls as (name, arguments)."""
    reader = CallReader(HERMES, frozenset(["add", "sub"]))
    told: list[object] = []
    for part in [part for piece in pieces for part in reader.add(piece)] + list(reader.end()):
        if isinstance(part, ToolCall):
            told.append((part.name, json.dumps(part.arguments)))
        elif told and isinstance(told[-1], str):
            told[-1] += part
        else:
            told.append(part)
    return told


CALLED_ADD, CALLED_SUB = ("add", '{"a": 1}'), ("sub", "{}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", []),
        ("Just text.\n", ["Just text.\n"]),
        (ADD, [CALLED_ADD]),
        (f"I will add.\n\n{ADD}\n{SUB}\n", ["I will add.", CALLED_ADD, CALLED_SUB]),
        (f"{ADD} and so", [CALLED_ADD, " and so"]),
        (ADD.replace("add", "unknown"), [ADD.replace("add", "unknown")]),
        ("Well\n<tool_call>oh</tool_call> no", ["Well\n<tool_call>oh</tool_call> no"]),
        (ADD[:-4], [ADD[:-4]]),
        (ADD[: -len("</tool_call>")], [CALLED_ADD]),
        (ADD[:-20], [ADD[:-20]]),
        ("a < b <tool", ["a < b <tool"]),
        ("<tool_call><tool_call>", ["<tool_call><tool_call>"]),
    ],
)
def test_text_and_calls_are_told_apart(text: str, told: list[object]) -> None:
    assert read(text) == told


@given(
    st.lists(st.sampled_from([ADD, SUB, "\n", " ", "<", "tool_call>", "</tool_call>", "text", ADD[:30]])),
    st.data(),
)
def test_it_does_not_matter_where_the_pieces_end(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(*pieces) == read(text)


NUMBER = {"$ref": "#/$defs/number"}
FUNCTIONS = [
    FunctionTool(
        name="add",
        parameters={
            "type": "object",
            "properties": {"a": NUMBER},
            "required": ["a"],
            "additionalProperties": False,
            "$defs": {"number": {"type": "integer"}},
        },
    ),
    FunctionTool(name="sub"),
]


@pytest.mark.parametrize("added", [(), ("<tool_call>", "</tool_call>")])
def test_a_grammar_lets_through_calls_as_the_template_writes_them(
    tmp_path: Path, added: tuple[str, ...]
) -> None:
    tokenizer = Tokenizer.load(byte_level(tmp_path, normal=added))
    grammars = Grammars(tokenizer, tokenizer.vocab_size)

    def passes(text: str, *, forced: bool, several: bool) -> bool:
        written = call_grammar(tokenizer, HERMES, FUNCTIONS, forced=forced, several=several)
        tokens, (end,) = tokenizer.encode(text), tokenizer.encode("<|endoftext|>")
        state = grammars.lark(written).start()
        if state.num_allowed(tokens) < len(tokens):
            return False
        state.advance(tokens)
        return state.ended or state.num_allowed([end]) == 1

    for text, forced, free, one in (
        (ADD, True, True, True),
        (f"{ADD}\n{SUB}", True, True, False),
        (f"Well, 1 < 2.\n{ADD}", False, True, False),
        ("Well.", False, True, False),
        (ADD.replace("add", "unknown"), False, False, False),
        (ADD.replace("1", '"1"'), False, False, False),
        (ADD[:-3], False, False, False),
    ):
        assert passes(text, forced=True, several=True) == forced
        assert passes(text, forced=False, several=True) == free
        assert passes(text, forced=True, several=False) == one


def test_text_is_shown_as_soon_as_it_cannot_become_a_call() -> None:
    reader = CallReader(HERMES, frozenset(["add"]))
    assert list(reader.add("a <")) == ["a"]
    assert list(reader.add("b")) == [" <b"]
