"""What a request becomes, and what becomes of an answer's events: a scripted worker, the real routes."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from asking import ask, chat_body
from fastapi import FastAPI
from scripted import ScriptedWorker, saying
from serving import served

from draftloop.config import Config
from draftloop.errors import ContextFull, GrammarFailed, OutOfMemory
from draftloop.learning.recorder import Provenance, domain_of
from draftloop.models.grammar import Grammars
from draftloop.models.messages import Message, ToolCall
from draftloop.models.tokenizer import Tokenizer
from draftloop.models.tool_calls import call_format_of
from draftloop.server.figures import Outcome
from draftloop.server.openai.routes import install
from draftloop.server.service import Service
from draftloop.server.tickets import QueueFull, ShuttingDown, TimedOut
from draftloop.types import FinishReason, Sampling
from toy_tokenizers import TOOL_TEMPLATE, byte_level

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from draftloop.answers import Request

SYSTEM = "Be a toy."
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("t"), chat_template=TOOL_TEMPLATE))


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.model_validate({"chat": {"system_message": SYSTEM}, "generation": {"min_tokens": 3}})


@pytest.fixture(scope="module")
def service(tokenizer: Tokenizer, config: Config) -> Service:
    return Service(
        config=config,
        tokenizer=tokenizer,
        worker=ScriptedWorker(),  # type: ignore[arg-type]
        vocab_size=tokenizer.vocab_size,
        grammars=Grammars(tokenizer, tokenizer.vocab_size),
        call_format=call_format_of(tokenizer),
    )


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    app = FastAPI()
    app.state.service = service
    install(app)
    with served(app) as address:
        yield address


@pytest.fixture
def worker(service: Service) -> ScriptedWorker:
    worker: Any = service.worker
    worker.__init__()
    return worker  # type: ignore[no-any-return]


@pytest.fixture
def asked(address: str, worker: ScriptedWorker) -> Callable[..., Request]:
    """`asked(**fields)`: what the engine is asked because of a chat request."""

    def call(path: str = "/v1/chat/completions", **fields: object) -> Request:
        body = chat_body(**fields) if "chat" in path else {"model": "draftloop", **fields}  # type: ignore[arg-type]
        reply = ask(address, path, body)
        assert reply.status == 200, reply.body
        return worker.jobs[-1].request

    return call


def test_absent_fields_are_the_settings(asked: Callable[..., Request], config: Config) -> None:
    request = asked(temperature=None, max_tokens=None, n=1, logprobs=False, tools=[], stop=[])
    assert request.sampling == Sampling(0.7, 0.9)
    assert (request.max_tokens, request.min_tokens) == (512, 3)
    assert (request.num_draft_tokens, request.num_suffix_tokens) == (4, 15)
    assert (request.seed, request.stop, request.trace, request.grammar) == (None, (), False, None)
    assert (request.logit_bias, request.presence_penalty, request.frequency_penalty) == ({}, 0, 0)


def test_fields_that_are_given_act(asked: Callable[..., Request]) -> None:
    request = asked(
        temperature=0, top_p=0.5, top_k=7, min_p=0.1, max_tokens=9, min_tokens=2, num_draft_tokens=2, seed=-1,
        stop=["a", "b"], logprobs=True, logit_bias={"5": -100}, presence_penalty=1, frequency_penalty=-0.5,
    )  # fmt: skip
    assert request.sampling == Sampling(0, 0.5, 7, 0.1)
    assert (request.max_tokens, request.min_tokens, request.num_draft_tokens) == (9, 2, 2)
    assert (request.seed, request.stop, request.trace) == (2**64 - 1, ("a", "b"), True)
    assert request.logit_bias == {5: -100}
    assert (request.presence_penalty, request.frequency_penalty) == (1, -0.5)
    assert asked(max_completion_tokens=5, stop="x").max_tokens == 5
    assert asked(max_tokens=2).min_tokens == 2
    alone = asked(num_draft_tokens=0)
    assert (alone.num_draft_tokens, alone.num_suffix_tokens) == (0, 0)


def test_the_settings_system_message_stands_in_for_the_clients(
    asked: Callable[..., Request], tokenizer: Tokenizer
) -> None:
    def tokens(*messages: Message) -> list[int]:
        return tokenizer.chat_tokens(messages)

    hi, own = Message("user", "Hello"), Message("system", "Mine")
    assert asked().prompt_tokens == tokens(Message("system", SYSTEM), hi)
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Mine"}, {"role": "user", "content": "Hello"}]
        assert asked(messages=messages).prompt_tokens == tokens(own, hi)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert asked(messages=[{"role": "user", "content": parts}]).prompt_tokens == asked().prompt_tokens


def test_calls_and_their_results_reach_the_template(
    asked: Callable[..., Request], tokenizer: Tokenizer
) -> None:
    function = {"name": "add", "arguments": '{"a": 1}'}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ]
    turns = [
        Message("system", SYSTEM),
        Message("user", "?"),
        Message("assistant", "", (ToolCall("c", "add", {"a": 1}),)),
        Message("tool", "3", tool_call_id="c"),
    ]
    assert asked(messages=messages, tools=TOOLS).prompt_tokens == tokenizer.chat_tokens(turns, tools=TOOLS)
    untold = asked(messages=messages, tools=TOOLS, tool_choice="none").prompt_tokens
    assert untold == tokenizer.chat_tokens(turns)


@pytest.mark.parametrize(
    "arguments", ['{"a": "\\ud800"}', '{"a": NaN}', f'{{"a": {"[" * 700 + "]" * 700}}}', "[]", "{"]
)
def test_arguments_that_no_template_can_write_are_refused(
    address: str, worker: ScriptedWorker, arguments: str
) -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}]
    reply = ask(address, "/v1/chat/completions", chat_body(messages=messages, tools=TOOLS))
    assert (reply.status, reply.error["param"].partition("[")[0]) == (400, "messages")
    assert not worker.jobs


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "[" * 2000 + "]" * 2000])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_whose_arguments_nobody_could_send_stays_text(
    address: str, worker: ScriptedWorker, value: str, *, stream: bool
) -> None:
    text = CALL.replace("1", value)
    worker.script = saying(text)
    reply = ask(address, "/v1/chat/completions", chat_body(tools=TOOLS, stream=stream))
    if stream:
        said = "".join(event["choices"][0]["delta"].get("content") or "" for event in reply.events[:-1])
    else:
        said = reply.json["choices"][0]["message"]["content"]
    assert (reply.status, said) == (200, text)


def test_a_prompt_is_text_or_tokens(asked: Callable[..., Request], tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the end")
    for prompt in ("the end", ["the end"], tokens, [tokens]):
        assert list(asked("/v1/completions", prompt=prompt).prompt_tokens) == tokens


def test_what_is_stored_beside_an_answer(asked: Callable[..., Request], worker: ScriptedWorker) -> None:
    plain = asked().provenance
    assert plain is not None
    assert (plain.domain, plain.source) == (domain_of(SYSTEM), "serve")
    assert asked(store=False).provenance is None
    assert asked("/v1/completions", prompt="x").provenance == Provenance("no system message", "serve")
    domains = {
        domain(asked(**fields))
        for fields in (
            {},
            {"logit_bias": {"3": 1}},
            {"presence_penalty": 0.1},
            {"frequency_penalty": 0.1},
            {"logit_bias": {"3": 1}, "presence_penalty": 0.1},
            {"response_format": {"type": "json_object"}},
            {"tools": TOOLS},
            {"tools": TOOLS, "tool_choice": "required"},
        )
    }
    assert len(domains) == 7
    assert domain(asked(logit_bias={"3": 0}, presence_penalty=0)) == plain.domain


def test_turns_of_one_conversation_share_their_fate(asked: Callable[..., Request]) -> None:
    first = asked().provenance
    later = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello yourself"},
        {"role": "user", "content": "Go on"},
    ]
    second, other = asked(messages=later).provenance, asked(text="Bye").provenance
    assert first
    assert second
    assert other
    assert first.conversation == second.conversation != other.conversation


def domain(request: Request) -> str:
    assert request.provenance is not None
    return request.provenance.domain


def test_users_take_turns(asked: Callable[..., Request], worker: ScriptedWorker) -> None:
    asked(user="ann")
    asked(user="bob")
    asked()
    assert len({job.client for job in worker.jobs}) == 3


def test_a_stream_has_its_chunks_in_order(address: str, worker: ScriptedWorker) -> None:
    worker.script = saying("Hel", "lo", finish=FinishReason.LENGTH)
    body = chat_body(stream=True, stream_options={"include_usage": True})
    reply = ask(address, "/v1/chat/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = reply.events
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 5 + 2
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert usage["usage"]["draftloop"]["rounds"] == 2
    assert {chunk["id"] for chunk in [*chunks, usage]} == {usage["id"]}
    bare = ask(address, "/v1/chat/completions", chat_body(stream=True)).events
    assert len(bare) == 5
    assert not any("usage" in chunk for chunk in bare[:-1])


def test_a_completions_stream_has_its_chunks_in_order(address: str, worker: ScriptedWorker) -> None:
    worker.script = saying("Hel", "lo")
    body = {"model": "draftloop", "prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = ask(address, "/v1/completions", body).events
    told = [(chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert told == [("Hel", None), ("lo", None), ("", "stop")]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 2, "[DONE]")


def test_calls_come_as_calls_streamed_or_not(address: str, worker: ScriptedWorker) -> None:
    worker.script = saying("I add", ".\n", CALL[:20], CALL[20:])
    body = chat_body(tools=TOOLS)
    choice = ask(address, "/v1/chat/completions", body).json["choices"][0]
    assert choice["message"]["content"] == "I add."
    (call,) = choice["message"]["tool_calls"]
    assert set(call) == {"id", "type", "function"}
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"a": 1}'})
    assert choice["finish_reason"] == "tool_calls"
    events = ask(address, "/v1/chat/completions", {**body, "stream": True}).events
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I add."
    ((streamed,),) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert (streamed["index"], streamed["function"]) == (0, call["function"])
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    worker.script = saying(CALL)
    alone = ask(address, "/v1/chat/completions", body).json["choices"][0]["message"]
    assert alone["content"] is None


def test_without_tools_a_call_is_text(address: str, worker: ScriptedWorker) -> None:
    worker.script = saying(CALL)
    choice = ask(address, "/v1/chat/completions", chat_body()).json["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_one_call_alone_ends_the_answer(address: str, worker: ScriptedWorker) -> None:
    worker.script = saying(CALL.removesuffix("</tool_call>"))
    body = chat_body(tools=TOOLS, parallel_tool_calls=False)
    choice = ask(address, "/v1/chat/completions", body).json["choices"][0]
    assert worker.jobs[-1].request.stop == ("</tool_call>",)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["add"]


FAILURES = [
    (QueueFull(64, 7), 429, "rate_limit_error", "rate_limit_exceeded"),
    (ShuttingDown(), 503, "server_error", "shutting_down"),
    (TimedOut(5), 504, "server_error", "timeout"),
    (ContextFull("too long", remedy="Shorten it."), 400, "invalid_request_error", "context_length_exceeded"),
    (GrammarFailed("too complex", remedy="Simplify it."), 400, "invalid_request_error", "grammar_failed"),
    (OutOfMemory("memory ran out", remedy="Ask for less."), 500, "server_error", "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_one_shape(
    address: str,
    worker: ScriptedWorker,
    error: Exception,
    status: int,
    kind: str,
    code: str,
    *,
    stream: bool,
) -> None:
    def check() -> None:
        reply = ask(address, "/v1/chat/completions", chat_body(stream=stream))
        assert reply.status == status
        assert (reply.error["type"], reply.error["code"]) == (kind, code)
        if status == 429:
            assert reply.headers["retry-after"] == "7"

    worker.refusal = error
    check()
    worker.refusal, worker.script = None, [error]
    check()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_is_refused_before_it_is_answered_is_counted(
    address: str, worker: ScriptedWorker, path: str
) -> None:
    body = {**chat_body(), "prompt": "x"}
    body.pop("prompt" if "chat" in path else "messages")

    def refused() -> int:
        return worker.figures.counts().requests[Outcome.REFUSED]

    assert ask(address, path, body).status == 200
    assert refused() == 0
    wrong = (
        b"{",
        b"\xff",
        b"",
        {**body, "n": 2},
        {**body, "model": "nobody"},
        {**body, "num_draft_tokens": 9},
    )
    for count, sent in enumerate(wrong, start=1):
        assert ask(address, path, sent).status in (400, 404)
        assert refused() == count


@pytest.mark.parametrize(
    ("queued", "words"), [(0, "none may wait"), (1, "1 request waits"), (2, "2 requests wait")]
)
def test_a_full_queue_says_who_waits(address: str, worker: ScriptedWorker, queued: int, words: str) -> None:
    worker.refusal = QueueFull(queued, 7)
    message = ask(address, "/v1/chat/completions", chat_body()).error["message"]
    assert words in message
    assert "0 requests" not in message


@pytest.mark.parametrize(("error", "status", "kind", "code"), FAILURES)
def test_an_error_in_a_stream_ends_it(
    address: str, worker: ScriptedWorker, error: Exception, status: int, kind: str, code: str
) -> None:
    worker.script = [*saying("Hel")[:-1], error]
    _, text, told = ask(address, "/v1/chat/completions", chat_body(stream=True)).events
    assert text["choices"][0]["delta"] == {"content": "Hel"}
    assert (told["error"]["type"], told["error"]["code"]) == (kind, code)


def test_an_unforeseen_error_tells_nothing_of_the_prompt(
    address: str, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.refusal = RuntimeError("secret")
    reply = ask(address, "/v1/chat/completions", chat_body())
    assert reply.status == 500
    assert reply.error["code"] == "internal_error"
    assert b"secret" not in reply.body
    worker.refusal, worker.script = None, [*saying("Hel")[:-1], RuntimeError("secret")]
    *_, told = ask(address, "/v1/chat/completions", chat_body(stream=True)).events
    assert told["error"]["code"] == "internal_error"
    assert "secret" not in told["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_ticket(
    address: str, worker: ScriptedWorker, *, stream: bool
) -> None:
    worker.script = saying("Hel")[:-1]
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    body = json.dumps(chat_body(stream=stream))
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    if stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    assert worker.submitted.wait(30)
    assert not worker.tickets[-1].cancelled.is_set()
    assert connection.sock is not None or stream
    connection.close()
    assert worker.tickets[-1].cancelled.wait(30)
