"""Grammars over a model's tokens: what may come next, compiled once, and nobody's schema does harm."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toy_tokenizers
from draftloop.errors import GrammarFailed, InputError, ModelUnreadable
from draftloop.models.grammar import KEPT_GRAMMARS, MOST_CHARACTERS, Grammars
from draftloop.models.tokenizer import Tokenizer
from toys import EOS_ID

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
RIGHT = '{"name": "the cat", "old": true}'


@pytest.fixture(scope="module")
def tokenizer(toy_folder):
    return Tokenizer.load(toy_folder())


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, 272)


def test_a_valid_text_is_allowed_token_by_token_and_then_only_the_end(grammars, tokenizer):
    tokens = tokenizer.encode(RIGHT)
    state = grammars.json_schema(SCHEMA).start()
    for i, token in enumerate(tokens):
        allowed = state.allowed(tokens[:i])
        assert allowed.shape == (272,)
        assert allowed[token]
        assert not allowed[EOS_ID]
    assert state.num_allowed(tokens) == len(tokens)
    assert state.num_allowed([*tokens, EOS_ID]) == len(tokens) + 1
    assert state.num_allowed([*tokens, EOS_ID, tokens[0]]) == len(tokens) + 1
    assert not state.ended
    assert state.advance([*tokens, tokens[0], 7]) == len(tokens)
    assert state.ended
    assert set(state.allowed(()).nonzero()[0]) == tokenizer.eos_token_ids


@pytest.mark.parametrize("wrong", ["[", '{"old"', '{"name": 5', '{"name": "a", "old": 1', "x"])
def test_what_the_schema_forbids_is_forbidden(grammars, tokenizer, wrong):
    tokens = tokenizer.encode(wrong)
    state = grammars.json_schema(SCHEMA).start()
    legal = state.num_allowed(tokens)
    assert legal < len(tokens)
    assert not state.allowed(tokens[:legal])[tokens[legal]]
    assert state.allowed(tokens) is None
    assert state.allowed((300,)) is None
    assert state.num_allowed((300,)) == 0
    with pytest.raises(GrammarFailed, match="forbids token"):
        state.advance(tokens)


@given(st.lists(st.tuples(st.integers(0, 14), st.booleans()), max_size=8))
@settings(deadline=None)
def test_looking_ahead_leaves_no_trace(grammars, tokenizer, asked):
    """Whatever was asked before, an answer is that of a state that was never asked."""
    text = tokenizer.encode('{"name": "x"}')
    state, place = grammars.json_schema(SCHEMA).start(), 0
    for ahead, goes_on in asked:
        drafted = text[place : place + ahead]
        fresh = grammars.json_schema(SCHEMA).start()
        fresh.advance(text[:place])
        found, expected = state.allowed(drafted), fresh.allowed(drafted)
        assert (found is None) == (expected is None)
        assert found is None or (found == expected).all()
        assert state.num_allowed(drafted) == fresh.num_allowed(drafted)
        if goes_on:
            place += state.advance(drafted[:2]) if state.num_allowed(drafted[:2]) == len(drafted[:2]) else 0


def test_any_object(grammars, tokenizer):
    state = grammars.json_object().start()
    for text in ('{"a": [1, {"b": null}]}', '{\n  "a": -1.5e3\n}', "{}"):
        assert state.num_allowed(tokenizer.encode(text)) == len(tokenizer.encode(text))
    assert state.num_allowed(tokenizer.encode("[1]")) == 0
    # A model that writes blanks forever must come to something.
    for blanks in (" " * 500, "\n" * 500, "\n" + " " * 500):
        assert state.num_allowed(tokenizer.encode("{" + blanks)) < 50
    assert state.num_allowed(tokenizer.encode("{  ")) == 2


def test_a_lark_grammar(grammars, tokenizer):
    grammar = grammars.lark('start: "<tool>" %json {"type": "integer"} "</tool>"')
    tokens = tokenizer.encode("<tool>12</tool>")
    assert grammar.start().advance(tokens) == len(tokens)


def test_a_grammar_is_compiled_once_and_the_newest_are_kept(grammars):
    first = grammars.json_schema(SCHEMA)
    assert grammars.json_schema(json.loads(json.dumps(SCHEMA))) is first
    for i in range(KEPT_GRAMMARS):
        grammars.lark(f'start: "{i}"')
    assert grammars.json_schema(SCHEMA) is not first


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"if": {}, "then": {}}, '"if", "then"'),
        ({"type": "string", "format": "banana"}, "banana"),
        ({"type": "strin"}, "strin"),
        ({"$ref": "https://example.com/schema.json"}, "example.com"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "x-guidance"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": [{1, 2}]}, "not JSON"),
    ],
)
def test_what_is_not_supported_is_named(grammars, schema, told):
    with pytest.raises(InputError, match=told):
        grammars.json_schema(schema)


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def references(count, depth=0):
    """A chain: each definition refers to the next one, `depth` levels down."""

    def wrapped(schema):
        for _ in range(depth):
            schema = {"properties": {"a": schema}}
        return schema

    chain = {str(i): wrapped({"$ref": f"#/$defs/{i + 1}"}) for i in range(count)}
    return {"$defs": chain | {str(count): {"type": "integer"}}, "$ref": "#/$defs/0"}


@pytest.mark.parametrize(
    "schema",
    [
        nested(200),
        nested(100_000),
        references(100_000),
        references(101, depth=55),
        {"$ref": "#"},
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(2)]} for i in range(20)]},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(9000)}},
        {"type": "integer", "multipleOf": 999_999_937},
        {"type": "integer", "multipleOf": 9_999_991},
        {"type": "number", "multipleOf": 0.9999991},
        {"type": "integer", "multipleOf": 9_973_000},
        {"allOf": [{"type": "number", "multipleOf": 10**4200}, {"multipleOf": 3e-300}]},
        {"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]},
        {"enum": ["x" * MOST_CHARACTERS]},
    ],
    ids=[
        "deep",
        "deepest",
        "references",
        "deep references",
        "itself",
        "choices",
        "wide",
        "steps",
        "fewer steps",
        "small steps",
        "round steps",
        "steps far apart",
        "steps together",
        "long",
    ],
)
def test_a_hostile_schema_ends_in_an_error(grammars, schema):
    with pytest.raises(InputError) as caught:
        grammars.json_schema(schema)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "schema",
    [
        references(3900),
        references(100, depth=50),
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        {"type": "string", "minLength": 10**5, "maxLength": 10**9},
        {"type": "string", "pattern": "(a*)*(b|c*)*" * 50},
        {"type": "string", "pattern": "(.*a.{40})|(.*b.{41})"},
        {"enum": [f"number {i}" for i in range(5000)]},
        {"allOf": [{"type": "number", "multipleOf": 0.001}, {"multipleOf": 10**6}]},
        {"properties": {str(step): {"multipleOf": step} for step in (0.01, 0.25, 5, 60)}},
    ],
    ids=["references", "deep references", "items", "length", "stars", "counts", "enum", "tens", "steps"],
)
def test_a_demanding_schema_is_followed(grammars, schema):
    """References this many overflow a usual stack, which would end the process."""
    assert grammars.json_schema(schema).start().allowed(()).any()


def test_a_hostile_schema_in_a_lark_grammar_ends_in_an_error(grammars):
    schema = json.dumps({"type": "integer", "multipleOf": 9_999_991})
    with pytest.raises(InputError, match="multipleOf"):
        grammars.lark(f"start: %json {schema}")


@pytest.mark.parametrize("text", ["", "start: a", "start: /(/", "start: " + "(" * 60_000])
def test_a_broken_lark_grammar(grammars, text):
    with pytest.raises(InputError):
        grammars.lark(text)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_tokenizers_that_can_write_anything(tmp_path, kind):
    """The model's vocabulary is padded by five."""
    tokenizer = Tokenizer.load(getattr(toy_tokenizers, kind)(tmp_path / kind))
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 5)
    text = tokenizer.encode("abc")
    state = grammars.lark('start: " "? "abc"').start()
    assert len(state.allowed(())) == tokenizer.vocab_size + 5
    assert state.advance(text) == len(text)
    assert state.ended


@pytest.mark.parametrize("kind", ["metaspace", "word_piece"])
def test_tokenizers_of_words_are_refused(tmp_path, kind):
    tokenizer = Tokenizer.load(getattr(toy_tokenizers, kind)(tmp_path / kind))
    with pytest.raises(ModelUnreadable, match="tokenizer"):
        Grammars(tokenizer, tokenizer.vocab_size).json_object()


def test_every_eos_token_may_end_it(tmp_path):
    folder = toy_tokenizers.byte_level(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [265]}), encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    assert len(tokenizer.eos_token_ids) == 3
    state = Grammars(tokenizer, tokenizer.vocab_size).lark("start: /b+/").start()
    assert not state.allowed(())[list(tokenizer.eos_token_ids)].any()
    state.advance(tokenizer.encode("b"))
    assert state.allowed(())[list(tokenizer.eos_token_ids)].all()
    assert not state.ended
