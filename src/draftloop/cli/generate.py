"""`draftloop generate`: answer one prompt, or each prompt of a file, and store what training needs of it.

Contract: stdout holds the answers, or with `--json` exactly one object; flags, prompts and files are checked
before a model is loaded. Must not know how an answer is made or stored.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftloop.cli import options
from draftloop.cli.afterwards import learn_afterwards
from draftloop.cli.answer import AnswerWriter, watch
from draftloop.cli.asking import (
    AnswerOptions,
    load_models,
    open_store_for,
    prepare_models,
    read_options,
    request_for,
)
from draftloop.cli.console import say, write, write_json
from draftloop.cli.figures import (
    completion_figures,
    completion_line,
    setup_figures,
    speed_line,
    summary_figures,
    total,
)
from draftloop.cli.progress import counting
from draftloop.cli.prompts import Prompt, read_prompt, read_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.engine import Completion, Engine, Request

PromptArgument = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="The prompt; - or nothing reads stdin.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Go on with the text as it is: no chat template.")]
Stats = Annotated[
    bool | None,
    typer.Option("--stats/--no-stats", help="Figures on stderr. Default: yes, but not with --json."),
]


@dataclass(frozen=True, slots=True)
class _Display:
    """What is shown, and how."""

    as_json: bool
    stats: bool
    color: bool


@options.takes_answer_flags()
def generate(
    context: typer.Context,
    prompt: PromptArgument = None,
    *,
    prompts_file: options.PromptsFile = None,
    raw: Raw = False,
    flags: options.AnswerFlags,
    as_json: options.AsJson = False,
    stats: Stats = None,
    color: options.Color = False,
) -> None:
    """Answer a prompt, or each prompt of a file."""
    options.refuse_together({"PROMPT": prompt, "--prompts": prompts_file}, "Give one of them.")
    options.refuse_together(
        {"--raw": raw, "--system": flags.system is not None}, "--raw uses no chat template."
    )
    options.refuse_together({"--json": as_json, "--color": color}, "JSON has no colours.")
    asked = read_options(context, flags)
    prompts = [read_prompt(prompt)] if prompts_file is None else read_prompts(prompts_file)
    display = _Display(as_json, not as_json if stats is None else stats, color)
    with open_store_for(asked) as store:
        prepared = prepare_models(asked)
        requests = [request_for(asked, prepared.tokenizer, prompt, raw=raw) for prompt in prompts]
        engine = load_models(asked.config, prepared, store, adapter=asked.adapter)
        if prompts_file is None:
            _answer_one(engine, asked, requests[0], display)
        else:
            _answer_all(engine, asked, prompts, requests, display)
        learn_afterwards(context, asked.config, store)


def _answer_one(engine: Engine, asked: AnswerOptions, request: Request, display: _Display) -> None:
    if display.as_json:
        completion = engine.complete(request)
        write_json({**completion_figures(completion), **_setup(engine, asked)})
    else:
        completion = _shown_live(engine, request, AnswerWriter(color=display.color))
    if display.stats:
        say(completion_line(completion, asked.config.speculative.acceptance_threshold))


def _answer_all(
    engine: Engine,
    asked: AnswerOptions,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    display: _Display,
) -> None:
    live = sys.stdout.isatty() and not display.as_json
    writer = AnswerWriter(color=display.color)
    completions: list[Completion] = []
    with counting("answering", len(prompts), shown=not live) as counter:
        for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True), start=1):
            if live:
                say(f"{'' if number == 1 else chr(10)}── {number} of {len(prompts)}: {_title(prompt)}")
                completions.append(_shown_live(engine, request, writer))
            else:
                completions.append(engine.complete(request))
            if not (live or display.as_json):
                _write_block(completions[-1].text, first=number == 1)
            counter.advance()
    if display.as_json:
        results = [_named(prompt, done) for prompt, done in zip(prompts, completions, strict=True)]
        summary = {"prompts": len(prompts), **summary_figures(completions), **_setup(engine, asked)}
        write_json({**summary, "results": results})
    if display.stats:
        tally, speed = total(completions)
        line = speed_line(tally, speed, asked.config.speculative.acceptance_threshold)
        say(f"{len(prompts)} prompts · {tally.completion_tokens} tokens · {line}")


def _shown_live(engine: Engine, request: Request, writer: AnswerWriter) -> Completion:
    writer.legend()
    completion = watch(engine.stream(request), writer.text)
    if completion is None:
        raise RuntimeError("a stream ended without its completion")
    writer.end()
    return completion


def _write_block(text: str, *, first: bool) -> None:
    """Answers in a pipe: an empty line between two."""
    write(("" if first else "\n") + text + ("" if text.endswith("\n") else "\n"))


def _title(prompt: Prompt) -> str:
    name = prompt.where if prompt.id is None else str(prompt.id)
    first_line = prompt.text.strip().splitlines()[0]
    return f"{name}: {first_line if len(first_line) <= 60 else first_line[:59] + '…'}"


def _named(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    names = {"id": prompt.id, "task": prompt.task}
    return {
        **{key: value for key, value in names.items() if value is not None},
        **completion_figures(completion),
    }


def _setup(engine: Engine, asked: AnswerOptions) -> dict[str, Any]:
    backend = engine.backend.capabilities().backend
    return setup_figures(asked.config, backend, engine.adapter, with_draft=asked.with_draft)
