"""`draftloop evaluate`: how well the draft guesses on a file of prompts, task by task.

Contract: stores nothing; one adapter is worn from the first prompt to the last; the same seed and settings
give the same figures but for the speed, however many are answered at once. Must not know how an answer is
made.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer  # noqa: TC002  # typer reads annotations when it runs

from draftloop.cli import options
from draftloop.cli.asking import (
    load_models,
    open_store_for,
    prepare_models,
    read_options,
    request_for,
    with_fixed_adapter,
)
from draftloop.cli.console import new_table, print_table, say, write_json
from draftloop.cli.figures import setup_figures, shown, summary_figures, total
from draftloop.cli.progress import counting
from draftloop.cli.prompts import by_task, read_prompts
from draftloop.cli.together import answer_together

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from draftloop.config import Config
    from draftloop.engine import Completion, Engine, Request

WARM_UP_TOKENS = 8


@options.takes_answer_flags(without=("no_collect",), seed=0)
def evaluate(
    context: typer.Context,
    *,
    prompts_file: options.EveryPrompt,
    flags: options.AnswerFlags,
    as_json: options.AsJson = False,
) -> None:
    """Measure speed and acceptance on a file of prompts; store nothing."""
    asked = read_options(
        context,
        replace(flags, no_collect=True),
        # Tau and acceptance compare drafts at one K only.
        defaults=["speculative.schedule=fixed"],
    )
    prompts = read_prompts(prompts_file)
    with open_store_for(asked) as store:
        asked = with_fixed_adapter(asked, store)
        prepared = prepare_models(asked)
        requests = [request_for(asked, prepared.tokenizer, prompt) for prompt in prompts]
        engine = load_models(asked.config, prepared, store, adapter=asked.adapter)
    at_once = min(_most_at_once(engine, asked.config), len(requests))
    completions = _answer(engine, requests, at_once)
    setup = setup_figures(
        asked.config,
        engine.backend.capabilities().backend,
        engine.adapter,
        with_draft=asked.with_draft,
    )
    tasks = by_task(prompts, completions)
    if as_json:
        figures = {"prompts": len(prompts), "answers_at_once": at_once, **summary_figures(completions)}
        write_json({**figures, "tasks": {name: _figures(done) for name, done in tasks.items()}, **setup})
    else:
        _show(tasks, completions)
        if at_once > 1:
            say(
                f"tok/s is of up to {at_once} answers together; of one at a time: "
                "--set memory.answers_at_once=1"
            )
        say(f"adapter: {engine.adapter or 'none'} · {setup['backend']} · nothing was stored")


def _most_at_once(engine: Engine, config: Config) -> int:
    """How many answers may share their rounds without a figure but the speed depending on it.

    A schedule chooses K by what rounds cost so many, and suffix matches come from the answers before.
    """
    return engine.most_together if config.speculative.schedule == "fixed" else 1


def _answer(engine: Engine, requests: Sequence[Request], at_once: int) -> list[Completion]:
    """In the order of the requests."""
    engine.complete(replace(requests[0], max_tokens=WARM_UP_TOKENS, min_tokens=1))
    done: dict[int, Completion] = {}
    with (
        counting("evaluating", len(requests), shown=True, lines=True) as counter,
        closing(answer_together(engine, requests, most=at_once)) as answers,
    ):
        for index, completion in answers:
            done[index] = completion
            tally, speed = total([*done.values()])
            counter.advance(f"alpha {shown(tally.alpha, 2)} · {shown(speed, 1)} tok/s")
    return [done[index] for index in range(len(requests))]


def _figures(completions: Sequence[Completion]) -> dict[str, Any]:
    return {"prompts": len(completions), **summary_figures(completions)}


def _show(tasks: Mapping[str, Sequence[Completion]], completions: Sequence[Completion]) -> None:
    columns = ("task", "prompts >", "tokens >", "tok/s >", "alpha >", "tau >", "acceptance_rate >")
    table = new_table(*columns)
    for name, done in tasks.items():
        table.add_row(name, *_cells(done))
    if len(tasks) > 1:
        table.add_section()
        table.add_row("all", *_cells(completions))
    print_table(table)


def _cells(completions: Sequence[Completion]) -> tuple[str, ...]:
    tally, speed = total(completions)
    return (
        str(len(completions)),
        str(tally.completion_tokens),
        shown(speed, 1),
        shown(tally.alpha, 3),
        shown(tally.tau, 2),
        shown(tally.acceptance_rate, 3),
    )
