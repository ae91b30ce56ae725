"""`draftloop stats`: what is stored, how the draft does, and what training waits for.

Contract: reads, and writes nothing, also while another process writes; a store that is not there yet is no
failure. Must not know how figures are made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer  # noqa: TC002  # typer reads annotations when it runs

from draftloop.cli.console import new_table, print_table, write, write_json
from draftloop.cli.figures import shown
from draftloop.cli.options import AsJson, load_settings
from draftloop.cli.pairs import say_other_pairs
from draftloop.cli.progress import format_bytes, waiting

if TYPE_CHECKING:
    from rich.table import Table

    from draftloop.reporting.figures import Figures
    from draftloop.reporting.stats import Stats

BARS = "▁▂▃▄▅▆▇█"


def stats(context: typer.Context, as_json: AsJson = False) -> None:
    """Show what is stored, alpha over time, the worst domains, and what training waits for."""
    config = load_settings(context).config
    directory = Path(config.storage.directory)
    with waiting("reading the store"):
        from draftloop.loading import pair_of
        from draftloop.reporting.stats import read_stats
        from draftloop.storage.store import DATABASE_NAME, open_store

        found = None
        if (directory / DATABASE_NAME).exists():
            with open_store(directory, max_megabytes=config.storage.max_megabytes, read_only=True) as store:
                found = read_stats(store, pair_of(config), config)
    if as_json:
        body = {} if found is None else found.to_json()
        write_json({"directory": str(directory), "exists": found is not None, **body})
    elif found is None:
        storing = "draftloop generate, chat, collect and serve store requests"
        write(f"Nothing is stored in {directory} yet. {storing}.\n")
    else:
        _show(found, directory)
    if found is not None and not found.figures.requests:
        say_other_pairs(found.other_pairs, context, "stats")


def _show(found: Stats, directory: Path) -> None:
    table = new_table("what", "found")
    for label, value in _rows(found, directory):
        table.add_row(label, value)
    print_table(table)
    if found.blocks:
        write("\n")
        print_table(_time_table(found))
    if found.domains:
        write("\n")
        print_table(_domain_table(found))


def _rows(found: Stats, directory: Path) -> list[tuple[str, str]]:
    from draftloop.reporting.wording import count, percent, suffix_line
    from draftloop.storage.records import AdapterStatus

    size = f"{format_bytes(found.stored_bytes)} of storage.max_megabytes = {found.max_megabytes:,}"
    rows = [
        ("target", found.pair.target),
        ("draft", found.pair.draft),
        ("store", f"{directory}: {size}"),
        ("requests", f"{found.figures.requests:,}, {count(found.figures.tokens, 'token')} answered"),
        ("  failures", f"{found.failures:,} not trained on (acceptance_rate below {found.threshold:.2f})"),
        ("  replay", f"{found.replay:,}"),
        ("  held out", f"{found.held_out:,} ({found.validation:,} validate, the gate has the others)"),
    ]
    made = [f"{found.adapters[status]} {status.value}" for status in AdapterStatus if found.adapters[status]]
    all_made = f" ({', '.join(made)})" if made else ""
    rows.append(("adapter", f"{found.adapter or 'none active'}{all_made}"))
    rows.append(("now", _line(found.now)))
    if found.adapter is not None:
        rows.append(("bare draft", _line(found.bare)))
    suffix = found.figures.suffix
    if suffix.rounds:
        rows.append(("suffix", f"{percent(suffix.share)} of all tokens from matches: {suffix_line(suffix)}"))
    rows.append(("training", found.waiting))
    if found.last_run is not None:
        reason = found.last_run.result.get("reason")
        said = f"{found.last_run.id}: {found.last_run.status.value}"
        rows.append(("last run", f"{said}. {reason}" if reason else said))
    rows += [
        ("other pair", f"{pair.target} with {pair.draft}: {count(requests, 'request')}")
        for pair, requests in found.other_pairs.items()
        if requests
    ]
    return rows


def _line(figures: Figures) -> str:
    """Metrics in one line."""
    if not figures.drafted_requests:
        return "no request with drafts"
    from draftloop.reporting.wording import count

    return (
        f"alpha {shown(figures.alpha, 3)}, tau {shown(figures.tau, 2)}, acceptance_rate "
        f"{shown(figures.acceptance_rate, 2)} over {count(figures.drafted_requests, 'request')}"
    )


def _time_table(found: Stats) -> Table:
    from draftloop.reporting.wording import when

    table = new_table("until", "requests >", "alpha >", "", "tau >", "acceptance_rate >")
    bars = _bars([one.figures.alpha for one in found.blocks])
    for one, bar in zip(found.blocks, bars, strict=True):
        table.add_row(when(one.last_s), f"{one.figures.requests:,}", *_cells(one.figures, bar))
    return table


def _domain_table(found: Stats) -> Table:
    from draftloop.reporting.stats import WORST_DOMAINS

    shown_domains = found.domains[:WORST_DOMAINS]
    rest = len(found.domains) - len(shown_domains)
    head = f"domain ({len(shown_domains)} worst of {len(found.domains)})" if rest else "domain (worst first)"
    table = new_table(head, "requests >", "alpha >", "", "tau >", "acceptance_rate >")
    bars = _bars([one.figures.alpha for one in shown_domains])
    for one, bar in zip(shown_domains, bars, strict=True):
        table.add_row(one.name, f"{one.figures.drafted_requests:,}", *_cells(one.figures, bar))
    return table


def _cells(figures: Figures, bar: str) -> tuple[str, str, str, str]:
    return shown(figures.alpha, 3), bar, shown(figures.tau, 2), shown(figures.acceptance_rate, 2)


def _bars(values: list[float | None]) -> list[str]:
    """A bar for each value, from the lowest to the highest one."""
    known = [value for value in values if value is not None]
    if not known or max(known) == min(known):
        return ["" for _ in values]
    width = (max(known) - min(known)) / (len(BARS) - 1)
    return ["" if value is None else BARS[round((value - min(known)) / width)] for value in values]
