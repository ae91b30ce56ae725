"""What the server answers, as the OpenAI API has it.

Contract: plain models, also the source of the OpenAPI document. What was not set is left out of the JSON
(`to_json`); what is set to None is there as null, as that API has it. Must not know how an answer is made.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

Finish = Literal["stop", "length", "tool_calls"]


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int
    """How many were in the cache already, and were not read again."""


class DraftFigures(BaseModel):
    """What speculation did for this answer; in the words of `draftloop generate --json`."""

    rounds: int
    drafted_tokens: int
    accepted_tokens: int
    acceptance_rate: float | None
    alpha: float | None
    tau: float | None
    suffix_rounds: int
    suffix_drafted_tokens: int
    suffix_accepted_tokens: int
    tokens_per_s: float | None
    seed: int
    adapter: str | None


class Usage(BaseModel):
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    draftloop: DraftFigures


class TopLogprob(BaseModel):
    """A likely token at one position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was emitted there, and the likely ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of a chat's answer, token by token."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(BaseModel):
    """A function, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallReply(BaseModel):
    """A call of a function."""

    index: int | None = None
    """In streams alone."""
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """The answer to `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallReply] | None = None


class ChunkChoice(BaseModel):
    """One answer's next part."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(BaseModel):
    """One event of a stream from `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """Of a completion, token by token: four lists of one length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Where each token begins, in characters of the answer's text."""


class CompletionChoice(BaseModel):
    """One answer, or its next part."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class TextCompletion(BaseModel):
    """The answer to `/v1/completions`, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


def to_json(reply: BaseModel) -> str:
    """What is sent."""
    return reply.model_dump_json(exclude_unset=True)
