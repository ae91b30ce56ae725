"""The top of the report: one sentence, the headline figures, alpha and tau over requests.

Contract: pure functions of `Stored`. Must not know HTML.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.learning.circle import waiting_for
from draftloop.reporting.charts import Chart, Level, Mark, Series, over_requests, sparkline
from draftloop.reporting.figures import (
    alpha_of,
    domains_of,
    figures_of,
    rolling_alpha,
    rolling_tau,
    stretches_of,
    tau_of,
)
from draftloop.reporting.paths import Point
from draftloop.reporting.trainings import judged_tau
from draftloop.reporting.wording import count, number, percent, signed_percent, suffix_line, when
from draftloop.storage.records import AdapterStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from draftloop.learning.selection import Selection
    from draftloop.reporting.figures import Domain, Figures, RollingPoint, Stretch
    from draftloop.reporting.stored import Stored
    from draftloop.storage.records import Activation, AdapterRecord, RequestSummary

NOW_REQUESTS = 50
"""Requests that "now" means: the newest under the active adapter."""

FEW_SHARE = 0.1
"""A threshold below which fewer drafted requests fall than this collects slowly."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One line of the domains' table, as shown; `spark` is an SVG path, "" where there is too little."""

    name: str
    requests: str
    tokens: str
    alpha: tuple[str, str]
    tau: tuple[str, str]
    acceptance_rate: str
    spark: str
    spark_summary: str


@dataclass(frozen=True, slots=True)
class Now:
    """Live figures under the active adapter, and of the bare draft; without requests they have no metrics."""

    current: Figures
    bare: Figures

    @property
    def tau_change(self) -> float | None:
        """The relative change of tau; None where one of them is unknown."""
        if self.current.tau is None or not self.bare.tau:
            return None
        return self.current.tau / self.bare.tau - 1


def now_of(stored: Stored) -> Now:
    """The newest `NOW_REQUESTS` under the active adapter, and everything that the bare draft drafted."""
    current = [one for one in stored.drafted if one.adapter == stored.active][-NOW_REQUESTS:]
    return Now(figures_of(current), figures_of([one for one in stored.drafted if one.adapter is None]))


def headline(stored: Stored, now: Now) -> str:
    """What has become of the draft, in one or two sentences."""
    if not stored.drafted:
        return "No request has been answered with the draft yet, so there is nothing to compare."
    name = "The bare draft" if stored.active is None else f"Adapter {stored.active}"
    if not now.current.requests:
        judged = judged_tau(stored)
        gate = f" On held-out prompts the gate measured tau {judged}." if judged else ""
        return f"{name} serves; no stored request has been answered with it.{gate}"
    newest = count(now.current.requests, "request")
    said = (
        f"{name} serves. Over its newest {newest} alpha is {_alpha(now.current)} and tau {_tau(now.current)}"
    )
    if stored.active is None:
        promoted = _promoted(stored)
        return (
            f"{said}. {'None of its adapters is active' if promoted else 'No adapter has been promoted yet'}."
        )
    if not now.bare.requests:
        return f"{said}; no request of the bare draft is stored."
    change = signed_percent(now.tau_change)
    return f"{said}; the bare draft had {_alpha(now.bare)} and {_tau(now.bare)}: {change} tokens a round."


def tiles_of(stored: Stored, now: Now) -> list[Tile]:
    """The headline figures."""
    everything = figures_of(stored.requests)
    statuses = [one.status for one in stored.adapters]
    rejected = statuses.count(AdapterStatus.REJECTED)
    reverted = statuses.count(AdapterStatus.REVERTED)
    active = next((one for one in stored.adapters if one.name == stored.active), None)
    return [
        Tile("Requests", number(everything.requests), f"{number(everything.tokens)} tokens answered"),
        Tile("Alpha now", _alpha(now.current), _against(now.bare.alpha, 3, stored)),
        Tile("Tau now", _tau(now.current), _against(now.bare.tau, 2, stored)),
        Tile(
            "Tokens a second",
            number(now.current.tokens_per_s, 1),
            _against(now.bare.tokens_per_s, 1, stored),
        ),
        Tile("Active adapter", stored.active or "none", "" if active is None else f"since {_since(stored)}"),
        Tile(
            "Promoted",
            number(_promoted(stored)),
            f"{number(rejected)} rejected, {number(reverted)} taken back",
        ),
    ]


def suffix_sentence(stored: Stored) -> str:
    """What suffix matches wrote; "" where there were none."""
    suffix = figures_of(stored.requests).suffix
    if not suffix.rounds:
        return ""
    return (
        f"Suffix matches wrote {percent(suffix.share)} of all answers ({suffix_line(suffix)}); "
        "alpha and tau are the draft model's and leave them out."
    )


def training_state(selection: Selection, setting: float | str, num_drafted: int) -> str:
    """What training waits for, in a sentence or two.

    Args:
        selection: of the stored requests.
        setting: `speculative.acceptance_threshold`.
        num_drafted: requests with drafts.
    """
    have = len(selection.failures)
    if selection.ready:
        return f"{have:,} failures are there and {selection.needed:,} are needed: draftloop train can begin."
    said = f"Training waits: {waiting_for(selection)}"
    if setting != "auto" and num_drafted >= selection.needed and have < FEW_SHARE * num_drafted:
        said += " Few answers fall below it; speculative.acceptance_threshold: auto takes the worst 30 %."
    return said


def request_charts(stored: Stored) -> list[Chart]:
    """Alpha and tau over requests; none without drafts."""
    drafted = stored.drafted
    if not drafted:
        return []
    marks = marks_of(drafted, stored.adapters, stored.history)
    stretches = stretches_of(drafted)
    alpha = Series(
        "Alpha",
        3,
        _dots(drafted, alpha_of),
        _lines(rolling_alpha(drafted)),
        _levels(stretches, lambda figures: figures.alpha, 3),
    )
    tau = Series(
        "Tau, tokens a round",
        2,
        _dots(drafted, tau_of),
        _lines(rolling_tau(drafted)),
        _levels(stretches, lambda figures: figures.tau, 2),
    )
    return [over_requests(series, marks, len(drafted)) for series in (alpha, tau)]


def marks_of(
    drafted: Sequence[RequestSummary], adapters: Sequence[AdapterRecord], history: Sequence[Activation]
) -> list[Mark]:
    """Each activation among the requests with drafts: a step on, or a step back to an ancestor.

    One before the first of them lies at 0.5.
    """
    ids = [one.id for one in drafted]
    parents = {one.name: one.parent for one in adapters}
    marks = []
    before: str | None = None
    for event in history:
        back = _is_ancestor(event.adapter, before, parents)
        name = event.adapter or "bare"
        marks.append(
            Mark(
                x=bisect_right(ids, event.request_id) + 0.5,
                kind="back" if back else "on",
                label=f"{'↩' if back else '▲'} {name}",
                title=_mark_title(event, back=back),
            )
        )
        before = event.adapter
    return marks


def domain_rows(stored: Stored) -> list[DomainRow]:
    """The domains' table, the one with the most requests first."""
    return [_domain_row(domain) for domain in domains_of(stored.requests)]


def _domain_row(domain: Domain) -> DomainRow:
    values = [point.value for segment in rolling_alpha(domain.drafted) for point in segment]
    first, last = domain.first, domain.last
    return DomainRow(
        name=domain.name,
        requests=number(domain.figures.requests),
        tokens=number(domain.figures.tokens),
        alpha=(_alpha(first), _alpha(last)),
        tau=(_tau(first), _tau(last)),
        acceptance_rate=percent(domain.figures.acceptance_rate),
        spark=sparkline(values),
        spark_summary=f"alpha from {number(values[0], 3)} to {number(values[-1], 3)}" if values else "",
    )


def _dots(drafted: Sequence[RequestSummary], metric: Callable[[RequestSummary], float | None]) -> list[Point]:
    values = [metric(one) for one in drafted]
    return [Point(position, value) for position, value in enumerate(values, start=1) if value is not None]


def _lines(rolling: Sequence[Sequence[RollingPoint]]) -> list[list[Point]]:
    return [[Point(point.position, point.value) for point in segment] for segment in rolling]


def _levels(
    stretches: Sequence[Stretch], metric: Callable[[Figures], float | None], digits: int
) -> list[Level]:
    levels = []
    for one in stretches:
        value = metric(one.figures)
        if value is not None:
            over = count(one.figures.requests, "request")
            title = f"{one.adapter or 'bare draft'}: {number(value, digits)} over {over}"
            levels.append(Level(one.first, one.last, value, title))
    return levels


def _is_ancestor(name: str | None, of: str | None, parents: Mapping[str, str | None]) -> bool:
    """Whether `of` came from `name`, which is none of `of` itself; the bare draft is everyone's ancestor."""
    if name is None:
        return of is not None
    seen: set[str] = set()
    while of is not None and of not in seen:
        seen.add(of)
        of = parents.get(of)
        if of == name:
            return True
    return False


def _mark_title(event: Activation, *, back: bool) -> str:
    name = event.adapter or "the bare draft"
    what = f"back to {name}" if back else f"{name} becomes active"
    return f"{when(event.created_s)}: {what}. {event.reason}"


def _since(stored: Stored) -> str:
    return when(stored.history[-1].created_s) if stored.history else "an unknown time"


def _promoted(stored: Stored) -> int:
    """Adapters that were promoted at some time."""
    return sum(one.status in (AdapterStatus.PROMOTED, AdapterStatus.REVERTED) for one in stored.adapters)


def _against(value: float | None, digits: int, stored: Stored) -> str:
    return "" if stored.active is None or value is None else f"bare draft {number(value, digits)}"


def _alpha(figures: Figures | None) -> str:
    return number(None if figures is None else figures.alpha, 3)


def _tau(figures: Figures | None) -> str:
    return number(None if figures is None else figures.tau, 2)
