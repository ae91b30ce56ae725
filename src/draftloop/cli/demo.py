"""`draftloop demo`: three prompts, the target alone and then the pair, with a table of what it gained.

Contract: both modes run on the same loaded models, greedily, in turn for each prompt; the verdict is what
was measured, also where it is a loss. Must not know how an answer is made.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from draftloop.cli import options
from draftloop.cli.answer import AnswerWriter, watch
from draftloop.cli.asking import AnswerOptions, framed, load_models, prepare_models
from draftloop.cli.console import new_table, out_console, write
from draftloop.cli.figures import shown, total
from draftloop.cli.progress import waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.config import Config, LoadedConfig
    from draftloop.engine import Completion, Engine, Request

TARGET = "package:qwen2.5-coder-1.5b-instruct"
DRAFT = "package:qwen2.5-coder-0.5b-instruct"
"""The pair of configs/offline.yaml: it comes from a package index and needs no Hub."""

PROMPTS = (
    ("code", "Write a Python function that merges two sorted lists into one sorted list."),
    ("explanation", "Explain in a few sentences why the sky is blue."),
    ("list", "List the planets of the solar system with one fact about each."),
)
DEFAULT_MAX_TOKENS = 96
WARM_UP_TOKENS = 8


class PairChoice(StrEnum):
    """Whose models the demo runs."""

    PACKAGE = "package"
    CONFIG = "config"


Models = Annotated[
    PairChoice | None,
    typer.Option(
        "--models",
        help="The package pair, or that of the settings. "
        "Default: package, unless --config or --set names models.",
    ),
]


@dataclass(frozen=True, slots=True)
class _Result:
    """One prompt, answered both ways."""

    name: str
    alone: Completion
    speculative: Completion


def demo(
    context: typer.Context,
    models: Models = None,
    max_tokens: options.MaxTokens = DEFAULT_MAX_TOKENS,
    num_draft_tokens: options.NumDraftTokens = None,
) -> None:
    """Watch the pair at work, and see what it gains on this machine."""
    loaded = options.load_settings(context, {"--temperature": 0.0})
    config = _with_pair(loaded, models or _default_choice(context, loaded))
    asked = AnswerOptions(config=config, system=config.chat.system_message or "", seed=0)
    engine = load_models(config, prepare_models(asked))
    device = engine.backend.capabilities().device
    write(f"target {config.models.target.name}\ndraft  {config.models.draft.name}\non     {device}\n")
    results = _run(engine, asked)
    _show(results, config.speculative.num_draft_tokens)


def _default_choice(context: typer.Context, loaded: LoadedConfig) -> PairChoice:
    """The settings' pair where the user named one on the command line."""
    from draftloop.config import OriginKind

    named_files = bool((context.find_object(options.GlobalOptions) or options.GlobalOptions()).config_files)
    kinds = {loaded.origins[f"models.{role}.name"].kind for role in ("target", "draft")}
    named = OriginKind.SET in kinds or (named_files and OriginKind.FILE in kinds)
    return PairChoice.CONFIG if named else PairChoice.PACKAGE


def _with_pair(loaded: LoadedConfig, choice: PairChoice) -> Config:
    config = loaded.config
    if choice is PairChoice.CONFIG:
        return config
    models = config.models.model_copy(
        update={
            "target": config.models.target.model_copy(update={"name": TARGET}),
            "draft": config.models.draft.model_copy(update={"name": DRAFT}),
        }
    )
    return config.model_copy(update={"models": models})


def _run(engine: Engine, asked: AnswerOptions) -> list[_Result]:
    from draftloop.models.tokenizer import Message

    writer = AnswerWriter(color=True, quiet=True)
    requests = [
        asked.request(engine.tokenizer.chat_tokens(framed(asked.system, [Message("user", text)])))
        for _, text in PROMPTS
    ]
    with waiting("warming up"):
        for request in (_alone(requests[0]), requests[0]):
            engine.complete(dataclasses.replace(request, max_tokens=WARM_UP_TOKENS))
    results = []
    for (name, text), request in zip(PROMPTS, requests, strict=True):
        write(f"\n── {name}: {text}\n")
        with waiting("the target alone is answering"):
            alone = engine.complete(_alone(request))
        writer.legend()
        speculative = watch(engine.stream(request), writer.text)
        writer.end()
        if speculative is not None:
            results.append(_Result(name, alone, speculative))
    return results


def _alone(request: Request) -> Request:
    return dataclasses.replace(request, num_draft_tokens=0)


def _show(results: Sequence[_Result], num_draft_tokens: int) -> None:
    table = new_table("prompt", "alone, tok/s >", "speculating >", "ratio >", "alpha >", "tau >", "same text")
    alone_tally, alone_speed = total([result.alone for result in results])
    tally, speed = total([result.speculative for result in results])
    for result in results:
        one = result.speculative
        table.add_row(
            result.name,
            *_speeds(result.alone.tokens_per_s, one.tokens_per_s),
            shown(one.tally.alpha, 2),
            shown(one.tally.tau, 2),
            _sameness(result),
        )
    table.add_section()
    same = sum(result.alone.token_ids == result.speculative.token_ids for result in results)
    table.add_row(
        "all",
        *_speeds(alone_speed, speed),
        shown(tally.alpha, 2),
        shown(tally.tau, 2),
        f"{same} of {len(results)}",
    )
    write("\n")
    out_console().print(table)
    counted = f"{tally.completion_tokens} tokens against {alone_tally.completion_tokens}"
    write(f"\n{_verdict(alone_speed, speed, num_draft_tokens)}\n")
    write(f"({counted}, greedy; reading the prompts is not counted.)\n")


def _speeds(alone: float | None, speculative: float | None) -> tuple[str, str, str]:
    ratio = speculative / alone if alone and speculative else None
    return shown(alone, 1), shown(speculative, 1), shown(ratio, 2)


def _sameness(result: _Result) -> str:
    """Greedy text must be the same; kernels that sum in another order may turn a near tie."""
    here, there = result.alone.token_ids, result.speculative.token_ids
    if here == there:
        return "yes"
    position = next((i for i, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1]), None)
    return f"differs from token {min(len(here), len(there)) if position is None else position}"


def _verdict(alone: float | None, speculative: float | None, num_draft_tokens: int) -> str:
    if not (alone and speculative):
        return "Too little was generated to compare."
    ratio = speculative / alone
    setting = f"with num_draft_tokens = {num_draft_tokens}"
    if ratio >= 1.02:
        return f"Speculating was {ratio:.2f} times as fast as the target alone, {setting}."
    if ratio > 0.98:
        return f"Speculating was as fast as the target alone here, {setting}: no gain, no loss."
    return (
        f"Speculating was SLOWER here: {ratio:.2f} times the speed of the target alone, {setting}. "
        "Try another --num-draft-tokens, or answer with --no-speculation."
    )
