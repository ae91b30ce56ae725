"""Layers files and overrides over the defaults, validates the result and words the errors.

Contract: `load_config` is the only way from a user's files to a `Config`. Every error names the key, the
value, where it stands and what would be right. Must not know how YAML is parsed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import TypeAdapter, ValidationError

from draftloop.config.schema import CROSS_RULE, MAX_COUNT, Config, flatten, leaf_fields, nest
from draftloop.config.source import Entry, Origin, OriginKind, read_file, read_override, shorten
from draftloop.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

DEFAULT_FILE = Path("configs/config.yaml")
"""Read when no file is named and it exists."""

STORAGE_KEY = "storage.directory"


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A valid configuration and where it came from.

    Attributes:
        config: the settings; `storage.directory` is absolute.
        origins: of each leaf, by its dotted key, in the schema's order.
    """

    config: Config
    origins: Mapping[str, Origin]


def load_config(paths: Sequence[Path] = (), overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read `paths` in order, then `overrides` (`key.path=value`); a later one wins over an earlier one.

    Everything lies over the built-in defaults. Without a path, `configs/config.yaml` is read where it
    exists. A relative `storage.directory` is resolved as `_storage_directory` says.

    Raises:
        ConfigError: a file cannot be read or is not YAML; a setting is unknown, mistyped, out of range,
            or contradicts another one.
    """
    files = list(paths) or ([DEFAULT_FILE] if DEFAULT_FILE.exists() else [])
    entries: dict[str, Entry] = {}
    for path in files:
        entries |= read_file(path)
    for override in overrides:
        entries |= read_override(override)
    default = Origin(OriginKind.DEFAULT)
    origins = {key: entries[key].origin if key in entries else default for key in leaf_fields()}
    try:
        config = Config.model_validate(nest({key: entry.value for key, entry in entries.items()}))
    except ValidationError as error:
        raise _explain(error, entries) from None
    directory = _storage_directory(config.storage.directory, origins[STORAGE_KEY], files)
    storage = config.storage.model_copy(update={"directory": str(directory)})
    return LoadedConfig(
        config=config.model_copy(update={"storage": storage}),
        origins=MappingProxyType(origins),
    )


def _storage_directory(value: str, origin: Origin, files: Sequence[Path]) -> Path:
    """The absolute storage directory.

    A relative one lies beside the configuration: in the folder of the file that sets it (of the first
    file where none does), or in the folder above where that folder is named `configs`, so that
    `project/configs/config.yaml` means `project/data`. From `--set`, or without a file, it is relative to
    the current folder.
    """
    path = Path(value).expanduser() if value.startswith("~/") else Path(value)
    file = origin.path or (files[0] if files and origin.kind is OriginKind.DEFAULT else None)
    if file is None:
        return path.absolute()
    folder = file.absolute().parent
    return (folder.parent if folder.name == DEFAULT_FILE.parent.name else folder) / path


def _explain(error: ValidationError, entries: Mapping[str, Entry]) -> ConfigError:
    """One sentence about the first wrong setting, and how many others are wrong."""
    problems: dict[str, ErrorDetails] = {}
    for details in error.errors():
        problems.setdefault(_key(details), details)
    key, details = next(iter(problems.items()))
    origin = entries[key].origin if key in entries else Origin(OriginKind.DEFAULT)
    value = entries[key].value if key in entries else flatten(Config())[key]
    others = len(problems) - 1
    more = f" ({others} other setting{'s are' if others > 1 else ' is'} wrong too)" if others else ""
    return ConfigError(
        f"{key} = {_shown(value)} ({origin}) cannot be used{more}",
        remedy=f"It must be {_right(details, leaf_fields()[key])}.",
    )


def _key(details: ErrorDetails) -> str:
    if details["type"] == CROSS_RULE:
        return str(details["ctx"]["key"])
    location = ".".join(str(part) for part in details["loc"])
    return next(key for key in leaf_fields() if f"{location}.".startswith(f"{key}."))


def _right(details: ErrorDetails, field: FieldInfo) -> str:
    if details["type"] == CROSS_RULE:
        return str(details["ctx"]["right"])
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
    schema = adapter.json_schema()
    if schema.get("maximum") == MAX_COUNT and details["type"] != "less_than_equal":
        del schema["maximum"]  # true, but not what is wrong
    return _describe(schema)


def _describe(schema: Mapping[str, Any]) -> str:
    """A JSON Schema of a leaf in words: the ranges are written once, in the schema."""
    if "anyOf" in schema:
        return ", or ".join(_describe(part) for part in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    kind = schema["type"]
    if kind == "array":
        size = "with at least one entry" if schema.get("minItems") else "of any length"
        return f"a list {size}, each {_describe(schema['items'])}"
    nouns = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{word} {schema[bound]}" for bound, word in words.items() if bound in schema]
    return f"{nouns.get(kind, kind)} {' and '.join(bounds)}".strip()


def _shown(value: Any) -> str:
    """A value as YAML would have it, on one line and not too long."""
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    shown = str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return shorten(shown)
