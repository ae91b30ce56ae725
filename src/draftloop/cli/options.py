"""The options that commands share, and the way from options to settings.

Contract: a flag that stands for a setting is checked by that setting's own rule. Must not know models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence  # noqa: TC003  # typer reads annotations when it runs
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from draftloop.cli.console import configure_logging
from draftloop.errors import ConfigError, InputError, PromptError

if TYPE_CHECKING:
    from draftloop.config import LoadedConfig

FLAG_KEYS: Mapping[str, str] = {
    "--max-tokens": "generation.max_tokens",
    "--min-tokens": "generation.min_tokens",
    "--temperature": "speculative.temperature",
    "--top-p": "speculative.top_p",
    "--top-k": "speculative.top_k",
    "--min-p": "speculative.min_p",
    "--num-draft-tokens": "speculative.num_draft_tokens",
    "--host": "server.host",
    "--port": "server.port",
}
"""The setting that each flag overrides for one command."""

MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", help="Longest answer. [generation.max_tokens]")
]
MinTokens = Annotated[
    int | None,
    typer.Option("--min-tokens", metavar="N", help="Shortest answer. [generation.min_tokens]"),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", help="0 is greedy. [speculative.temperature]"),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Nucleus sampling. [speculative.top_p]")
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", metavar="K", help="Only the K likeliest tokens; 0: all. [speculative.top_k]"),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", metavar="P", help="Drop tokens below P times the likeliest. [speculative.min_p]"),
]
NumDraftTokens = Annotated[
    int | None,
    typer.Option(
        "--num-draft-tokens",
        metavar="K",
        help="Tokens a round may draft. [speculative.num_draft_tokens]",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, help="Same seed, same answer. Default: a new one."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End the answer before TEXT; may be repeated."),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message. [chat.system_message]")
]
NoSpeculation = Annotated[bool, typer.Option("--no-speculation", help="The target model alone.")]
Color = Annotated[bool, typer.Option("--color", help="Show accepted draft tokens in another colour.")]
NoCollect = Annotated[
    bool, typer.Option("--no-collect", help="Store nothing of this. [storage.collect=false]")
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="NAME",
        help="The draft's adapter: a name, none (the bare draft), or active. Default: active.",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Many prompts: JSONL, or plain text, one a line."),
]
EveryPrompt = Annotated[
    Path, typer.Option("--prompts", metavar="FILE", help="The prompts: JSONL, or plain text, one a line.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]


@dataclass(frozen=True, slots=True)
class AnswerFlags:
    """The flags of every command that answers (`takes_answer_flags`).

    Those of `FLAG_KEYS` act through the settings (`load_settings`); the others are read from here.
    """

    system: System = None
    max_tokens: MaxTokens = None
    min_tokens: MinTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    seed: Seed = None
    stop: Stop = None
    num_draft_tokens: NumDraftTokens = None
    no_speculation: NoSpeculation = False
    adapter: Adapter = None
    no_collect: NoCollect = False


def takes_answer_flags(
    *, without: Sequence[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of `AnswerFlags`, in place of its parameter `flags`, which it gets them in.

    Args:
        without: those that the command has not.
        **defaults: where the command's differ.
    """
    names = [one.name for one in fields(AnswerFlags) if one.name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        flag_hints = get_type_hints(AnswerFlags, include_extras=True)
        plain = AnswerFlags(**defaults)
        parameters: list[inspect.Parameter] = []
        for one in inspect.signature(command).parameters.values():
            if one.name != "flags":
                parameters.append(one.replace(annotation=hints[one.name]))
                continue
            parameters += [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=getattr(plain, name),
                    annotation=flag_hints[name],
                )
                for name in names
            ]

        @wraps(command)
        def run(*args: Any, **given: Any) -> None:
            flags = AnswerFlags(**{name: given.pop(name) for name in names})
            command(*args, flags=flags, **given)

        # Typer reads both.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """What stands before the command: settings files and `--set` overrides, in order."""

    config_files: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = field(default=())


def global_arguments(context: typer.Context) -> list[str]:
    """The options before the command as they would be written again."""
    given: GlobalOptions = context.find_object(GlobalOptions) or GlobalOptions()
    files = [word for file in given.config_files for word in ("--config", str(file))]
    return [*files, *(word for override in given.overrides for word in ("--set", override))]


def flags_given(context: typer.Context) -> dict[str, float | str]:
    """The flags of `FLAG_KEYS` that the command has and that were given (or have a default), by name."""
    values = {flag: context.params.get(flag.strip("-").replace("-", "_")) for flag in FLAG_KEYS}
    return {flag: value for flag, value in values.items() if value is not None}


def load_settings(
    context: typer.Context, *, defaults: Sequence[str] = (), forced: Sequence[str] = ()
) -> LoadedConfig:
    """Read the settings with the command's flags over them; let `logging.level` act.

    Args:
        context: of the command; carries the global options and the flags.
        defaults: `KEY=VALUE` that the command sets where neither `--set` nor a flag does.
        forced: `KEY=VALUE` that the command sets whatever was given.

    Raises:
        ConfigError: names the flag or the key.
    """
    from draftloop.config import load_config

    options: GlobalOptions = context.find_object(GlobalOptions) or GlobalOptions()
    given = flags_given(context)
    flags = [f"{FLAG_KEYS[flag]}={value}" for flag, value in given.items()]
    overrides = [*defaults, *options.overrides, *flags, *forced]
    try:
        loaded = load_config(options.config_files, overrides)
    except ConfigError as error:
        raise _naming_the_flag(error, given) from None
    configure_logging(loaded.config.logging.level)
    return loaded


def check_text(text: str, what: str) -> str:
    """Return `text` when it is UTF-8: an argument may carry any bytes.

    Raises:
        PromptError: naming `what` ("the prompt").
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} is not UTF-8 (character {error.start + 1})", remedy="Write it as UTF-8."
        ) from None
    return text


def check_stops(stops: list[str] | None) -> tuple[str, ...]:
    """The stop strings.

    Raises:
        InputError: one is empty.
        PromptError: one is not UTF-8.
    """
    for stop in stops or []:
        if not stop:
            raise InputError("--stop is empty", remedy="Give it the text before which the answer ends.")
        check_text(stop, "--stop")
    return tuple(stops or ())


def refuse_together(given: Mapping[str, Any], why: str) -> None:
    """Refuse options that contradict each other: more than one of `given` is set.

    Raises:
        InputError: names the first two.
    """
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise InputError(f"{names[0]} and {names[1]} contradict each other", remedy=why)


def _naming_the_flag(error: ConfigError, given: Mapping[str, float | str]) -> ConfigError:
    for flag in given:
        if error.what.startswith(f"{FLAG_KEYS[flag]} = "):
            return ConfigError(error.what.replace("(--set)", f"({flag})", 1), remedy=error.remedy)
    return error
