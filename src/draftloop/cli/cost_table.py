"""What rounds were measured to cost here, for people and for programs.

Contract: figures of costs that are known already; measures nothing. Must not know where they are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draftloop.cli.console import new_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from draftloop.speculation.costs import RoundCosts

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)


def cost_figures(costs: RoundCosts, num_draft_tokens: int) -> dict[str, Any]:
    """Milliseconds; and for each alpha, the same at every position, the K that is then the fastest.

    Args:
        costs: as calibrated.
        num_draft_tokens: the largest K.
    """
    from draftloop.speculation.schedule import best_choice

    best = {alpha: best_choice(costs, [alpha] * num_draft_tokens) for alpha in ALPHAS}
    # Divided by what the same sum gives for no drafts: then the target alone is 1, and no rounding below it.
    alone = best_choice(costs, [])
    return {
        "sampling": "greedy" if costs.sampling.greedy else "sampled",
        "target_ms": {str(width): 1000 * seconds for width, seconds in costs.verify_s},
        "draft_token_ms": 1000 * costs.draft_s,
        "draft_round_ms": 1000 * costs.draft_round_s,
        "draft_read_token_ms": 1000 * costs.read_s,
        "best": [
            {
                "alpha": alpha,
                "num_draft_tokens": choice.num_draft_tokens,
                "speedup": choice.tokens_per_s / alone.tokens_per_s,
            }
            for alpha, choice in best.items()
        ],
    }


def cost_table(figures: Mapping[str, Any]) -> Table:
    """The figures of `cost_figures`."""
    table = new_table("a round here", f"measured, {figures['sampling']}")
    for width, milliseconds in figures["target_ms"].items():
        table.add_row(f"target reads {width}", f"{milliseconds:.1f} ms")
    table.add_row("draft, each token", f"{figures['draft_token_ms']:.1f} ms")
    table.add_row("draft, once a round", f"{figures['draft_round_ms']:.1f} ms")
    table.add_section()
    for one in figures["best"]:
        k = one["num_draft_tokens"]
        told = f"{k} draft tokens, {one['speedup']:.2f} times the target alone" if k else "the target alone"
        table.add_row(f"fastest at alpha {one['alpha']}", told)
    return table
