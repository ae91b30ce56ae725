"""`draftloop config check` and `draftloop config show`.

Contract: both read settings and generate nothing; `check` downloads nothing. Must not know the rules that
settings obey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from draftloop.cli.console import new_table, print_table, say_error, write, write_json
from draftloop.cli.memory_table import memory_figures, memory_table
from draftloop.cli.options import AsJson, load_settings
from draftloop.cli.progress import waiting
from draftloop.errors import DraftloopError

if TYPE_CHECKING:
    from collections.abc import Callable

    from draftloop.config import Config
    from draftloop.loading import Prepared

SECRETS, HIDDEN = frozenset({"server.api_key"}), "(hidden)"


def build_app() -> typer.Typer:
    """The two commands."""
    app = typer.Typer(help="Check or show the settings.", rich_markup_mode=None)
    app.command("check")(check)
    app.command("show")(show)
    return app


def check(context: typer.Context) -> None:
    """Check settings, model names, tokenizers and memory; download and generate nothing."""
    config = load_settings(context).config
    write("ok       settings\n")
    failures = _Failures()
    local = [_check_name(role, config, failures) for role in ("target", "draft")]
    if all(local):
        _check_pair(config, failures)
    elif not failures.exit_status:
        write("skipped  tokenizers and memory: they need both models here (draftloop models pull)\n")
    if failures.exit_status:
        raise typer.Exit(failures.exit_status)


def show(context: typer.Context, as_json: AsJson = False) -> None:
    """Show every setting in effect and where it comes from."""
    import json

    from draftloop.config import flatten

    loaded = load_settings(context)
    values = {key: _shown(key, value) for key, value in flatten(loaded.config).items()}
    if as_json:
        origins = {key: str(origin) for key, origin in loaded.origins.items()}
        write_json({key: {"value": value, "origin": origins[key]} for key, value in values.items()})
        return
    table = new_table("setting", "value", "from")
    for key, value in values.items():
        table.add_row(key, json.dumps(value, ensure_ascii=False), str(loaded.origins[key]))
    print_table(table)


def _shown(key: str, value: Any) -> Any:
    """A setting's value, unless it is a secret: what is shown ends up in bug reports."""
    return HIDDEN if key in SECRETS and value is not None else value


class _Failures:
    """Says each error, and remembers the exit status: wrong input outweighs work that failed."""

    def __init__(self) -> None:
        self.exit_status = 0

    def attempt(self, action: Callable[[], object]) -> bool:
        """Run one check; whether it passed."""
        try:
            action()
        except DraftloopError as error:
            # Without the plan of a MemoryPlanError: it has been shown as a table.
            say_error(str(error))
            self.exit_status = max(self.exit_status, error.exit_status)
            return False
        return True


def _check_name(role: str, config: Config, failures: _Failures) -> bool:
    """Whether a model is here, ready to be loaded."""
    name = config.models.target.name if role == "target" else config.models.draft.name
    found = []

    def ask() -> None:
        with waiting(f"looking for {name}"):
            from draftloop.models.resolve import exists

            found.append(exists(name))

    if not failures.attempt(ask):
        return False
    from draftloop.models.resolve import Availability

    notes = {
        Availability.DOWNLOADABLE: f"{name} exists and is not here yet: draftloop models pull downloads it",
        Availability.NEEDS_CONVERSION: f"{name} is here and will be converted on first use",
    }
    write(f"ok       {role}: {notes.get(found[0], f'{name} is here')}\n")
    return found[0] not in notes


def _check_pair(config: Config, failures: _Failures) -> None:
    prepared: list[Prepared] = []

    def prepare_pair() -> None:
        with waiting("comparing the models"):
            from draftloop.loading import prepare

            prepared.append(prepare(config))

    if not failures.attempt(prepare_pair):
        return
    plan, capabilities = prepared[0].plan, prepared[0].backend.capabilities()
    write("ok       tokenizers agree\n")
    write(f"ok       backend: {capabilities.backend} {capabilities.version} on {capabilities.device}\n\n")
    print_table(memory_table(memory_figures(plan)))
    write("\n")
    if failures.attempt(plan.check_generation):
        write("ok       memory for generating\n")
    if failures.attempt(plan.check_training):
        write("ok       memory for training\n")
