"""Where prompts come from: an argument, stdin, or a file of many.

Contract: gives non-empty UTF-8 prompts or says which one is wrong and where. Must not know models.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from draftloop.cli.options import check_text
from draftloop.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

Outcome = TypeVar("Outcome")

THE_PROMPT = "the prompt"
NO_TASK = "no task"
"""Stands for the prompts that name none."""
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_LINE = 'Write one object a line, as in {"prompt": "…", "system": "…", "task": "…", "id": "…"}.'


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text to answer.

    Attributes:
        text: as the user wrote it.
        where: names it in an error ("the prompt", "prompts.jsonl:3").
        system: its own system message; None means that of the settings.
        task: a label for grouping.
        id: a name of its own.
    """

    text: str
    where: str = THE_PROMPT
    system: str | None = None
    task: str | None = None
    id: str | int | None = None


def read_prompt(argument: str | None) -> Prompt:
    """The prompt of the command line: the argument, or stdin where that is `-` or missing and piped.

    The line break that ends piped text is not part of the prompt.

    Raises:
        PromptError: there is none, it is blank, or it is not UTF-8.
    """
    if argument is not None and argument != "-":
        return _checked(Prompt(check_text(argument, "the prompt")))
    if argument is None and sys.stdin.isatty():
        raise PromptError(
            "there is no prompt",
            remedy='Give one: draftloop generate "Hello", pipe text in, or use --prompts.',
        )
    text = decode_utf8(sys.stdin.buffer.read(), "stdin")
    return _checked(Prompt(text.removesuffix("\n").removesuffix("\r")))


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: JSONL (by its suffix or its first line), or plain text, one a line.

    Blank lines are skipped. Fields other than `prompt`, `system`, `task` and `id` are left alone.

    Raises:
        PromptError: the file cannot be read, is not UTF-8, has a wrong line, or holds no prompt.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(
            f"the prompts file {path} cannot be read: {error.strerror}", remedy="Name an existing file."
        ) from None
    text = decode_utf8(data, str(path)).removeprefix("\ufeff")
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise PromptError(f"the prompts file {path} holds no prompt", remedy="Write one prompt a line.")
    if path.suffix.lower() in JSONL_SUFFIXES or _is_prompt_object(lines[0][1]):
        return [_parse(line, f"{path}:{number}") for number, line in lines]
    return [Prompt(line, f"{path}:{number}") for number, line in lines]


def limited(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of each task, in the order of the file."""
    taken: dict[str | None, int] = {}
    kept = []
    for prompt in prompts:
        taken[prompt.task] = taken.get(prompt.task, 0) + 1
        if limit is None or taken[prompt.task] <= limit:
            kept.append(prompt)
    return kept


def by_task(prompts: Iterable[Prompt], outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """What came of each prompt, by task, in the order of the tasks' first prompts."""
    tasks: dict[str, list[Outcome]] = {}
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        tasks.setdefault(prompt.task or NO_TASK, []).append(outcome)
    return tasks


def read_turns() -> Iterator[str]:
    """The lines of a piped stdin, as they come.

    Raises:
        PromptError: a line is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, start=1):
        yield decode_utf8(line, f"stdin:{number}").rstrip("\r\n")


def decode_utf8(data: bytes, where: str) -> str:
    """Decode `data`.

    Raises:
        PromptError: naming `where` and the offset of the first wrong byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            remedy="Save it as UTF-8.",
        ) from None


def _is_prompt_object(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "prompt" in value


def _parse(line: str, where: str) -> Prompt:
    try:
        return _from_json(json.loads(line), where)
    except RecursionError:
        raise PromptError(f"{where} is nested too deep", remedy=_LINE) from None
    except ValueError as error:
        raise PromptError(f"{where} is not JSON: {error}", remedy=_LINE) from None


def _from_json(values: Any, where: str) -> Prompt:
    if not isinstance(values, dict):
        raise PromptError(f"{where} is not a JSON object", remedy=_LINE)
    if "prompt" not in values:
        raise PromptError(f"{where} has no field 'prompt'", remedy=_LINE)
    identity = values.get("id")
    if identity is not None and type(identity) not in (str, int):
        raise PromptError(
            f"{where}: 'id' is {json.dumps(identity)[:60]}", remedy="Write text or a whole number."
        )
    prompt = Prompt(
        text=_text(values, "prompt", where) or "",
        where=where,
        system=_text(values, "system", where),
        task=_text(values, "task", where),
        id=identity,
    )
    return _checked(prompt)


def _text(values: dict[str, Any], name: str, where: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise PromptError(f"{where}: {name!r} is {json.dumps(value)[:60]}", remedy="Write text in quotes.")
    return None if value is None else check_text(value, f"{where}: {name!r}")


def _checked(prompt: Prompt) -> Prompt:
    if not prompt.text.strip():
        raise PromptError(f"{prompt.where} is empty", remedy="Write some text.")
    return prompt
