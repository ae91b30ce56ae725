"""A chat's answer in the API's words: `chat.completion`, or a row of `chat.completion.chunk`.

Contract: both say the same. Must not know how an answer is made, or what it was asked with.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING

from draftloop.answers import Completion
from draftloop.models.messages import ToolCall
from draftloop.server.openai.answering import usage_of
from draftloop.server.openai.logprobs import chat_logprobs, positions
from draftloop.server.openai.replies import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    FunctionCall,
    ToolCallReply,
    Usage,
)
from draftloop.server.openai.tools import CallReader, ToolUse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from draftloop.models.tokenizer import Tokenizer
    from draftloop.server.openai.answering import Step
    from draftloop.server.openai.fields import ChatFields
    from draftloop.server.openai.replies import Finish
    from draftloop.server.service import Service
    from draftloop.types import FinishReason, Trace


class ChatReply:
    """One answer as `chat.completion`, or as a row of `chat.completion.chunk`."""

    def __init__(self, service: Service, fields: ChatFields, tools: ToolUse | None) -> None:
        self._tokenizer: Tokenizer = service.tokenizer
        self._fields = fields
        self._reader = CallReader(tools.call_format, tools.names) if tools else None
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = service.model
        self._num_calls = 0

    def completed(self, completion: Completion) -> ChatCompletion:
        """The whole answer."""
        parts = [*self._read(completion.text), *self._rest()]
        said = "".join(part for part in parts if isinstance(part, str))
        calls = [self._call(part, None) for part in parts if isinstance(part, ToolCall)]
        message = AnswerMessage(role="assistant", content=said or (None if calls else ""), refusal=None)
        if calls:
            message.tool_calls = calls
        choice = ChatChoice(
            index=0,
            message=message,
            logprobs=self._logprobs(completion.token_ids, completion.traces),
            finish_reason=self._finish(completion.finish_reason),
        )
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[choice],
            usage=usage_of(completion),
        )

    async def chunks(self, steps: AsyncIterator[Step | Completion]) -> AsyncIterator[ChatChunk]:
        """The answer as it grows: a role, what it says, why it ended, and what it took if that is wanted."""
        begun = False
        async for step in steps:
            if not begun:
                begun = True
                yield self._chunk(Delta(role="assistant", content="", refusal=None))
            if isinstance(step, Completion):
                for delta in self._deltas(self._rest()):
                    yield self._chunk(delta)
                yield self._chunk(Delta(), finish=self._finish(step.finish_reason))
                if self._fields.include_usage:
                    yield self._with_usage([], usage_of(step))
                continue
            logprobs = self._logprobs(step.token_ids, step.traces)
            if logprobs is not None and logprobs.content:
                yield self._chunk(Delta(content=step.text), logprobs)
            elif step.text:
                for delta in self._deltas(self._read(step.text)):
                    yield self._chunk(delta)

    def _read(self, text: str) -> list[str | ToolCall]:
        if self._reader is None:
            return [text] if text else []
        return list(self._reader.add(text))

    def _rest(self) -> list[str | ToolCall]:
        return [] if self._reader is None else list(self._reader.end())

    def _deltas(self, parts: Sequence[str | ToolCall]) -> list[Delta]:
        deltas = []
        for part in parts:
            if isinstance(part, str):
                deltas.append(Delta(content=part))
            else:
                deltas.append(Delta(tool_calls=[self._call(part, self._num_calls)]))
                self._num_calls += 1
        return deltas

    def _call(self, call: ToolCall, index: int | None) -> ToolCallReply:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        function = FunctionCall(name=call.name, arguments=arguments)
        if index is None:
            return ToolCallReply(id=call.id, type="function", function=function)
        return ToolCallReply(index=index, id=call.id, type="function", function=function)

    def _finish(self, reason: FinishReason) -> Finish:
        called = self._reader is not None and self._reader.num_calls > 0
        if called and reason.value == "stop":
            return "tool_calls"
        return reason.value

    def _logprobs(self, token_ids: Sequence[int], traces: Sequence[Trace]) -> ChatLogprobs | None:
        if not self._fields.logprobs:
            return None
        told = positions(self._tokenizer, token_ids, traces, self._fields.top_logprobs or 0)
        return chat_logprobs(self._tokenizer, told)

    def _chunk(
        self, delta: Delta, logprobs: ChatLogprobs | None = None, *, finish: Finish | None = None
    ) -> ChatChunk:
        return self._with_usage(
            [ChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=finish)], None
        )

    def _with_usage(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatChunk:
        chunk = ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
        )
        if self._fields.include_usage:
            chunk.usage = usage
        return chunk
