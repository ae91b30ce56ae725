"""The report's part on learning: runs and their curves, adapters, and the held-out prompts before and after.

Contract: pure functions of `Stored`; the gate's figures are shown as they were stored, and one that is
missing is left out. Must not know HTML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftloop.reporting.charts import Chart, Interval, before_after, curve, intervals
from draftloop.reporting.paths import Point
from draftloop.reporting.scales import Scale
from draftloop.reporting.wording import DASH, count, duration, number, signed_percent, when
from draftloop.storage.records import AdapterStatus, RunStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from draftloop.reporting.stored import Stored
    from draftloop.storage.records import AdapterRecord, RunPoint, RunRecord

COLOURED_DOMAINS = 4
"""More colours than that are not told apart."""

_RUN_WORDS = {
    RunStatus.RUNNING: "running, or killed",
    RunStatus.INTERRUPTED: "interrupted",
    RunStatus.PROMOTED: "promoted",
    RunStatus.REJECTED: "rejected",
    RunStatus.FAILED: "failed",
}


@dataclass(frozen=True, slots=True)
class RunView:
    """One training run, as shown."""

    title: str
    status: str
    word: str
    facts: str
    reason: str
    charts: Sequence[Chart]
    empty: str


@dataclass(frozen=True, slots=True)
class AdapterView:
    """One adapter, as shown; `status` is its badge's CSS class."""

    name: str
    status: str
    word: str
    facts: str
    alpha: str
    tau: str
    gain: str
    interval: Interval | None
    reason: str


@dataclass(frozen=True, slots=True)
class DomainChange:
    """One domain's line in the gate's table, as shown; `kind` is its colour in the plot."""

    name: str
    kind: str
    requests: str
    alpha: tuple[str, str]
    tau: tuple[str, str]
    change: str


@dataclass(frozen=True, slots=True)
class HeldOutView:
    """The held-out prompts of the newest judged run."""

    sentence: str
    chart: Chart
    domains: Sequence[DomainChange]


def run_views(
    runs: Sequence[RunRecord], adapters: Sequence[AdapterRecord], points: Mapping[int, Sequence[RunPoint]]
) -> list[RunView]:
    """The runs, in their order, with the adapters that they made and their curves by run id."""
    made = {one.run: one.name for one in adapters if one.run is not None}
    return [_run_view(run, made.get(run.id), points[run.id]) for run in runs]


def adapter_views(adapters: Sequence[AdapterRecord], active: str | None) -> list[AdapterView]:
    """Every adapter, newest first; their intervals share one axis."""
    newest_first = sorted(adapters, key=lambda one: one.created_s, reverse=True)
    drawn = intervals([_estimate(one.metrics) for one in newest_first])
    return [
        _adapter_view(one, interval, is_active=one.name == active)
        for one, interval in zip(newest_first, drawn, strict=True)
    ]


def held_out_view(stored: Stored) -> HeldOutView | None:
    """Before and after, per held-out prompt; None where no run was judged."""
    run = next((one for one in stored.runs if _pairs(one.result)), None)
    if run is None:
        return None
    made = next((one.name for one in stored.adapters if one.run == run.id), "the candidate")
    rows = _pairs(run.result)
    names = sorted({str(row["domain"]) for row in rows})
    by_size = sorted(names, key=lambda name: -sum(row["domain"] == name for row in rows))
    kinds = {name: f"d{min(place, COLOURED_DOMAINS)}" for place, name in enumerate(by_size)}
    groups = [
        (kinds[name], [(_tau_point(row), _told(row)) for row in rows if row["domain"] == name])
        for name in by_size
    ]
    before, after = run.parent or "the bare draft", made
    gained = sum(row["tau_after"] > row["tau_before"] for row in rows)
    lost = sum(row["tau_after"] < row["tau_before"] for row in rows)
    sentence = (
        f"Run {run.id} was judged on {count(len(rows), 'request')} kept out of training. Each is replayed "
        f"with {before} (before) and with {made} (after): tau is higher for {gained}, lower for {lost}, "
        f"and the same for {len(rows) - gained - lost}."
    )
    title = f"Tau with {after} over tau with {before}"
    return HeldOutView(
        sentence, before_after(title, f"tau with {before}", groups), _domain_changes(run.result, kinds)
    )


def judged_tau(stored: Stored) -> str:
    """What the gate measured of the active adapter, "1.92 → 2.10"; "" where it did not."""
    active = next((one for one in stored.adapters if one.name == stored.active), None)
    return "" if active is None else _arrow(active.metrics, "tau", 2)


def _run_view(run: RunRecord, adapter: str | None, points: Sequence[RunPoint]) -> RunView:
    steps = [point for point in points if point.learning_rate is not None]
    skipped = [float(point.step) for point in steps if point.gradient_norm is None]
    facts = [when(run.started_s), f"from {run.parent or 'the bare draft'}", count(len(steps), "step")]
    if run.ended_s is not None:
        facts.append(duration(run.ended_s - run.started_s))
    if skipped:
        facts.append(f"{count(len(skipped), 'step')} skipped: gradient not finite")
    return RunView(
        title=f"Run {run.id}{f', {adapter}' if adapter else ''}",
        status=run.status.value,
        word=_RUN_WORDS[run.status],
        facts=" · ".join(facts),
        reason=str(run.result.get("reason", "")),
        charts=_curves(points, skipped),
        empty="" if points else "No step was recorded.",
    )


def _curves(points: Sequence[RunPoint], skipped: Sequence[float]) -> list[Chart]:
    if not points:
        return []
    last = max(point.step for point in points)
    across = Scale(0, max(last, 1))
    loss = [Point(point.step, point.loss) for point in points if point.loss is not None]
    alpha = [
        Point(point.step, point.validation_alpha) for point in points if point.validation_alpha is not None
    ]
    rate = [Point(point.step, point.learning_rate) for point in points if point.learning_rate is not None]
    charts = []
    if loss:
        charts.append(curve("Loss", 3, loss, across, dotted=len(loss) == 1, skipped=skipped))
    if alpha:
        charts.append(curve("Validation alpha", 3, alpha, across, dotted=True))
    if rate:
        charts.append(curve("Learning rate", 6, rate, across, dotted=len(rate) == 1))
    return charts


def _adapter_view(record: AdapterRecord, interval: Interval | None, *, is_active: bool) -> AdapterView:
    metrics = record.metrics
    words = {AdapterStatus.REVERTED: "taken back"}
    facts = [when(record.created_s), f"from {record.parent or 'the bare draft'}", record.form]
    facts.append("brought in from outside" if record.run is None else f"run {record.run}")
    estimate = _estimate(metrics)
    gain = ""
    if estimate is not None:
        low, value, high = estimate
        gain = f"{signed_percent(value)} ({signed_percent(low)} to {signed_percent(high)})"
    elif (value_alone := _number(metrics.get("gain"))) is not None:
        gain = signed_percent(value_alone)
    return AdapterView(
        name=record.name,
        status="active" if is_active else record.status.value,
        word="active" if is_active else words.get(record.status, record.status.value),
        facts=" · ".join(facts),
        alpha=_arrow(metrics, "alpha", 3),
        tau=_arrow(metrics, "tau", 2),
        gain=gain,
        interval=interval,
        reason=record.reason,
    )


def _domain_changes(result: Mapping[str, Any], kinds: Mapping[str, str]) -> list[DomainChange]:
    domains = result.get("domains")
    if not isinstance(domains, dict):
        return []
    rows = [(str(name), values) for name, values in domains.items() if isinstance(values, dict)]
    rows.sort(key=lambda row: -(_number(row[1].get("requests")) or 0))
    return [
        DomainChange(
            name=name,
            kind=kinds.get(name, f"d{COLOURED_DOMAINS}"),
            requests=number(_number(values.get("requests"))),
            alpha=(
                number(_number(values.get("alpha_before")), 3),
                number(_number(values.get("alpha_after")), 3),
            ),
            tau=(number(_number(values.get("tau_before")), 2), number(_number(values.get("tau_after")), 2)),
            change=_tau_change(values),
        )
        for name, values in rows
    ]


def _tau_change(values: Mapping[str, Any]) -> str:
    before, after = _number(values.get("tau_before")), _number(values.get("tau_after"))
    return signed_percent(after / before - 1) if before and after is not None else DASH


def _pairs(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The held-out requests that have a tau before and after."""
    rows = result.get("held_out")
    return [
        row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
        and "domain" in row
        and _number(row.get("tau_before")) is not None
        and _number(row.get("tau_after")) is not None
    ]


def _tau_point(row: Mapping[str, Any]) -> Point:
    return Point(float(row["tau_before"]), float(row["tau_after"]))


def _told(row: Mapping[str, Any]) -> str:
    before, after = number(row["tau_before"], 2), number(row["tau_after"], 2)
    return f"request {row.get('request', DASH)}, {row['domain']}: tau {before} → {after}"


def _arrow(metrics: Mapping[str, Any], name: str, digits: int) -> str:
    before, after = _number(metrics.get(f"{name}_before")), _number(metrics.get(f"{name}_after"))
    return "" if after is None else f"{number(before, digits)} → {number(after, digits)}"


def _estimate(metrics: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Low, value and high of the gain."""
    ends = metrics.get("gain_ci95")
    value = _number(metrics.get("gain"))
    if value is None or not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = (_number(end) for end in ends)
    return None if low is None or high is None else (low, value, high)


def _number(value: Any) -> float | None:
    """A finite number of stored JSON; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
