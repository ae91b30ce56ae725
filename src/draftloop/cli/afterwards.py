"""What follows answers that were stored: a training run, where `adaptation.auto_train` is true.

Contract: never fails the command that answered; says in one line what happens. Must not know how training
works.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from draftloop.cli import options
from draftloop.cli.console import say
from draftloop.errors import DraftloopError

if TYPE_CHECKING:
    import typer

    from draftloop.config import Config
    from draftloop.storage.store import Store


def learn_afterwards(context: typer.Context, config: Config, store: Store | None) -> None:
    """Start a training run in a process of its own where enough failures wait, or one was interrupted.

    `auto` leaves that to commands that live longer than an answer.
    """
    wanted = config.adaptation.auto_train is True and config.storage.collect and config.backend != "numpy"
    if store is None or not wanted:
        return
    try:
        _start(context, config, store)
    except DraftloopError as error:
        say(f"note: no training was started: {error.what}")


def _start(context: typer.Context, config: Config, store: Store) -> None:
    from draftloop.learning.background import start_training
    from draftloop.learning.circle import interrupted_run, is_training
    from draftloop.learning.selection import select
    from draftloop.loading import pair_of

    pair, directory = pair_of(config), Path(config.storage.directory)
    if is_training(directory):
        return
    resume = interrupted_run(store, pair) is not None
    selection = select(store, pair, config)
    if not (resume or selection.ready_again):
        return
    arguments = options.global_arguments(context)
    if "--num-draft-tokens" in options.flags_given(context):
        # The gate shall judge by the rounds that are served.
        arguments += ["--set", f"speculative.num_draft_tokens={config.speculative.num_draft_tokens}"]
    start_training(arguments, directory, resume=resume)
    lesson = (
        "the interrupted training goes on" if resume else f"learning from {len(selection.failures)} failures"
    )
    say(f"{lesson} in the background; draftloop adapters list shows what comes of it")
