"""The program: global options, the commands, and what a failure looks like.

Contract: exit status 0 done, 1 the work failed, 2 wrong input, 130 interrupted, 141 the reader went away;
a failure is one line on stderr. Commands import what is heavy when they run, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path  # noqa: TC003  # typer reads annotations when it runs
from typing import TYPE_CHECKING, Annotated

import typer

from draftloop.cli import (
    adapters,
    benchmark,
    chat,
    collect,
    config,
    demo,
    doctor,
    evaluate,
    generate,
    models,
    report,
    serve,
    stats,
    train,
)
from draftloop.cli.console import say, say_error, say_failure, write
from draftloop.cli.options import GlobalOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "draftloop"
INTERRUPTED, READER_GONE = 130, 141
"""What a shell reports of a program that SIGINT or SIGPIPE ended."""
NUMBERS = {"int_parsing": "a whole number", "float_parsing": "a number"}
"""What an option wanted, by its validator's error."""


def main() -> None:
    """Run the command in `sys.argv` and leave with its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            # A terminal that cannot show a character gets a mark for it, not a crash.
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        else:
            # A file or a pipe holds every character. The bytes of a path that is not UTF-8 are spelt out.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit status. Nothing is raised but SystemExit by the interpreter."""
    try:
        command = typer.main.get_command(build_app())
        with command.make_context(PROGRAM, list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as exit_:
        return exit_.exit_code
    except typer.TyperException as error:
        say_error(_usage(error))
        return 2
    except KeyboardInterrupt:
        say("")
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; there must be somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except Exception as error:
        return say_failure(error)
    return 0


def build_app() -> typer.Typer:
    """The tree of commands."""
    app = typer.Typer(
        help="Speculative decoding with a local pair of models: a draft guesses, the target decides.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_global_options)
    app.command("generate")(generate.generate)
    app.command("chat")(chat.chat)
    app.command("collect")(collect.collect)
    app.command("evaluate")(evaluate.evaluate)
    app.command("benchmark")(benchmark.benchmark)
    app.command("serve")(serve.serve)
    app.command("stats")(stats.stats)
    app.command("report")(report.report)
    app.command("train")(train.train)
    app.command("demo")(demo.demo)
    app.command("doctor")(doctor.doctor)
    app.add_typer(adapters.build_app(), name="adapters")
    app.add_typer(models.build_app(), name="models")
    app.add_typer(config.build_app(), name="config")
    return app


def _global_options(
    context: typer.Context,
    config_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Settings; may be repeated, a later file wins. Default: configs/config.yaml.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override one setting, as in speculative.temperature=0; may be repeated.",
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    context.obj = GlobalOptions(tuple(config_files or ()), tuple(overrides or ()))
    if version:
        from importlib.metadata import version as version_of

        write(f"draftloop {version_of('draftloop')}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        write(context.get_help() + "\n")
        raise typer.Exit


def _usage(error: typer.TyperException) -> str:
    """A usage error in the form of every other error, with the remedy that fits."""
    message = _plain(error.format_message(), error.__cause__).rstrip(".")
    context: typer.Context | None = getattr(error, "ctx", None)
    command = PROGRAM if context is None else context.command_path
    option = message.partition("No such option: ")[2].partition(" ")[0]
    if command != PROGRAM and option in ("--config", "--set", "--version"):
        remedy = "Global options stand before the command: draftloop --config FILE generate"
        return f"No such option here: {option}. {remedy}."
    return f"{message}. See {command} --help."


def _plain(message: str, cause: BaseException | None) -> str:
    """A usage error's message, in our words where a value is no number."""
    if cause is None:
        return message
    from pydantic import ValidationError

    if isinstance(cause, ValidationError):
        details = cause.errors()[0]
        if noun := NUMBERS.get(details["type"]):
            return message.replace(details["msg"], f"{details['input']!r} is not {noun}")
    return message
