"""`draftloop demo`: the whole circle on one machine: answer, collect, train, judge, answer again.

Contract: everything runs on models loaded once, greedily, in a store of the demo's own; the verdict is what
was measured, also where the gate refuses or speculation loses. Must not know how an answer is made or a draft
trained.
"""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftloop.cli import demo_show, options, traffic
from draftloop.cli.answer import AnswerWriter, watch
from draftloop.cli.asking import NO_ADAPTER, AnswerOptions, load_models, prepare_models, request_for
from draftloop.cli.console import write
from draftloop.cli.figures import shown, speed_line, total
from draftloop.cli.progress import counting, waiting
from draftloop.cli.prompts import Prompt
from draftloop.cli.report import write_report
from draftloop.cli.training_progress import TrainingBars
from draftloop.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from draftloop.config import Config, LoadedConfig
    from draftloop.engine import Completion, Engine, Request
    from draftloop.learning.circle import Outcome
    from draftloop.learning.deployment import Deployed
    from draftloop.loading import Prepared
    from draftloop.reporting.page import Comparison
    from draftloop.storage.store import Store

TARGET = "package:qwen2.5-coder-1.5b-instruct"
DRAFT = "package:qwen2.5-coder-0.5b-instruct"
"""The pair of configs/offline.yaml: it comes from a package index and needs no Hub."""

DEMO_SETTINGS = (
    "speculative.num_draft_tokens=4",
    "speculative.schedule=fixed",
    "speculative.acceptance_threshold=0.9",
    "generation.max_tokens=96",
    "training.min_failure_cases=8",
    "training.lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    "training.lora.rank=16",
    "training.lora.alpha=32",
    "training.learning_rate=5e-4",
    "training.batch_size=4",
    "training.gradient_accumulation_steps=1",
    "training.num_epochs=3",
    "training.warmup_steps=4",
    "training.max_sequence_length=512",
    "memory.gradient_checkpointing=false",
)
"""What makes a lesson of a few minutes worth having. They stand below `--set`, and are said aloud."""

REQUESTS = 64
HELD_OUT = 4
"""Prompts of the same kind that are neither collected nor trained on."""
DOMAIN = "quartermaster"
FOLDER = "demo"
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
Requests = Annotated[
    int,
    typer.Option(
        "--requests", metavar="N", min=30, max=240, help="How many requests to collect and learn from."
    ),
]


def demo(
    context: typer.Context,
    models: Models = None,
    requests: Requests = REQUESTS,
    max_tokens: options.MaxTokens = None,
    num_draft_tokens: options.NumDraftTokens = None,
) -> None:
    """Watch the pair answer, learn from its failures, and answer again."""
    loaded = options.load_settings(context, defaults=DEMO_SETTINGS, forced=["speculative.temperature=0"])
    config = _own_folder(_with_pair(loaded, models or _default_choice(context, loaded)))
    directory = Path(config.storage.directory)
    _empty(directory)
    asked = AnswerOptions(config=config, system=traffic.SYSTEM, seed=0, adapter=NO_ADAPTER, source="demo")
    prepared = prepare_models(asked)
    # Told now, not after minutes of collecting.
    prepared.plan.check_training()
    from draftloop.loading import open_storage

    with open_storage(config) as store:
        engine = load_models(config, prepared, store, adapter=NO_ADAPTER)
        demo_show.say_setup(config, engine.backend.capabilities().device, DEMO_SETTINGS)
        comparison = _Circle(engine, store, asked, prepared).go(requests)
    names = demo_show.names_for(options.global_arguments(context), loaded.config, config)
    demo_show.say_next(write_report(config, comparison), names)


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


def _own_folder(config: Config) -> Config:
    """What the demo stores must not mix with the user's own requests."""
    directory = str(Path(config.storage.directory) / FOLDER)
    storage = config.storage.model_copy(update={"directory": directory, "collect": True})
    return config.model_copy(update={"storage": storage})


def _empty(directory: Path) -> None:
    """Forget the last demo.

    Raises:
        InputError: the folder holds something else, or is in use.
    """
    from draftloop.learning.circle import is_training
    from draftloop.storage.store import DATABASE_NAME

    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / DATABASE_NAME).exists():
        raise InputError(
            f"{directory} holds something that is no demo's",
            remedy="Set storage.directory to another folder.",
        )
    if is_training(directory):
        raise InputError(f"another demo is running in {directory}", remedy="Wait for its end, or stop it.")
    write(f"The last demo's requests and adapters in {directory} are forgotten.\n\n")
    shutil.rmtree(directory)


class _Circle:
    """The steps, in order."""

    def __init__(self, engine: Engine, store: Store, asked: AnswerOptions, prepared: Prepared) -> None:
        self._engine = engine
        self._store = store
        self._asked = asked
        self._prepared = prepared
        # What the prompts begin with alike is read once.
        self._conversation = engine.open_conversation()

    def go(self, num_requests: int) -> Comparison | None:
        """All of them; None where nothing was trained that could be compared."""
        every = traffic.quartermaster_prompts(250)
        held_out = [self._request(text, stored=False) for text in every[-HELD_OUT:]]
        with _step(1, "One request, answered by the target alone and by the pair"):
            self._show_one(every[-HELD_OUT], held_out[0])
        with _step(
            2, f"{num_requests} requests of the same kind: answer them and store what the draft missed"
        ):
            self._collect(every[:num_requests])
        with _step(3, "Train the draft on them"):
            outcome = self._learn()
        demo_show.say_verdict(outcome)
        if outcome.adapter is not None:
            with _step(4, f"{HELD_OUT} requests that it has never seen: {demo_show.rivals(outcome)}"):
                return self._compare(held_out, outcome.adapter)
        return None

    def _request(self, text: str, *, stored: bool) -> Request:
        from dataclasses import replace

        asked = request_for(self._asked, self._engine.tokenizer, Prompt(text, task=DOMAIN))
        return asked if stored else replace(asked, provenance=None)

    def _show_one(self, text: str, request: Request) -> None:
        from dataclasses import replace

        alone = replace(request, num_draft_tokens=0)
        with waiting("warming up"):
            for one in (alone, request):
                self._engine.complete(replace(one, max_tokens=WARM_UP_TOKENS), self._conversation)
        write(f"{text}\n\n")
        with waiting("the target alone is answering"):
            first = self._engine.complete(alone, self._conversation)
        writer = AnswerWriter(color=True, quiet=True)
        writer.legend()
        second = watch(self._engine.stream(request, self._conversation), writer.text)
        writer.end()
        if second is not None:
            same = "the same text" if first.token_ids == second.token_ids else "ANOTHER TEXT"
            write(f"\ntarget alone: {shown(first.tokens_per_s, 1)} tok/s\n")
            write(f"the pair:     {speed_line(second.tally, second.tokens_per_s, 'auto')} · {same}\n")

    def _collect(self, texts: Sequence[str]) -> None:
        completions = []
        with counting("collecting", len(texts), shown=True, lines=True) as counter:
            for text in texts:
                request = self._request(text, stored=True)
                completions.append(self._engine.complete(request, self._conversation))
                tally, _ = total(completions)
                counter.advance(f"alpha {shown(tally.alpha, 3)} · tau {shown(tally.tau, 2)}")
        tally, speed = total(completions)
        write(f"{tally.completion_tokens} tokens · {speed_line(tally, speed, 'auto')}\n")

    def _learn(self) -> Outcome:
        from draftloop.learning.circle import learn
        from draftloop.loading import PreparedDraft, open_school

        prepared, config = self._prepared, self._asked.config
        if prepared.draft_folder is None or prepared.draft is None:
            raise RuntimeError("the demo's models were prepared without a draft")
        draft = PreparedDraft(prepared.draft_folder, prepared.draft, prepared.tokenizer, prepared.backend)
        with TrainingBars() as bars:
            return learn(open_school(config, draft, self._store), bars, lambda: False)

    def _compare(self, requests: Sequence[Request], adapter: str) -> Comparison:
        """Each prompt in all three ways, in turn, so that the machine's mood hits all alike."""
        from dataclasses import replace

        from draftloop.learning.deployment import load_deployed

        trained = load_deployed(self._store, Path(self._asked.config.storage.directory), adapter)
        answers: dict[str, list[Completion]] = {way: [] for way in demo_show.WAYS}
        with counting("answering", len(requests), shown=True, lines=True) as counter:
            for request in requests:
                alone = replace(request, num_draft_tokens=0)
                answers[demo_show.ALONE].append(self._answer(alone, None))
                answers[demo_show.BEFORE].append(self._answer(request, None))
                answers[demo_show.AFTER].append(self._answer(request, trained))
                counter.advance()
        comparison = demo_show.comparison_of(answers)
        demo_show.say_comparison(comparison)
        return comparison

    def _answer(self, request: Request, deployed: Deployed | None) -> Completion:
        self._engine.wear(deployed)
        return self._engine.complete(request, self._conversation)


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    """A heading, and behind it what the step took."""
    write(f"\n── {number}. {title}\n")
    started_s = time.perf_counter()
    yield
    seconds = time.perf_counter() - started_s
    write(f"({seconds:.0f} s)\n" if seconds < 100 else f"({seconds / 60:.1f} min)\n")
