"""`draftloop doctor`: what this machine has, what is missing, and how to get it.

Contract: exit status 0 where the pair of the settings can answer (a model that will be downloaded on first
use is fine), 1 where something it needs is missing. Must not know how facts are found.
"""

from __future__ import annotations

from typing import Any

import typer

from draftloop.cli.console import new_table, print_table, say_error, write, write_json
from draftloop.cli.cost_table import cost_table
from draftloop.cli.memory_table import memory_table
from draftloop.cli.options import AsJson, load_settings
from draftloop.cli.progress import format_bytes, waiting

Facts = dict[str, Any]
USABLE_NOW = ("local", "cached")
HOW_TO_GET = {
    "local": "here",
    "cached": "here",
    "needs-conversion": "here; the first use, or draftloop models pull, converts it",
    "downloadable": "not here; the first use, or draftloop models pull, downloads it",
}


def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Examine this machine: backend, models, memory, and what is missing."""
    config = load_settings(context).config
    with waiting("examining this machine"):
        from importlib.metadata import version
        from platform import python_version

        from draftloop.cli import examine

        models = examine.model_facts(config)
        here = all(model["availability"] in USABLE_NOW for model in models.values())
        facts: Facts = {
            "draftloop": version("draftloop"),
            "python": python_version(),
            "machine": examine.machine_facts(),
            "backends": examine.backend_facts(config),
            "hub": examine.hub_facts(),
            "storage": examine.storage_facts(),
            "models": models,
            "schedule": config.speculative.schedule,
            "pair": examine.pair_facts(config) if here else None,
        }
        facts["problems"] = examine.problems_of(facts)
        facts["usable"] = not facts["problems"]
    if as_json:
        write_json(facts)
    else:
        _show(facts)
    if not facts["usable"]:
        raise typer.Exit(1)


def _show(facts: Facts) -> None:
    table = new_table("what", "found")
    for label, value in _rows(facts):
        table.add_row(label, value)
    print_table(table)
    write("\n")
    pair = facts["pair"]
    if pair is not None and pair["memory"] is not None:
        print_table(memory_table(pair["memory"]))
        write("\n")
    if pair is not None and pair["costs"] is not None:
        print_table(cost_table(pair["costs"]))
        write("\n")
    for problem in facts["problems"]:
        say_error(problem)
    if facts["usable"]:
        write('The pair can answer: draftloop generate "Hello" (with the same --config and --set).\n')


def _rows(facts: Facts) -> list[tuple[str, str]]:
    machine, backends, hub, storage = (facts[key] for key in ("machine", "backends", "hub", "storage"))
    total, available = (format_bytes(machine[f"memory{part}_bytes"]) for part in ("", "_available"))
    rows = [
        ("draftloop", facts["draftloop"]),
        ("Python", facts["python"]),
        ("system", machine["system"]),
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("memory", f"{total}, {available} available"),
        ("GPU", machine["gpu"] or "none found"),
        ("backend", f"{backends['chosen']} ({backends['why']})"),
    ]
    for name, state in backends["all"].items():
        found = f"{state['version']} on {state['device']}" if state["usable"] else state["error"]
        rows.append((f"  {name}", found))
    rows += [
        ("Hub", f"{'reachable' if hub['reachable'] else 'not reachable'} ({hub['detail']})"),
        ("model cache", f"{storage['cache']}, {format_bytes(storage['free_bytes'])} free"),
        ("Hub's cache", storage["hub_cache"]),
    ]
    for role, model in facts["models"].items():
        state = "cannot be had, see below" if model["error"] else HOW_TO_GET[model["availability"]]
        rows.append((role, f"{model['name']}: {state}"))
    return [
        *rows,
        ("memory plan", _memory_row(facts["pair"])),
        ("cost of rounds", _cost_row(facts["pair"], facts["schedule"])),
    ]


def _memory_row(pair: Facts | None) -> str:
    if pair is None:
        return "known once both models are here"
    return "see below" if pair["memory"] else "none: the models do not go together, see below"


def _cost_row(pair: Facts | None, schedule: str) -> str:
    if schedule == "fixed":
        return "not needed: speculative.schedule is fixed"
    if pair is not None and pair["costs"] is not None:
        return "see below"
    return "not measured with these settings: the first answer (draftloop generate) measures and keeps it"
