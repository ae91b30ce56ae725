"""`draftloop report`: one HTML file that shows what the draft has learnt.

Contract: writes that file, whole or not at all, and prints its path; changes nothing in the store and
fetches nothing. Must not know what is in the page.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftloop.cli.console import write
from draftloop.cli.options import load_settings
from draftloop.cli.pairs import say_other_pairs
from draftloop.cli.progress import format_bytes, waiting
from draftloop.errors import DraftloopError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from draftloop.config import Config
    from draftloop.models.tokenizer import Tokenizer
    from draftloop.reporting.page import Comparison
    from draftloop.storage.records import PairKey

REPORTS_FOLDER = "reports"
VERSIONED = ("numpy", "torch", "mlx")

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="FILE", help="Default: a new reports/report-DATE.html below storage.directory."
    ),
]


def report(context: typer.Context, output: Output = None) -> None:
    """Write an HTML page about the draft: alpha and tau over requests, training, adapters, hard tokens."""
    config = load_settings(context).config
    path, others = _written(config, None if output is None else _checked(output), None)
    write(f"{path}\n")
    say_other_pairs(others, context, "report")


def write_report(config: Config, comparison: Comparison | None) -> Path:
    """Write the page of what is stored, with what was compared just now; returns where it lies.

    Raises:
        InputError: nothing is stored yet.
        StorageError: the store cannot be read, or the page cannot be written.
    """
    return _written(config, None, comparison)[0]


def _written(
    config: Config, path: Path | None, comparison: Comparison | None
) -> tuple[Path, Mapping[PairKey, int]]:
    """Where the page lies; and, where it has no request to tell of, the pairs that have some."""
    path = path or _default_path(config)
    with waiting("making the report"):
        page, others = _page(config, comparison)
    from draftloop.models.cache import make_folder, new_file

    make_folder(path.parent)
    with new_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path, others


def _default_path(config: Config) -> Path:
    """The first free name of today: an older page is not written over."""
    folder = Path(config.storage.directory) / REPORTS_FOLDER
    today = f"report-{time.strftime('%Y-%m-%d')}"
    names = (f"{today}{'' if number == 1 else f'-{number}'}.html" for number in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def _checked(path: Path) -> Path:
    """Where the user wants it.

    Raises:
        InputError: no file can be there, or something else is.
    """
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}", remedy="Make it first.")
    if path.exists() and not path.is_file():
        raise InputError(f"--output {path} is no plain file", remedy="Name the file to be written.")
    return path


def _page(config: Config, comparison: Comparison | None) -> tuple[str, Mapping[PairKey, int]]:
    from draftloop.learning.selection import select
    from draftloop.loading import pair_of
    from draftloop.reporting.overview import training_state
    from draftloop.reporting.page import Surroundings, render_report
    from draftloop.reporting.stored import read_stored
    from draftloop.reporting.tokens import TokenNames
    from draftloop.storage.store import DATABASE_NAME, open_store

    directory, pair = Path(config.storage.directory), pair_of(config)
    if not (directory / DATABASE_NAME).exists():
        raise InputError(
            f"nothing is stored in {directory} yet",
            remedy="Answer something first (draftloop generate, chat, collect or serve), "
            "or set storage.directory.",
        )
    with open_store(directory, max_megabytes=config.storage.max_megabytes, read_only=True) as store:
        stored = read_stored(store, pair)
        selection = select(store, pair, config)
        stored_bytes = store.requests.stored_bytes()
    size = f"{format_bytes(stored_bytes)} of {config.storage.max_megabytes:,} MB"
    setting = config.speculative.acceptance_threshold
    surroundings = Surroundings(
        made_s=time.time(),
        facts=[*_machine_rows(), ("Store", f"{directory}, {size}")],
        waiting=training_state(selection, setting, len(stored.drafted)),
        comparison=comparison,
    )
    names = TokenNames(_tokenizer(config) if stored.mistakes.rows else None)
    page = render_report(stored, names, surroundings)
    return page, {} if stored.requests else stored.other_pairs


def _tokenizer(config: Config) -> Tokenizer | None:
    """Of whichever model of the pair is here; None where neither can be read."""
    from draftloop.models.resolve import locate
    from draftloop.models.tokenizer import Tokenizer

    for name in (config.models.draft.name, config.models.target.name):
        try:
            folder = locate(name)
            if folder is not None:
                return Tokenizer.load(folder)
        except DraftloopError:
            continue  # the report does without: tokens get their numbers
    return None


def _machine_rows() -> list[tuple[str, str]]:
    from draftloop.cli.examine import machine_facts, version_facts

    machine = machine_facts()
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores",
        f"{format_bytes(machine['memory_bytes'])} of memory",
        machine["gpu"] or "no GPU",
        machine["system"],
    ]
    versions = [f"{name} {version}" for name, version in version_facts(VERSIONED).items()]
    return [("This machine", ", ".join(parts)), ("Versions", ", ".join(versions))]
