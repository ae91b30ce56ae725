"""The `openai` package against a real server with toys behind it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from asking import ask, chat_body
from serving import toy_server

from draftloop.server.openai.logprobs import UNKNOWN_LOGPROB
from draftloop.types import TRACE_TOP_TOKENS
from toy_tokenizers import TOOL_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HELLO = [{"role": "user", "content": "Hello"}]
FEW_TOKENS = 24
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "greet", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "leave"}},
]


@pytest.fixture(scope="module")
def folders(
    toy_pair: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A pair whose target has a chat template that knows tools."""
    folders = toy_pair(noise=0.05, seed=3, max_position_tokens=2048)
    path = folders[0] / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "chat_template": TOOL_TEMPLATE}), encoding="utf-8")
    return folders


@pytest.fixture(scope="module")
def address(folders: tuple[Path, Path]) -> Iterator[str]:
    with toy_server(folders, generation={"max_tokens": FEW_TOKENS}) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def chat(client: openai.OpenAI) -> Callable[..., Any]:
    """`chat(**fields)`: the client's answer, extensions included."""

    def call(**fields: Any) -> Any:
        return client.chat.completions.create(**{"model": "draftloop", "messages": HELLO, **fields})

    return call


def test_models(client: openai.OpenAI, folders: tuple[Path, Path]) -> None:
    target = str(folders[0])
    assert [model.id for model in client.models.list()] == [target, "draftloop"]
    assert client.models.retrieve("draftloop").object == "model"
    assert ask(str(client.base_url), f"/v1/models/{target}").json["id"] == target
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_a_chat_answers_and_says_what_it_took(chat: Callable[..., Any]) -> None:
    answer = chat(temperature=0)
    usage = answer.usage
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert usage.completion_tokens == FEW_TOKENS
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    figures = usage.draftloop
    assert figures["accepted_tokens"] <= figures["drafted_tokens"]
    assert figures["tau"] == usage.completion_tokens / figures["rounds"]
    assert figures["tau"] > 1
    again = chat(temperature=0).usage
    assert again.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def streamed(chunks: Any) -> tuple[str, str, list[Any]]:
    """Text, finish reason and logprobs of a stream."""
    text, reason, logprobs = "", "", []
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reason = choice.finish_reason or reason
        logprobs += choice.logprobs.content if choice.logprobs else []
    return text, reason, logprobs


@pytest.mark.parametrize("seed", range(6))
def test_the_same_seed_gives_the_same_answer_streamed_or_not(chat: Callable[..., Any], seed: int) -> None:
    fields: dict[str, Any] = {"seed": seed, "temperature": 1.0, "logprobs": True, "top_logprobs": 3}
    whole = chat(**fields).choices[0]
    told = (whole.message.content, whole.finish_reason, whole.logprobs.content)
    assert streamed(chat(**fields, stream=True)) == told
    assert chat(**fields).choices[0] == whole
    assert streamed(chat(seed=seed, temperature=1.0, stream=True))[:2] == told[:2]
    text = whole.message.content
    for stop in {text[start : start + 2] for start in range(3, len(text) - 2, 5)}:
        cut = chat(**fields, stop=stop).choices[0]
        assert cut.message.content == text[: text.index(stop)]
        assert cut.finish_reason == "stop"
        expected = (cut.message.content, "stop", cut.logprobs.content)
        assert streamed(chat(**fields, stop=[stop], stream=True)) == expected


def test_another_seed_gives_another_answer(chat: Callable[..., Any]) -> None:
    texts = {chat(seed=seed, temperature=1.5).choices[0].message.content for seed in (1, 2, -1)}
    assert len(texts) == 3


def test_logprobs_are_the_targets_own_at_temperature_1(chat: Callable[..., Any]) -> None:
    for temperature in (0, 1.3):
        content = (
            chat(temperature=temperature, seed=1, logprobs=True, top_logprobs=20).choices[0].logprobs.content
        )
        for position in content:
            top = [one.logprob for one in position.top_logprobs]
            assert top == sorted(top, reverse=True)
            assert len(top) == 20
            assert 0.2 < np.exp(top).sum() <= 1 + 1e-5
            assert position.logprob <= top[0]
            if temperature == 0:
                assert position.logprob == top[0]
    plain = chat(temperature=0, logprobs=True).choices[0].logprobs.content
    assert [position.top_logprobs for position in plain] == [[]] * len(plain)


def test_a_bias_changes_the_answer_and_not_the_logprobs(chat: Callable[..., Any]) -> None:
    unlikely, answer = 3, {}
    for bias in (0, 100):
        choice = chat(temperature=0, logprobs=True, max_tokens=1, logit_bias={str(unlikely): bias}).choices[0]
        (answer[bias],) = choice.logprobs.content
    assert answer[100].bytes != answer[0].bytes
    assert answer[100].logprob < answer[0].logprob
    values = []
    for token in range(TRACE_TOP_TOKENS + 2):
        biased = chat(temperature=0, logprobs=True, max_tokens=1, logit_bias={str(token): 100}).choices[0]
        values.append(biased.logprobs.content[0].logprob)
    assert UNKNOWN_LOGPROB in values
    assert set(values) != {UNKNOWN_LOGPROB}


def test_penalties_keep_an_answer_from_repeating_itself(chat: Callable[..., Any]) -> None:
    def tokens(**fields: object) -> list[tuple[int, ...]]:
        content = chat(temperature=0, logprobs=True, max_tokens=200, **fields).choices[0].logprobs.content
        return [tuple(position.bytes) for position in content]

    free, held = tokens(), tokens(frequency_penalty=2, presence_penalty=2)
    assert len(set(held)) / len(held) > len(set(free)) / len(free)


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_follows_its_schema(chat: Callable[..., Any], seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    choice = chat(response_format=form, seed=seed, temperature=1, max_tokens=200).choices[0]
    assert choice.finish_reason == "stop"
    person = json.loads(choice.message.content)
    assert set(person) == {"name", "age"}
    assert person["name"] in {"ann", "bob"}
    assert isinstance(person["age"], int)
    stream = chat(response_format=form, seed=seed, temperature=1, max_tokens=200, stream=True)
    assert streamed(stream)[:2] == (choice.message.content, choice.finish_reason)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "leave"}}])
def test_a_tool_that_must_be_called_is_called(chat: Callable[..., Any], choice: Any, seed: int) -> None:
    fields = {
        "tools": TOOLS,
        "tool_choice": choice,
        "seed": seed,
        "max_tokens": 300,
        "temperature": 1,
    }
    if choice == "required":
        fields["parallel_tool_calls"] = False
    answer = chat(**fields).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert call.function.name in (["greet", "leave"] if choice == "required" else ["leave"])
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == ({"name", "age"} if call.function.name == "greet" else set())
    deltas = [chunk.choices[0].delta for chunk in chat(**fields, stream=True)]
    ((streamed_call,),) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert streamed_call.function.model_dump() == call.function.model_dump()


def test_completions(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "draftloop",
        "prompt": "the",
        "seed": 5,
        "logprobs": 2,
        "temperature": 1,
    }
    whole = client.completions.create(**fields).choices[0]
    assert len(whole.logprobs.tokens) == FEW_TOKENS
    assert whole.logprobs.text_offset[0] == 0
    assert all(2 <= len(top) <= 3 for top in whole.logprobs.top_logprobs)
    told = zip(whole.logprobs.tokens, whole.logprobs.token_logprobs, whole.logprobs.top_logprobs, strict=True)
    assert all(top[token] == logprob for token, logprob, top in told)
    parts = [chunk.choices[0] for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [one for part in parts if part.logprobs for one in getattr(part.logprobs, name)]
        assert joined == getattr(whole.logprobs, name)
    assert parts[-1].finish_reason == whole.finish_reason == "length"


def user(content: object, **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content, **fields}]}


def form(schema: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def tool(parameters: object) -> dict[str, object]:
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


IMAGE = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
RESULT = {"role": "tool", "tool_call_id": "c", "content": "3"}
BROKEN = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "gpt-4o"}, "model", "model_not_found"),
        ({"n": 2}, "n", "invalid_value"),
        ({"audio": {}}, "audio", "unknown_parameter"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": 1e-9}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"min_tokens": FEW_TOKENS + 1}, "min_tokens", "invalid_value"),
        ({"num_draft_tokens": 5}, "num_draft_tokens", "invalid_value"),
        ({"stop": list("abcde")}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_value"),
        (user(IMAGE), "messages[0].content[1].type", "invalid_value"),
        (user("Hi", name="Ann"), "messages[0].name", "invalid_value"),
        (user("\ud800"), "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "robot", "content": "?"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "assistant"}]}, "messages[0]", "invalid_value"),
        ({"messages": [RESULT]}, "messages[0].tool_call_id", "invalid_value"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [BROKEN]}]},
            "messages[0].tool_calls[0].function.arguments",
            "invalid_value",
        ),
        (user("word " * 2000), "messages", "context_length_exceeded"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools", "invalid_value"),
        (tool({"x-guidance": {"lenient": True}}), "tools[0].function.parameters", "invalid_value"),
        (form({"x-guidance": {"lenient": True}}), "response_format", "invalid_value"),
        (tool({"type": "string"}), "tools[0].function.parameters", "invalid_value"),
        (tool({"properties": {"a": {"type": "nothing"}}}), "tools", "invalid_value"),
        (form({"type": "object", "unevaluatedItems": 1}), "response_format", "invalid_value"),
        ({"tools": TOOLS, "logprobs": True}, "logprobs", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"the": 1}}, "logit_bias.the", "invalid_value"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "invalid_value"),
        ({"presence_penalty": 2.1}, "presence_penalty", "invalid_value"),
        ({"min_tokens": 2, "response_format": {"type": "json_object"}}, "min_tokens", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "auto"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "none", "tools": []}, "tool_choice", "invalid_value"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "invalid_value"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
    ],
)
def test_what_cannot_act_is_refused_by_name(
    address: str, fields: dict[str, Any], param: str, code: str
) -> None:
    for stream in (False, True):
        reply = ask(address, "/v1/chat/completions", {**chat_body(stream=stream), **fields})
        assert reply.status == (404 if code == "model_not_found" else 400)
        assert (reply.error["param"], reply.error["code"]) == (param, code)
        assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (user("Hi", name="Ann"), "messages[0].name: is not supported here; leave it out."),
        ({"metadata": {"a": 1}}, "metadata: is not supported here beyond its default, {}; leave it out."),
        ({"n": 2}, "n: is not supported here beyond its default, 1; leave it out."),
        ({"modalities": ["audio"]}, 'modalities[0]: is not supported here beyond its default, ["text"]'),
        ({"messages": []}, "messages: must not be empty."),
        ({"messages": ["Hi"]}, "messages[0]: must be an object."),
        (user(5), "messages[0].content: must be a string or a list."),
        (user(IMAGE), "messages[0].content[1].type: must be 'text'."),
        ({"messages": [{"role": "assistant"}]}, "messages[0]: must be an assistant's message with content"),
        (
            {"messages": [{"role": "boss", "content": "?"}]},
            "messages[0].role: must be one of 'system', 'developer', 'user', 'assistant', 'tool'.",
        ),
        ({"messages": [{"content": "?"}]}, "messages[0].role: must be given."),
        ({"logit_bias": {"hello": 1}}, "logit_bias.hello: keys must be token ids, written in digits."),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name: must be 1 to 64 letters, digits, underscores or hyphens.",
        ),
        ({"temperature": "1"}, "temperature: must be a number."),
        ({"temperature": 1e-9}, "temperature: must be 0 (greedy), or a number of at least 0.001."),
        ({"temperature": 3}, "temperature: must be at most 2."),
        ({"top_p": 0}, "top_p: must be more than 0."),
        ({"stop": list("abcde")}, "stop: may list 4 at most."),
        ({"tool_choice": "always"}, "tool_choice: must be 'none', 'auto' or 'required'."),
        (
            {"temprature": 1},
            "temprature is not a field that this server knows. The nearest known field is temperature.",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "shema": {}}}},
            "response_format.json_schema.shema is not a field that this server knows. "
            "The nearest known field is schema.",
        ),
        (user("Hi", contnet="Ho"), "messages[0].contnet is not a field that this server knows. The nearest "),
        ({"zzz": 1}, "zzz is not a field that this server knows."),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported here; leave it out."),
        ({"prediction": {}}, "prediction is not supported here; leave it out."),
        ({"web_search_options": {}}, "web_search_options is not supported here; leave it out."),
        ({"functions": [{"name": "f"}]}, "functions: is not supported here"),
        ({"best_of": 1}, "best_of is not supported here; leave it out."),
    ],
)
def test_a_refusal_says_in_plain_words_what_would_be_right(
    address: str, fields: dict[str, Any], message: str
) -> None:
    told = ask(address, "/v1/chat/completions", {**chat_body(), **fields}).error["message"]
    assert told.startswith(message)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "}"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [[1, -1]]}, "prompt[0][1]"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_act_on_completions_is_refused_by_name(
    address: str, fields: dict[str, Any], param: str
) -> None:
    reply = ask(address, "/v1/completions", {"model": "draftloop", "prompt": "x", **fields})
    assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"model": "draftloop", "\\ud800": 1}'],
)
def test_rubbish_is_refused(address: str, body: bytes) -> None:
    reply = ask(address, "/v1/chat/completions", body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["message"][0].isalpha()


def test_what_is_no_object_is_called_so(address: str) -> None:
    for body, words in (
        (b"", "The body is empty, or null."),
        (b"null", "The body is empty, or null."),
        (b"[]", "The body is not a JSON object."),
        (b'"x"', "The body is not a JSON object."),
        (b'{\n "model": "draftloop",\n "n": }', "The body is no JSON, from line 3, column 7 on: "),
    ):
        error = ask(address, "/v1/chat/completions", body).error
        assert error["message"].startswith(words)
        assert error["code"] == "invalid_json"


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_json_that_is_not_declared_as_such_is_told_how(address: str, kind: str) -> None:
    body = json.dumps(chat_body()).encode()
    reply = ask(address, "/v1/chat/completions", body, **{"Content-Type": kind})
    assert (reply.status, reply.error["code"]) == (400, "invalid_content_type")
    assert "Send the header Content-Type: application/json." in reply.error["message"]
    assert kind in reply.error["message"]


def test_options_of_a_stream_need_one(address: str) -> None:
    body = chat_body(stream_options={"include_usage": True})
    reply = ask(address, "/v1/chat/completions", body)
    assert (reply.status, reply.error["param"]) == (400, "stream_options")


def test_other_addresses_and_methods_are_refused_in_the_same_shape(address: str) -> None:
    for path in ("/v1/embeddings", "/v1/chat/completions/", "/chat/completions"):
        missing = ask(address, path, {"input": "x"})
        assert (missing.status, missing.error["code"]) == (404, "unknown_url")
        for known in ("/v1/chat/completions,", "/v1/completions", "/v1/models"):
            assert known in missing.error["message"]
    wrong = ask(address, "/v1/chat/completions")
    assert (wrong.status, wrong.error["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")


def test_the_client_raises_what_it_has_for_it(client: openai.OpenAI, chat: Callable[..., Any]) -> None:
    with pytest.raises(openai.NotFoundError):
        chat(model="gpt-4o")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(n=2)
    assert caught.value.param == "n"
