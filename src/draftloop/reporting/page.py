"""The report as one HTML file: every part put together and rendered, with nothing to be fetched.

Contract: `render_report` is a pure function; all text is escaped by the template engine. Must not know the
store or where the file goes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.reporting.figures import WINDOW_REQUESTS, rolling_window
from draftloop.reporting.overview import (
    NOW_REQUESTS,
    domain_rows,
    headline,
    now_of,
    request_charts,
    suffix_sentence,
    tiles_of,
)
from draftloop.reporting.templating import render
from draftloop.reporting.trainings import adapter_views, held_out_view, run_views
from draftloop.reporting.wording import count, number, percent, when

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from draftloop.reporting.mistakes import Mistakes
    from draftloop.reporting.stored import Stored
    from draftloop.reporting.tokens import ShownToken, TokenNames


LISTED_VALUES = 10
"""A longer list of a recipe is told by its length."""
SHOWN_CHARACTERS = 200
"""So is a longer text: the packed ids of a cut head."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ways to answer, compared on the same requests just before the report.

    Attributes:
        title: of the table.
        columns: names of the figures.
        rows: a way's name, and its figures as shown.
        conclusions: sentences about them.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    conclusions: Sequence[str]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a report tells beside the store's content.

    Attributes:
        made_s: Unix time of the report.
        facts: label and value of machine and versions.
        waiting: what training waits for, a sentence.
        comparison: what was measured beside it; it is kept nowhere else.
    """

    made_s: float
    facts: Sequence[tuple[str, str]]
    waiting: str
    comparison: Comparison | None = None


@dataclass(frozen=True, slots=True)
class MistakeRow:
    """One line of the hardest tokens, as shown."""

    proposed: ShownToken
    wanted: ShownToken
    times: str
    share: str
    confidence: str
    rejected: str


def render_report(stored: Stored, names: TokenNames, surroundings: Surroundings) -> str:
    """The page, without a byte order mark."""
    return render("report.html", **_values(stored, names, surroundings))


def _values(stored: Stored, names: TokenNames, surroundings: Surroundings) -> dict[str, Any]:
    now = now_of(stored)
    runs = run_views(stored.runs, stored.adapters, stored.points)
    return {
        "pair": stored.pair,
        "made": when(surroundings.made_s),
        "headline": headline(stored, now),
        "tiles": tiles_of(stored, now),
        "waiting": surroundings.waiting,
        "comparison": surroundings.comparison,
        "nothing": _nothing(stored),
        "suffix": suffix_sentence(stored),
        "charts": request_charts(stored),
        "has_marks": bool(stored.history),
        "window": rolling_window(len(stored.drafted)),
        "end_requests": WINDOW_REQUESTS,
        "now_requests": NOW_REQUESTS,
        "domains": domain_rows(stored),
        "runs": runs,
        "older_runs": stored.num_runs - len(runs),
        "held_out": held_out_view(stored),
        "adapters": adapter_views(stored.adapters, stored.active),
        "mistakes": stored.mistakes,
        "mistake_rows": _mistake_rows(stored.mistakes, names),
        "mistakes_sentence": _mistakes_sentence(stored.mistakes, readable=names.readable),
        "facts": [*surroundings.facts, *_settings_seen(stored)],
        "recipe": _recipe(stored),
    }


def _nothing(stored: Stored) -> str:
    """Why there is nothing over requests; "" where there is something."""
    if stored.drafted:
        return ""
    if stored.requests:
        return f"{count(len(stored.requests), 'request')} stored, but none of them with drafts."
    others = ", ".join(
        f"{pair.target} with {pair.draft} ({count(requests, 'request')})"
        for pair, requests in stored.other_pairs.items()
    )
    return (
        f"No request of this pair is stored. {f'The store has others: {others}.' if others else ''}".strip()
    )


def _mistake_rows(mistakes: Mistakes, names: TokenNames) -> list[MistakeRow]:
    return [
        MistakeRow(
            proposed=names.name(one.proposed_id),
            wanted=names.name(one.wanted_id),
            times=number(one.times),
            share=percent(one.times / mistakes.rejected, 1),
            confidence=number(one.confidence, 2),
            rejected=f"{number(one.proposed_rejected)} of {number(one.proposed_tested)}",
        )
        for one in mistakes.rows
    ]


def _mistakes_sentence(mistakes: Mistakes, *, readable: bool) -> str:
    if not mistakes.tested:
        return "No proposal has been tested yet."
    if not mistakes.rejected:
        return f"All {number(mistakes.tested)} tested proposals were accepted."
    said = (
        f"In the newest {count(mistakes.requests, 'request')} with drafts the target tested "
        f"{number(mistakes.tested)} proposals and rejected {number(mistakes.rejected)}. "
        "The most frequent swaps:"
    )
    return said if readable else f"{said} (tokens by number, because the models are not on this machine)"


def _settings_seen(stored: Stored) -> list[tuple[str, str]]:
    """How the requests were sampled."""
    if not stored.drafted:
        return []
    sizes = Counter(one.num_draft_tokens for one in stored.drafted)
    temperatures = Counter(one.temperature for one in stored.drafted)
    sources = Counter(one.source for one in stored.requests)
    return [
        ("Draft tokens a round (K)", _tallied(sizes)),
        ("Temperature", _tallied(temperatures)),
        ("Requests came from", _tallied(sources)),
        (
            "Requests from … to",
            f"{when(stored.requests[0].created_s)} to {when(stored.requests[-1].created_s)}",
        ),
    ]


def _tallied(counter: Counter[Any]) -> str:
    """`4 (380 requests), 3 (20 requests)`, or the one value alone."""
    if len(counter) == 1:
        return str(next(iter(counter)))
    return ", ".join(f"{value} ({count(times, 'request')})" for value, times in counter.most_common(6))


def _recipe(stored: Stored) -> list[tuple[str, str]]:
    """The newest run's recipe, a line for each setting; of lists of requests only how many they are."""
    if not stored.runs:
        return []
    return list(_flat(stored.runs[0].recipe))


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            lines += _flat(value, f"{name}.")
        else:
            lines.append((name, _setting_shown(value)))
    return lines


def _setting_shown(value: Any) -> str:
    """One value of a recipe; numbers in a list are requests' ids."""
    if value is None or value in ([], ()):
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, list | tuple):
        text = str(value)
        return text if len(text) <= SHOWN_CHARACTERS else f"{len(text):,} characters"
    if all(isinstance(one, int) for one in value):
        return f"{count(len(value), 'request')}, {min(value)} to {max(value)}"
    return ", ".join(map(str, value)) if len(value) <= LISTED_VALUES else f"{len(value):,} values"
