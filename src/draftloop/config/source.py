"""Reads one source of settings (a YAML file, or one `--set key=value`) and keeps where each value stood.

Contract: gives a flat map from dotted key to (value, origin) in which every key exists in the schema.
Numbers are those of YAML 1.2, so `1e-4` is a number and `010` is not eight. Must not know ranges.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, get_args

import yaml

from draftloop.config.schema import leaf_fields
from draftloop.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_FILE_BYTES = 1 << 20
"""A longer file is no configuration, and would be read at length before anybody says so."""

_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)


class OriginKind(StrEnum):
    """What sort of place a value came from."""

    DEFAULT = "default"
    FILE = "file"
    SET = "--set"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from; `str(origin)` is `default`, `configs/x.yaml:3` or `--set`."""

    kind: OriginKind
    path: Path | None = None
    line: int | None = None

    def __str__(self) -> str:
        return self.kind.value if self.path is None else f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One value as its source has it, and where."""

    value: Any
    origin: Origin


class _Loader(yaml.SafeLoader):
    """Only what a configuration needs: YAML 1.2's scalars, no aliases, no dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # the base class's own attribute
        **{
            c: [("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"))]
            for c in ["~", "n", "N", ""]
        },
        **{
            c: [("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"))]
            for c in "tTfF"
        },
        **{
            c: [("tag:yaml.org,2002:int", _INT), ("tag:yaml.org,2002:float", _FLOAT)] for c in "-+.0123456789"
        },
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read here", problem_mark=mark)
        return super().compose_node(parent, index)


def read_file(path: Path) -> dict[str, Entry]:
    """The settings of one YAML file; an empty file has none.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has an unknown or repeated key.
    """
    where = Origin(OriginKind.FILE, path, 1)
    node = _compose(_read_text(path), where, str(path))
    if node is None or _is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1} holds {_kind(node)} where sections are expected",
            remedy="Write `section:` and, indented under it, `key: value`.",
        )
    return _collect(node, "", where)


def read_override(text: str) -> dict[str, Entry]:
    """The setting of one `key.path=value`.

    The value is YAML (`4`, `true`, `[q_proj, v_proj]`). Where the setting is text, the value is taken as
    it stands, so that `: ` and ` #` need no quotes; nothing, `null` and `~` mean null, and a value in
    quotes is unquoted.

    Raises:
        ConfigError: there is no `=`, the key is unknown, or the value is not YAML.
    """
    origin = Origin(OriginKind.SET)
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(
            f"--set {text!r} is not of the form key.path=value",
            remedy="Write for example --set speculative.temperature=0.",
        )
    known = leaf_fields()
    if key not in known and key not in _sections():
        raise _unknown(key, origin)
    value = value.strip()
    if key in known and _is_text(key) and value not in ("", "~", "null") and value[0] not in "\"'":
        return {key: Entry(value, origin)}
    node = _compose(value, origin, f"--set {key}={_shortened(value)}")
    if key in known:
        return {key: Entry(None if node is None else _value(node, origin), origin)}
    if not isinstance(node, yaml.MappingNode):
        raise _section_expected(key, "nothing" if node is None else _kind(node), origin)
    return _collect(node, f"{key}.", origin)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"the configuration {path} cannot be read: {reason}",
            remedy="Name an existing YAML file after --config.",
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path} is longer than {MAX_FILE_BYTES} bytes",
            remedy="Name a configuration file after --config.",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line} is not UTF-8 (byte 0x{data[error.start]:02x})",
            remedy="Save the file as UTF-8 text.",
        ) from None


def _compose(text: str, origin: Origin, name: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = name if origin.path is None or mark is None else f"{origin.path}:{mark.line + 1}"
        raise ConfigError(
            f"{place} is not YAML that can be used: {_one_line(error.problem or error.context)}",
            remedy="Write the value as YAML has it, in quotes if need be."
            if origin.path is None
            else "Write `key: value` lines, indented by spaces.",
        ) from None
    except yaml.reader.ReaderError as error:
        place = name if origin.path is None else f"{origin.path}:{text.count(chr(10), 0, error.position) + 1}"
        raise ConfigError(
            f"{place} is not YAML: it holds the character {error.character:#04x}",
            remedy="Save the file as plain text.",
        ) from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deep", remedy="Write `key: value` lines.") from None
    finally:
        if loader is not None:
            loader.dispose()
    return node


def _collect(node: yaml.MappingNode, prefix: str, where: Origin) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        origin = Origin(where.kind, where.path, line) if where.path else where
        key = prefix + (key_node.value if isinstance(key_node, yaml.ScalarNode) else _kind(key_node))
        if key in lines:
            raise ConfigError(
                f"{key} stands twice ({origin}, first in line {lines[key]})", remedy="Keep one of the two."
            )
        lines[key] = line
        if "." in key.removeprefix(prefix) and key in leaf_fields():
            raise ConfigError(
                f"{key} ({origin}) is written with dots", remedy="In a file, nest it: one level a line."
            )
        if key in leaf_fields():
            entries[key] = Entry(_value(value_node, origin), origin)
        elif key not in _sections() or "." in key.removeprefix(prefix):
            raise _unknown(key, origin)
        elif isinstance(value_node, yaml.MappingNode):
            entries |= _collect(value_node, f"{key}.", where)
        elif not _is_null(value_node):
            raise _section_expected(key, _kind(value_node), origin)
    return entries


def _value(node: yaml.Node, origin: Origin) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return tuple(_value(item, origin) for item in node.value)
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _value(value, origin) for key, value in node.value}
    text = str(node.value)
    try:
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text.replace("_", ""))
            case "float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").lower())
            case "str":
                return text
    except (KeyError, ValueError):
        raise ConfigError(
            f"{_shortened(text)} ({origin}) is no {node.tag.rpartition(':')[2]}", remedy="Correct the value."
        ) from None
    raise ConfigError(
        f"the tag {node.tag} ({origin}) has no meaning here", remedy="Write the plain value, without a tag."
    )


def _unknown(key: str, origin: Origin) -> ConfigError:
    prefix, _, _ = key.rpartition(".")
    near = _nearest(key)
    if near:
        remedy = f"The nearest known key is {near}."
    else:
        start = f"{prefix}." if prefix in _sections() else ""
        known = dict.fromkeys(
            k.removeprefix(start).split(".")[0] for k in leaf_fields() if k.startswith(start)
        )
        remedy = f"Known {f'in {prefix}' if start else 'at the top'}: {', '.join(known)}."
    return ConfigError(f"{_shortened(key)} ({origin}) is not a setting", remedy=remedy)


def _nearest(key: str) -> str | None:
    """The known key that was meant: by its last name in the same section, then anywhere, then by its path."""
    prefix, _, last = key.rpartition(".")
    known = [*leaf_fields(), *sorted(_sections())]
    siblings = [k for k in known if k.rpartition(".")[0] == prefix]
    for candidates, cutoff in ((siblings, 0.75), (known, 0.6)):
        names = [k.rpartition(".")[2] for k in candidates]
        for name in difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            same_name = [k for k in candidates if k.rpartition(".")[2] == name]
            return difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)[0]
    paths = [] if prefix in _sections() else difflib.get_close_matches(key, known, n=1)
    return paths[0] if paths else None


def _section_expected(key: str, got: str, origin: Origin) -> ConfigError:
    example = next(k for k in leaf_fields() if k.startswith(f"{key}."))
    return ConfigError(
        f"{key} ({origin}) is a section, not {got}", remedy=f"Set one of its keys, as {example}."
    )


def _sections() -> frozenset[str]:
    return frozenset(key[:dot] for key in leaf_fields() for dot in _dots(key))


def _dots(key: str) -> Iterator[int]:
    return (i for i, c in enumerate(key) if c == ".")


def _is_text(key: str) -> bool:
    """Whether a value of this key is text: its default is one, and neither a switch nor a number would do."""
    field = leaf_fields()[key]
    kinds = {getattr(one, "__origin__", one) for one in get_args(field.annotation)}
    return isinstance(field.get_default(), str) and not kinds & {bool, int, float}


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the value {_shortened(str(node.value))}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "unreadable").split())


def _shortened(text: str) -> str:
    return shorten(json.dumps(text, ensure_ascii=False)[1:-1])


def shorten(text: str) -> str:
    """At most 60 characters of `text`, in a form that every terminal can print."""
    shown = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
