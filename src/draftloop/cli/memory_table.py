"""The memory plan as a table, for `config check` and `doctor`.

Contract: shows `models.memory.MemoryPlan`, computes nothing. Must not know where models lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draftloop.cli.console import new_table
from draftloop.cli.progress import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from draftloop.models.memory import MemoryPlan


def memory_table(plan: MemoryPlan) -> Table:
    """A line for each part; the last lines hold the totals and what there is."""
    table = new_table("memory", "generating >", "training the draft >")
    for part in plan.parts:
        size = format_bytes(part.num_bytes)
        table.add_row(part.label, size if part.in_generation else "", size if part.in_training else "")
    table.add_section()
    table.add_row("needed", format_bytes(plan.generation_bytes), format_bytes(plan.training_bytes))
    available = format_bytes(plan.available_bytes)
    table.add_row("available", available, available)
    fits = [needed <= plan.available_bytes for needed in (plan.generation_bytes, plan.training_bytes)]
    table.add_row("verdict", *("fits" if fit else "does not fit" for fit in fits))
    return table


def memory_figures(plan: MemoryPlan) -> dict[str, Any]:
    """The same for JSON, in bytes."""
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
