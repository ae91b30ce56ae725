"""Every setting: its name, default and range.

Contract: `Config()` is the built-in default, in the order of `configs/config.yaml`. Every leaf is read by
the program (`dev/check_settings.py` proves it). Must not know where a value came from.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo

CROSS_RULE = "cross_rule"
"""Type of the errors about settings that contradict each other; their context has `key` and `right`."""

LOWEST_TEMPERATURE = 0.001
"""Below it, logits / temperature may overflow float32, and the distribution is a point mass anyway."""

MAX_COUNT = 2**31 - 1
"""Backends count tokens in int32."""

MAX_DRAFT_TOKENS = 64
"""A round verifies K + 1 rows at once; no machine gains by a longer one."""

MIN_SEQUENCE_TOKENS = 16
"""A shorter training example has no room for a chat template's frame and an answer."""

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
"""What a browser sends in `Origin`, which is compared letter by letter (RFC 6454, section 6.2)."""


def _temperature(value: float) -> float:
    if 0 < value < LOWEST_TEMPERATURE:
        raise ValueError(f"0 (greedy), or a number of at least {LOWEST_TEMPERATURE}")
    return value


def _text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("text without lone surrogates") from None
    return value


def _name(value: str) -> str:
    if not value.strip() or value != value.strip() or not value.isprintable():
        raise ValueError("a name on one line, without spaces around it")
    return value


def _origin(value: str) -> str:
    if value != "*" and not ORIGIN.fullmatch(value):
        raise ValueError(
            "a list of origins as browsers send them: scheme://host or scheme://host:port, in lower case, "
            'without a path or a slash at the end, as in [http://localhost:3000]; or ["*"] for all'
        )
    return value


def _no_repeats(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a list that names each module once")
    return values


Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
CountOrNone = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Name = Annotated[str, AfterValidator(_name)]
Origin = Annotated[str, AfterValidator(_origin)]
Module = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Settings(BaseModel):
    """A section: frozen, strict (`"4"` is no number, `true` is no 1), no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class TargetSettings(Settings):
    """The large model, whose output is the output."""

    name: Name = "mlx-community/Qwen2.5-3B-Instruct-4bit"
    max_kv_cache_tokens: Count = 4096


class DraftSettings(Settings):
    """The small model, which guesses."""

    name: Name = "mlx-community/Qwen2.5-0.5B-Instruct-4bit"
    max_kv_cache_tokens: Count = 4096


class ModelSettings(Settings):
    """The pair."""

    target: TargetSettings = TargetSettings()
    draft: DraftSettings = DraftSettings()


class SuffixSettings(Settings):
    """Drafts that cost nothing: what followed the text's end before."""

    enabled: bool = True
    max_draft_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)] = 15
    megabytes: CountOrNone = 16


class SpeculativeSettings(Settings):
    """The round, and how logits become a distribution."""

    num_draft_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)] = 4
    schedule: Literal["adaptive", "fixed"] = "adaptive"
    suffix: SuffixSettings = SuffixSettings()
    temperature: Annotated[float, Field(ge=0), AfterValidator(_temperature)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    top_k: CountOrNone = 0
    min_p: Share = 0.0
    acceptance_threshold: Share | Literal["auto"] = 0.5
    draft_vocabulary: Count | Literal["full", "auto"] = "full"


class ChatSettings(Settings):
    """What frames a prompt."""

    system_message: Annotated[str, AfterValidator(_text)] | None = (
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    )


class LoraSettings(Settings):
    """The adapter's shape: `output = base(x) + (alpha / rank) · lora(x)` (Hu et al. 2021)."""

    rank: Count = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    target_modules: Annotated[
        tuple[Module, ...], Field(min_length=1, strict=False), AfterValidator(_no_repeats)
    ] = ("q_proj", "v_proj")


class TrainingSettings(Settings):
    """How the draft learns."""

    lora: LoraSettings = LoraSettings()
    objective: Literal["lk_hybrid", "forward_kl", "reverse_kl", "total_variation", "cross_entropy"] = (
        "lk_hybrid"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1.0e-4
    batch_size: Count = 1
    gradient_accumulation_steps: Count = 4
    num_epochs: Count = 3
    warmup_steps: CountOrNone = 10
    min_failure_cases: Count = 50
    replay_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2
    max_sequence_length: Annotated[int, Field(ge=MIN_SEQUENCE_TOKENS, le=MAX_COUNT)] = 2048
    seed: CountOrNone = 0


class MemorySettings(Settings):
    """Trades of time for memory."""

    gradient_checkpointing: bool = True
    cache_clear_frequency: Count = 10
    prefix_cache_megabytes: CountOrNone = 256
    answers_at_once: Count = 8


class GenerationSettings(Settings):
    """How long an answer may be."""

    max_tokens: Count = 512
    min_tokens: CountOrNone = 1


class LoggingSettings(Settings):
    """What is written beside the answers."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    tensorboard: bool = False


class StorageSettings(Settings):
    """Where requests, adapters and reports are kept. `load_config` makes the directory absolute."""

    directory: Name = "data"
    collect: bool = True
    max_megabytes: Count = 1024


class AdaptationSettings(Settings):
    """When the draft learns by itself, and when it takes a lesson back."""

    auto_train: Literal["auto"] | bool = "auto"
    idle_s: Annotated[float, Field(ge=0)] = 20.0
    longest_wait_s: Annotated[float, Field(ge=0)] = 600.0
    revert_after_requests: Count = 20


class ServerSettings(Settings):
    """How `serve` is reached, and how much it bears."""

    host: Name = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    api_key: Name | None = None
    cors_origins: Annotated[tuple[Origin, ...], Field(strict=False)] = ()
    max_queued_requests: CountOrNone = 64
    max_body_megabytes: Count = 8
    request_timeout_s: Seconds = 600.0
    stall_timeout_s: Seconds = 60.0
    shutdown_timeout_s: Annotated[float, Field(ge=0)] = 60.0
    log_prompts: bool = False


class Config(Settings):
    """Every setting. `Config()` is the built-in default."""

    models: ModelSettings = ModelSettings()
    speculative: SpeculativeSettings = SpeculativeSettings()
    chat: ChatSettings = ChatSettings()
    training: TrainingSettings = TrainingSettings()
    memory: MemorySettings = MemorySettings()
    generation: GenerationSettings = GenerationSettings()
    logging: LoggingSettings = LoggingSettings()
    backend: Literal["auto", "numpy", "torch", "mlx"] = "auto"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    storage: StorageSettings = StorageSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    server: ServerSettings = ServerSettings()

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        needed = self.speculative.num_draft_tokens + 2
        for role, model in (("target", self.models.target), ("draft", self.models.draft)):
            if model.max_kv_cache_tokens < needed:
                raise _contradiction(
                    f"models.{role}.max_kv_cache_tokens",
                    f"at least {needed}: a round of speculative.num_draft_tokens = {needed - 2} reads one "
                    "token more than it drafts, after a prompt",
                )
        longest = min(self.generation.max_tokens, self.models.target.max_kv_cache_tokens - 1)
        if self.generation.min_tokens > longest:
            raise _contradiction(
                "generation.min_tokens",
                f"at most {longest}, which generation.max_tokens = {self.generation.max_tokens} and "
                f"models.target.max_kv_cache_tokens = {self.models.target.max_kv_cache_tokens} allow",
            )
        if self.backend == "numpy" and self.device == "gpu":
            raise _contradiction("device", "auto or cpu, because backend: numpy has no other device")
        return self


def _contradiction(key: str, right: str) -> PydanticCustomError:
    return PydanticCustomError(CROSS_RULE, "{key} must be {right}", {"key": key, "right": right})


def leaf_fields(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting by its dotted key, in the schema's order."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            leaves |= leaf_fields(kind, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = field
    return leaves


def flatten(config: Config) -> dict[str, Any]:
    """Every value by its dotted key, in the schema's order."""
    return {key: _value_at(config, key) for key in leaf_fields()}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested form of dotted keys: what `Config.model_validate` reads."""
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *sections, last = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    return tree


def _value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
