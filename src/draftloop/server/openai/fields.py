"""What a request may say, field by field, as the OpenAI API names it.

Contract: a field that is not here is refused, and so is a value that would change nothing. null stands for
"not given" everywhere. A field of that API that this server lacks is here only where clients send its
default, and takes nothing else. Must not know how an answer is made.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from draftloop.config.schema import LOWEST_TEMPERATURE, MAX_COUNT, MAX_DRAFT_TOKENS
from draftloop.models.grammar import OPTIONS_KEYWORD
from draftloop.models.messages import is_plain_json
from draftloop.server.openai.errors import CONTRADICTION
from draftloop.server.openai.wording import NAME_PATTERN, TOKEN_PATTERN

MAX_STOPS = 4
MAX_CHAT_LOGPROBS, MAX_COMPLETION_LOGPROBS = 20, 5
INT64 = 2**63
"""Seeds of the OpenAI API have 64 bits."""


class Contradiction(PydanticCustomError):
    """Fields that do not go together; `param` is the one to change."""

    def __new__(cls, param: str, reason: str) -> Self:
        """Both are told to the client."""
        return super().__new__(cls, CONTRADICTION, "{reason}", {"param": param, "reason": reason})


def _temperature(value: float) -> float:
    if 0 < value < LOWEST_TEMPERATURE:
        raise ValueError(f"0 (greedy), or a number of at least {LOWEST_TEMPERATURE}")
    return value


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    if not is_plain_json(value):
        raise ValueError("JSON without NaN, lone surrogates or a thousand levels")
    return value


def _of_an_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise ValueError('a schema of type "object": arguments have names')
    if OPTIONS_KEYWORD in schema:
        raise ValueError(f"a schema without {OPTIONS_KEYWORD}")
    return schema


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("text without lone surrogates") from None
    return value


Text = Annotated[str, AfterValidator(_text)]
StopText = Annotated[str, Field(min_length=1), AfterValidator(_text)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_plain_json)]
TokenKey = Annotated[str, Field(pattern=TOKEN_PATTERN)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


class Fields(BaseModel):
    """Strict (`"4"` is no number), no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Fields):
    """What a stream has beside its text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class AnswerFields(Fields):
    """What both kinds of completion take."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    user: Text | None = None
    store: bool | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None

    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Count | None = None
    num_draft_tokens: Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Contradiction("stream_options", "only a stream has them; add stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionFields(AnswerFields):
    """`/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Count], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=1)]
        | Annotated[list[Annotated[list[Count], Field(min_length=1)]], Field(min_length=1, max_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class TextPart(Fields):
    """A part of a message."""

    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(Fields):
    """What the assistant shall be like."""

    role: Literal["system", "developer"]
    content: Content
    name: None = None


class UserMessage(Fields):
    """A turn of the user."""

    role: Literal["user"]
    content: Content
    name: None = None


class CalledFunction(Fields):
    """A function and what it was called with."""

    name: Text
    arguments: Text


class MessageToolCall(Fields):
    """A call that the assistant made."""

    id: Text
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Fields):
    """A turn of the assistant."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[MessageToolCall] | None = None
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message with content, or with tool_calls")
        return self


class ToolMessage(Fields):
    """What a tool gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionTool(Fields):
    """A function that the model may call."""

    name: Name
    description: Text | None = None
    parameters: Annotated[JsonObject, AfterValidator(_of_an_object)] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool; of the kinds that there are, functions."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Fields):
    """A function by its name."""

    name: Name


class NamedTool(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Fields):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Fields):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Fields):
    """A JSON schema. It holds whether `strict` is said or not."""

    model_config = ConfigDict(protected_namespaces=())

    name: Name
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None
    description: Literal[""] | None = None


class SchemaFormat(Fields):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class ChatFields(AnswerFields):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_CHAT_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise Contradiction("max_tokens", "differs from max_completion_tokens; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise Contradiction("top_logprobs", "add logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(self, name) is not None and not names:
                raise Contradiction(name, "there are no tools; add tools, or leave it out")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise Contradiction("tool_choice", f"tools has no function {self.tool_choice.function.name}")
        if len(set(names)) < len(names):
            raise Contradiction("tools", "two functions have the same name")
        if self.offered_tools and self.logprobs:
            raise Contradiction("logprobs", "not where tools may be called")
        if self.offered_tools and self.response_format and self.response_format.type != "text":
            raise Contradiction("response_format", "not where tools may be called")
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """The functions that may be called."""
        return [] if self.tool_choice == "none" else list(self.tools or ())
