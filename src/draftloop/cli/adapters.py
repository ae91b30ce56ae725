"""`draftloop adapters`: list, show, promote, revert and import adapters of the draft.

Contract: prints what the store knows and hands what is to be done to `learning/by_hand.py`; `--json` prints
one object. Must not know how an adapter is trained or worn.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftloop.cli.console import new_table, print_table, write, write_json
from draftloop.cli.figures import rounded, shown
from draftloop.cli.options import AsJson, load_settings
from draftloop.cli.progress import Bars, format_bytes, waiting
from draftloop.errors import InputError

if TYPE_CHECKING:
    from draftloop.backends.architecture import Architecture
    from draftloop.config import Config
    from draftloop.storage.records import AdapterRecord
    from draftloop.storage.store import Store

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `adapters list` shows it: a0001.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="An adapter in PEFT's layout.")]


def build_app() -> typer.Typer:
    """The five commands."""
    app = typer.Typer(help="The draft's adapters: what it has learnt.", rich_markup_mode=None)
    app.command("list")(list_)
    app.command("show")(show)
    app.command("promote")(promote)
    app.command("revert")(revert)
    app.command("import")(import_)
    return app


def list_(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List this pair's adapters, oldest first, and which one is active."""
    config = load_settings(context).config
    records: list[AdapterRecord] = []
    active = None
    if _has_store(config):
        from draftloop.loading import open_storage, pair_of

        with open_storage(config, read_only=True) as store:
            records = store.adapters.list(pair_of(config))
            active = _active_name(store, config)
    if as_json:
        listed = [_figures(config, record, active) for record in records]
        write_json({"active": active, "adapters": listed})
        return
    if not records:
        write("There is no adapter yet: draftloop collect, then draftloop train.\n")
        return
    table = new_table("", "name", "parent", "status", "gain in tokens/s", "form", "made", "size >")
    for record in records:
        table.add_row(
            "*" if record.name == active else "",
            record.name,
            record.parent or "bare draft",
            record.status.value,
            _gain(record),
            record.form,
            _local_time(record.created_s),
            format_bytes(_size_bytes(_folder(config, record))),
        )
    print_table(table)
    write(f"active: {active or 'none, the draft is bare'}\n")


def show(context: typer.Context, name: Name, *, as_json: AsJson = False) -> None:
    """Show one adapter: what it gained, and everything that reproduces it."""
    config = load_settings(context).config
    if not _has_store(config):
        raise _unknown(name)
    from draftloop.loading import open_storage

    with open_storage(config, read_only=True) as store:
        record = store.adapters.get(name)
        if record is None:
            raise _unknown(name)
        run = None if record.run is None else store.runs.get(record.run)
        figures = {
            **_figures(config, record, _active_name(store, config)),
            "metrics": dict(record.metrics),
            "recipe": None if run is None else dict(run.recipe),
        }
    if as_json:
        write_json(figures)
        return
    for label, text in _lines(figures, record):
        write(f"{label:<10}{text}\n")


def promote(context: typer.Context, name: Name, *, as_json: AsJson = False) -> None:
    """Make an adapter the active one, also one that the gate has rejected."""
    config = load_settings(context).config
    if not _has_store(config):
        raise _unknown(name)
    from draftloop.learning.by_hand import promote_by_hand
    from draftloop.loading import open_storage, pair_of
    from draftloop.storage.records import AdapterStatus

    with open_storage(config) as store:
        architecture = _draft_architecture(config)
        before = promote_by_hand(store, Path(config.storage.directory), pair_of(config), architecture, name)
    if as_json:
        write_json({"active": name, "status_before": before.status.value, "reason_before": before.reason})
        return
    write(f"{name} is active from the next request on.\n")
    if before.status is not AdapterStatus.PROMOTED:
        write(f"It was {before.status.value} before: {before.reason}\n")


def revert(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Take the active adapter back; its parent becomes active, at the end the bare draft."""
    config = load_settings(context).config
    from draftloop.loading import open_storage, pair_of

    if not _has_store(config):
        raise InputError("no adapter is active, so there is none to revert", remedy="There is nothing to do.")
    with open_storage(config) as store:
        reverted = _active_name(store, config)
        active = store.adapters.revert(pair_of(config), "Reverted by hand.")
    if as_json:
        write_json({"reverted": reverted, "active": None if active is None else active.name})
        return
    now = "the bare draft" if active is None else active.name
    write(f"{reverted} is taken back; {now} is active from the next request on.\n")


def import_(context: typer.Context, folder: Folder, *, as_json: AsJson = False) -> None:
    """Bring in an adapter that PEFT wrote. It is not active before it is promoted."""
    config = load_settings(context).config
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", remedy="Name one that holds adapter_config.json.")
    from draftloop.learning.by_hand import import_adapter
    from draftloop.loading import open_storage, pair_of

    architecture = _draft_architecture(config)
    with open_storage(config) as store:
        directory = Path(config.storage.directory)
        record = import_adapter(store, directory, pair_of(config), architecture, folder)
    if as_json:
        write_json(_figures(config, record, None))
        return
    write(f"{record.name} is here; draftloop adapters promote {record.name} makes it active.\n")


def _figures(config: Config, record: AdapterRecord, active: str | None) -> dict[str, Any]:
    """One adapter's JSON object."""
    folder = _folder(config, record)
    interval = record.metrics.get("gain_ci95")
    return {
        "name": record.name,
        "parent": record.parent,
        "status": record.status.value,
        "active": record.name == active,
        "reason": record.reason,
        "created": datetime.fromtimestamp(record.created_s, UTC).isoformat(timespec="seconds"),
        "form": record.form,
        "gain": rounded(record.metrics.get("gain"), 4),
        "gain_ci95": interval and [rounded(bound, 4) for bound in interval],
        "run": record.run,
        "target": record.pair.target,
        "draft": record.pair.draft,
        "folder": str(folder),
        "size_bytes": _size_bytes(folder),
    }


def _lines(figures: dict[str, Any], record: AdapterRecord) -> list[tuple[str, str]]:
    """What `show` tells, a label and a text each."""
    active = ", active" if figures["active"] else ""
    lines = [
        ("name", f"{record.name} ({record.status.value}{active})"),
        ("reason", record.reason),
        ("parent", record.parent or "the bare draft"),
        ("pair", f"{record.pair.draft} under {record.pair.target}"),
        ("made", _local_time(record.created_s)),
        ("gain", _gain(record)),
        ("form", record.form),
        ("folder", f"{figures['folder']} ({format_bytes(figures['size_bytes'])})"),
    ]
    for domain, values in (record.metrics.get("domains") or {}).items():
        before, after = (shown(values[f"tau_{when}"], 3) for when in ("before", "after"))
        lines.append(("domain", f"{domain}: tau {before} → {after} on {values['requests']} requests"))
    recipe = figures["recipe"]
    if recipe is None:
        return lines
    settings, facts = recipe["settings"], recipe["facts"]
    lora = settings["lora"]
    return [
        *lines,
        ("run", f"{record.run}, on {len(recipe['failures'])} failures and {len(recipe['replay'])} others"),
        (
            "recipe",
            f"{settings['objective']}, rank {lora['rank']}, alpha {lora['alpha']:g}, "
            f"{', '.join(lora['target_modules'])}",
        ),
        (
            "",
            f"learning rate {settings['learning_rate']:g}, {settings['num_epochs']} epochs, batch "
            f"{settings['batch_size']} times {settings['gradient_accumulation_steps']}, "
            f"seed {settings['seed']}",
        ),
        ("made with", ", ".join(f"{key} {value}" for key, value in facts.items())),
        ("", "adapters show --json has the rest: every setting, and the requests by id"),
    ]


def _gain(record: AdapterRecord) -> str:
    """`+8.8 % (5.1 to 12.0)`."""
    gain, interval = record.metrics.get("gain"), record.metrics.get("gain_ci95")
    if gain is None:
        return "not measured"
    low_high = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    return f"{100 * gain:+.1f} %{low_high}"


def _local_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _folder(config: Config, record: AdapterRecord) -> Path:
    from draftloop.learning.deployment import adapter_folder

    return adapter_folder(Path(config.storage.directory), record.name)


def _size_bytes(folder: Path) -> int:
    """Of its files; 0 where they are gone."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0


def _active_name(store: Store, config: Config) -> str | None:
    from draftloop.loading import pair_of

    active = store.adapters.active(pair_of(config))
    return None if active is None else active.name


def _has_store(config: Config) -> bool:
    """Whether anything was ever stored; looking for an adapter does not create a database."""
    from draftloop.storage.store import DATABASE_NAME

    return (Path(config.storage.directory) / DATABASE_NAME).exists()


def _unknown(name: str) -> InputError:
    return InputError(f"there is no adapter {name!r}", remedy="draftloop adapters list names them.")


def _draft_architecture(config: Config) -> Architecture:
    with waiting("looking at the draft"):
        from draftloop.backends.architecture import read_architecture
        from draftloop.models.resolve import resolve
    return read_architecture(resolve(config.models.draft.name, progress=Bars()))
