"""What validation found wrong with a field, in plain words.

Contract: from the kinds of error that pydantic tells to what would be right; what is not among them keeps
pydantic's words. Values are not repeated: they may be a prompt's text. Must not know HTTP.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

TOKEN_PATTERN = "^[0-9]{1,9}$"  # noqa: S105  # a token of a text
NAME_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"

DEFAULTS = {
    "annotations": "[]",
    "best_of": "1",
    "description": '""',
    "echo": "false",
    "function_call": '"none"',
    "functions": "[]",
    "include_obfuscation": "false",
    "metadata": "{}",
    "modalities": '["text"]',
    "n": "1",
    "service_tier": '"auto" or "default"',
    "suffix": '""',
}
"""Fields of the OpenAI API of which this server takes the default alone, and that."""
LACKING = DEFAULTS.keys() | {
    *("audio", "moderation", "prediction", "prompt_cache_key", "prompt_cache_options"),
    *("prompt_cache_retention", "reasoning_effort", "safety_identifier", "verbosity", "web_search_options"),
}
"""Fields of the OpenAI API that this server lacks, at some address or everywhere."""


def _plain(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


_KINDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
}
_PATTERNS = {
    TOKEN_PATTERN: "keys must be token ids, written in digits",
    NAME_PATTERN: "must be 1 to 64 letters, digits, underscores or hyphens",
}
_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than_equal": lambda told: f"must be at least {_plain(told['ge'])}",
    "greater_than": lambda told: f"must be more than {_plain(told['gt'])}",
    "less_than_equal": lambda told: f"must be at most {_plain(told['le'])}",
    "less_than": lambda told: f"must be less than {_plain(told['lt'])}",
    "too_short": lambda _: "must not be empty",
    "string_too_short": lambda _: "must not be empty",
    "too_long": lambda told: f"may list {told['max_length']} at most",
    "literal_error": lambda told: f"must be {told['expected']}",
    "union_tag_invalid": lambda told: f"must be one of {told['expected_tags']}",
    "union_tag_not_found": lambda _: "must be given",
    "none_required": lambda _: "is not supported here; leave it out",
    "value_error": lambda told: f"must be {told['error']}",
}
_REFUSED = ("none_required", "literal_error", "too_long", "less_than_equal", "greater_than_equal")


def reason_of(param: str, errors: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a field, to follow its name.

    Args:
        param: the field, as in `messages[0].content`.
        errors: pydantic's about it; several where it may be of several kinds. The first one counts.
    """
    first = errors[0]
    kind, context = first["type"], first.get("ctx", {})
    default = DEFAULTS.get(param.rpartition(".")[2].partition("[")[0])
    if kind in _REFUSED and default is not None:
        return f"is not supported here beyond its default, {default}; leave it out"
    if kind in _KINDS:
        kinds = dict.fromkeys(_KINDS[one["type"]] for one in errors if one["type"] in _KINDS)
        return f"must be {' or '.join(kinds)}"
    if kind == "string_pattern_mismatch" and context["pattern"] in _PATTERNS:
        return _PATTERNS[context["pattern"]]
    return _WORDS[kind](context) if kind in _WORDS else str(first["msg"])


def unknown(param: str, model: object) -> str:
    """A sentence about a field that is not known, with the one that may have been meant.

    Args:
        param: the field, as in `messages[0].content`.
        model: pydantic's of the body.
    """
    *path, name = [step.partition("[")[0] for step in param.split(".")]
    if name in LACKING:
        return f"{param} is not supported here; leave it out."
    models = list(_models(model))
    for step in path:
        fields = [one.model_fields[step] for one in models if step in one.model_fields]
        models = [inner for field in fields for inner in _models(field.annotation)]
    known = sorted({field.alias or key for one in models for key, field in one.model_fields.items()})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    hint = f" The nearest known field is {near[0]}." if near else ""
    return f"{param} is not a field that this server knows.{hint}"


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """Models that a field may hold, in lists or not."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
