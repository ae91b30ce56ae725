"""From flags and settings to requests: what `generate`, `chat` and `demo` share.

Contract: checks everything that needs no model first, then loads. Must not know where an answer is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.cli import options
from draftloop.cli.progress import Bars, waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer

    from draftloop.config import Config
    from draftloop.engine import Engine, Request
    from draftloop.loading import Prepared
    from draftloop.models.tokenizer import Message


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are made.

    Attributes:
        config: the settings, the flags' values included.
        system: the system message; "" means none.
        stop: stop strings.
        seed: of every answer; None draws a new one each time.
        with_draft: False asks the target alone.
    """

    config: Config
    system: str
    stop: tuple[str, ...] = ()
    seed: int | None = None
    with_draft: bool = True

    def request(self, prompt_tokens: Sequence[int]) -> Request:
        """Ask for the answer to these tokens."""
        from draftloop.engine import Request

        return Request(
            prompt_tokens=prompt_tokens,
            sampling=options.sampling_of(self.config),
            max_tokens=self.config.generation.max_tokens,
            min_tokens=self.config.generation.min_tokens,
            num_draft_tokens=self.config.speculative.num_draft_tokens if self.with_draft else 0,
            stop=self.stop,
            seed=self.seed,
        )


def read_options(
    context: typer.Context,
    *,
    system: str | None,
    stop: list[str] | None,
    seed: int | None,
    no_speculation: bool,
) -> AnswerOptions:
    """Check the flags and read the settings under them.

    Raises:
        InputError: a flag is wrong, or contradicts another one.
    """
    drafts = "--num-draft-tokens" in options.flags_given(context)
    options.refuse_together(
        {"--no-speculation": no_speculation, "--num-draft-tokens": drafts},
        "Without speculation nothing is drafted.",
    )
    stops = options.check_stops(stop)
    if system is not None:
        options.check_text(system, "--system")
    config = options.load_settings(context).config
    return AnswerOptions(
        config=config,
        system=(config.chat.system_message or "") if system is None else system,
        stop=stops,
        seed=seed,
        with_draft=not no_speculation,
    )


def prepare_models(asked: AnswerOptions) -> Prepared:
    """Get the models onto this machine, with bars, and check that they fit; no draft where none is asked."""
    with waiting("preparing the models"):
        from draftloop.loading import prepare
    return prepare(asked.config, Bars(), with_draft=asked.with_draft)


def load_models(config: Config, prepared: Prepared) -> Engine:
    """Load what `prepare_models` found."""
    from draftloop.loading import load_prepared

    with waiting("loading the models"):
        return load_prepared(config, prepared)


def framed(system: str, turns: Sequence[Message]) -> list[Message]:
    """The turns behind the system message, if there is one."""
    from draftloop.models.tokenizer import Message

    return [*([Message("system", system)] if system else []), *turns]
