"""The memory plan as a table, for `config check` and `doctor`.

Contract: shows `models.memory.MemoryPlan`, computes nothing. Must not know where models lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draftloop.cli.console import new_table
from draftloop.cli.progress import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from draftloop.models.memory import MemoryPlan

WORKS = ("generation", "training")


def memory_table(figures: Mapping[str, Any]) -> Table:
    """A line for each part of `memory_figures`; the last lines hold the totals and what there is."""
    table = new_table("memory", "generating >", "training the draft >")
    for part in figures["parts"]:
        size = format_bytes(part["bytes"])
        table.add_row(part["part"], *(size if part[work] else "" for work in ("generating", "training")))
    table.add_section()
    table.add_row("needed", *(format_bytes(figures[f"{work}_bytes"]) for work in WORKS))
    table.add_row("available", *(format_bytes(figures["available_bytes"]) for _ in WORKS))
    table.add_row("verdict", *("fits" if figures[f"{work}_fits"] else "does not fit" for work in WORKS))
    return table


def memory_figures(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as plain facts, in bytes."""
    return {
        "parts": [
            {
                "part": part.label,
                "bytes": part.num_bytes,
                "generating": part.in_generation,
                "training": part.in_training,
            }
            for part in plan.parts
        ],
        "generation_bytes": plan.generation_bytes,
        "training_bytes": plan.training_bytes,
        "available_bytes": plan.available_bytes,
        "generation_fits": plan.generation_bytes <= plan.available_bytes,
        "training_fits": plan.training_bytes <= plan.available_bytes,
    }
