"""Which setting to lower where a memory plan does not fit, and to what.

Contract: tries smaller values against a function that says what a configuration needs. Must not know how
that is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draftloop.config import Config, flatten
from draftloop.config.schema import MIN_SEQUENCE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 2**30


def advice(needed: Callable[[Config], int], config: Config, available_bytes: int, *, training: bool) -> str:
    """The setting to lower, and the value at which all fits; "" where all does.

    Settings above their defaults come first, then those that save most with their next smaller value.

    Args:
        needed: the bytes that a configuration needs.
        config: the settings.
        available_bytes: what there is.
        training: whether it is training that shall fit, or else generating.
    """
    if needed(config) <= available_bytes:
        return ""
    values = flatten(config)
    candidates = {
        key: [(value, needed(_changed(config, key, value))) for value in _smaller(key, values[key], floor)]
        for key, floor in _floors(config, training=training).items()
    }
    helpful = {key: steps for key, steps in candidates.items() if steps}
    role = "draft" if training else "target"
    smaller_model = f"Choose a smaller models.{role}.name (now {values[f'models.{role}.name']})"
    if not helpful:
        return f"{smaller_model}."
    defaults = flatten(Config())

    def first_above_default(key: str) -> tuple[bool, int]:
        value, num_bytes = helpful[key][0]
        return value != defaults[key], num_bytes

    for key in sorted(helpful, key=first_above_default):
        for value, num_bytes in helpful[key]:
            if num_bytes <= available_bytes:
                return f"Set {key} to {_yaml(value)} (now {_yaml(values[key])}): that needs {gib(num_bytes)}."
    key = min(helpful, key=lambda key: helpful[key][0][1])
    value, num_bytes = helpful[key][-1]
    return (
        f"{smaller_model}: {key} = {_yaml(values[key])} helps most of the settings, "
        f"but {_yaml(value)} would still need {gib(num_bytes)}."
    )


def _floors(config: Config, *, training: bool) -> dict[str, int]:
    """The settings that could save memory, and how low each may go."""
    if not training:
        kv_tokens = config.speculative.num_draft_tokens + 2
        return {
            "models.target.max_kv_cache_tokens": kv_tokens,
            "models.draft.max_kv_cache_tokens": kv_tokens,
            "memory.prefix_cache_megabytes": 0,
            "speculative.suffix.megabytes": 0,
        }
    return {
        "training.lora.rank": 1,
        "training.batch_size": 1,
        "training.max_sequence_length": MIN_SEQUENCE_TOKENS,
        "memory.gradient_checkpointing": True,
        "generation.max_tokens": 1,
    }


def _smaller(key: str, value: int, floor: int) -> list[int]:
    """The values to try below `value`: the default where it is lower, then half of it, and so on."""
    if isinstance(value, bool):
        return [] if value else [True]
    default = flatten(Config())[key]
    steps = [default] if floor <= default < value else []
    value = min(value, default)
    while value > floor:
        value = max(value // 2, floor)
        steps.append(value)
    return steps


def _changed(settings: Any, key: str, value: int) -> Any:
    """A copy of a section with one setting below it changed."""
    name, _, rest = key.partition(".")
    inner = _changed(getattr(settings, name), rest, value) if rest else value
    return settings.model_copy(update={name: inner})


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def gib(num_bytes: int) -> str:
    """A size as the plan shows it."""
    return f"{num_bytes / GIB:.2f} GiB"
