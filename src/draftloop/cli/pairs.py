"""What to say where nothing is stored of the settings' pair: which pairs there are, and how to see them.

Contract: notes on stderr; stdout is untouched. Must not know how a store is read.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from draftloop.cli.console import say
from draftloop.cli.options import global_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping

    import typer

    from draftloop.storage.records import PairKey


def say_other_pairs(pairs: Mapping[PairKey, int], context: typer.Context, command: str) -> None:
    """Tell of each pair that has requests, with the command that shows it."""
    from draftloop.reporting.wording import count

    stored = {pair: requests for pair, requests in pairs.items() if requests}
    if not stored:
        return
    say("note: nothing is stored of this pair (models.target.name, models.draft.name), but of others:")
    for pair, requests in stored.items():
        names = {"models.target.name": pair.target, "models.draft.name": pair.draft}
        chosen = [word for key, value in names.items() for word in ("--set", f"{key}={value}")]
        words = ["draftloop", *global_arguments(context), *chosen, command]
        say(f"  {count(requests, 'request')}: {shlex.join(words)}")
