"""`draftloop collect`: answer a file of prompts and store the answers, for training.

Contract: shows figures, never an answer; a prompt that is stored already is skipped, so a run that was
stopped goes on where it was. Must not know how an answer is made or stored.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftloop.cli import options
from draftloop.cli.afterwards import learn_afterwards
from draftloop.cli.asking import (
    AnswerOptions,
    load_models,
    open_store_for,
    prepare_models,
    read_options,
    request_for,
    system_of,
)
from draftloop.cli.console import say, write, write_json
from draftloop.cli.figures import setup_figures, shown, speed_line, summary_figures, total
from draftloop.cli.interrupts import interrupt_as_flag
from draftloop.cli.progress import counting
from draftloop.cli.prompts import Prompt, read_prompts
from draftloop.cli.together import answer_together
from draftloop.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.engine import Completion, Engine, Request
    from draftloop.learning.selection import Selection
    from draftloop.storage.store import Store

INTERRUPTED = 130

Again = Annotated[bool, typer.Option("--again", help="Answer also what was collected before.")]


@dataclass(frozen=True, slots=True)
class Collected:
    """What one run did.

    Attributes:
        prompts: in the file.
        collected_before: of them, stored by an earlier run and skipped.
        repeated: of them, the same as one further up, and skipped.
        completions: the answers of this run.
        interrupted: it was stopped before its end.
    """

    prompts: int
    collected_before: int
    repeated: int
    completions: tuple[Completion, ...]
    interrupted: bool


@options.takes_answer_flags(without=("no_collect",))
def collect(
    context: typer.Context,
    *,
    prompts_file: options.EveryPrompt,
    again: Again = False,
    flags: options.AnswerFlags,
    as_json: options.AsJson = False,
) -> None:
    """Answer a file of prompts and store the answers to learn from."""
    asked = read_options(
        context,
        flags,
        # What is collected is to learn from: every answer shall show what the draft can do.
        defaults=["speculative.schedule=fixed"],
    )
    if not asked.config.storage.collect:
        raise ConfigError(
            "storage.collect is false, and collect does nothing but store",
            remedy="Run it with --set storage.collect=true.",
        )
    prompts = read_prompts(prompts_file)
    with open_store_for(asked) as store:
        if store is None:
            raise RuntimeError("there is no store to collect into")
        run = _Run(asked, prompts, store)
        collected, engine = run.go(again=again)
        _show(collected, engine, asked, run.selection(), as_json=as_json)
        if collected.interrupted:
            say(f"stopped after {len(collected.completions)} answers; the same command goes on from there")
            raise typer.Exit(INTERRUPTED)
        learn_afterwards(context, asked.config, store)


def prompt_key(asked: AnswerOptions, prompt: Prompt) -> str:
    """Names what is asked: SHA-256 of the system message, the text and the sampling. K is not part of it."""
    from draftloop.learning.recorder import digest
    from draftloop.loading import sampling_of

    sampling = asdict(sampling_of(asked.config))
    return digest(json.dumps([system_of(asked, prompt), prompt.text, sampling], sort_keys=True))


class _Run:
    """One file, once."""

    def __init__(self, asked: AnswerOptions, prompts: Sequence[Prompt], store: Store) -> None:
        self._asked = asked
        self._prompts = prompts
        self._store = store

    def go(self, *, again: bool) -> tuple[Collected, Engine | None]:
        """Answer what is to be answered. The engine is None where nothing was."""
        from draftloop.loading import pair_of

        stored: set[str] = (
            set() if again else self._store.requests.collected_keys(pair_of(self._asked.config))
        )
        wanted: dict[str, Prompt] = {}
        before = 0
        for prompt in self._prompts:
            key = prompt_key(self._asked, prompt)
            before += key in stored
            if key not in stored:
                wanted.setdefault(key, prompt)
        repeated = len(self._prompts) - before - len(wanted)
        completions: tuple[Completion, ...] = ()
        engine, interrupted = None, False
        if wanted:
            prepared = prepare_models(self._asked)
            requests = [
                request_for(self._asked, prepared.tokenizer, prompt, key=key)
                for key, prompt in wanted.items()
            ]
            engine = load_models(self._asked.config, prepared, self._store, adapter=self._asked.adapter)
            completions, interrupted = _answer(engine, requests)
        return Collected(len(self._prompts), before, repeated, completions, interrupted), engine

    def selection(self) -> Selection:
        """What is stored now, as training would see it."""
        from draftloop.learning.selection import select
        from draftloop.loading import pair_of

        return select(self._store, pair_of(self._asked.config), self._asked.config)


def _answer(engine: Engine, requests: Sequence[Request]) -> tuple[tuple[Completion, ...], bool]:
    """The answers, made together as far as there is room, and whether Ctrl-C ended the work early."""
    completions: list[Completion] = []
    with (
        counting("collecting", len(requests), shown=True, lines=True) as counter,
        interrupt_as_flag(lambda: say("stopping after these answers; Ctrl-C again stops now")) as stop_wanted,
        closing(answer_together(engine, requests, stop_wanted=stop_wanted.is_set)) as answers,
    ):
        for _, completion in answers:
            completions.append(completion)
            tally, _ = total(completions)
            counter.advance(f"alpha {shown(tally.alpha, 2)} · tau {shown(tally.tau, 2)}")
    return tuple(completions), len(completions) < len(requests)


def _show(
    collected: Collected,
    engine: Engine | None,
    asked: AnswerOptions,
    selection: Selection,
    *,
    as_json: bool,
) -> None:
    completions = collected.completions
    failures = sum(
        done.tally.acceptance_rate is not None and done.tally.acceptance_rate < selection.threshold
        for done in completions
    )
    tally, speed = total(completions)
    if as_json:
        write_json(
            {
                "prompts": collected.prompts,
                "answered": len(completions),
                "collected_before": collected.collected_before,
                "repeated": collected.repeated,
                "completion_tokens": tally.completion_tokens,
                **summary_figures(completions),
                "failures": failures,
                **_waiting_figures(selection),
                "interrupted": collected.interrupted,
                **_setup(engine, asked),
            }
        )
        return
    if collected.collected_before:
        write(f"{collected.collected_before} of {collected.prompts} prompts were collected before")
        write("; --again answers them anew\n" if not completions else "\n")
    if collected.repeated:
        write(f"{collected.repeated} of {collected.prompts} prompts repeat another one and were left out\n")
    if completions:
        line = speed_line(tally, speed, asked.config.speculative.acceptance_threshold)
        write(f"{len(completions)} prompts · {tally.completion_tokens} tokens · {line}\n")
        write(f"{failures} of these answers are failures (acceptance_rate below {selection.threshold:.2f})\n")
    write(_what_next(selection) + "\n")


def _what_next(selection: Selection) -> str:
    waiting = f"{len(selection.failures)} failures wait to be learnt from"
    if selection.ready:
        return f"{waiting}, {selection.needed} are needed. Next: draftloop train"
    return (
        f"{waiting}, {selection.needed} are needed (training.min_failure_cases). Next: collect more, "
        "or lower that number. A fifth of the requests is held out to judge by and never counts."
    )


def _waiting_figures(selection: Selection) -> dict[str, Any]:
    return {
        "failures_waiting": len(selection.failures),
        "min_failure_cases": selection.needed,
        "acceptance_threshold": selection.threshold,
        "ready": selection.ready,
    }


def _setup(engine: Engine | None, asked: AnswerOptions) -> dict[str, Any]:
    backend = None if engine is None else engine.backend.capabilities().backend
    adapter = None if engine is None else engine.adapter
    return setup_figures(asked.config, backend, adapter, with_draft=asked.with_draft)
