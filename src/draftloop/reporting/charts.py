"""Charts as data that the page's template draws: fluid SVG whose text is HTML, so that it never scales.

Contract: every plot is `scales.EXTENT` units wide and high and is stretched to its place; strokes keep
their width, and a dot is a stroke of length zero. Must not know where the values come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from draftloop.reporting.paths import (
    Point,
    dots_at,
    grid,
    polyline,
    stride_for,
    thinned,
    upright,
    upright_grid,
)
from draftloop.reporting.scales import EXTENT, Scale, central_range, padded_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.reporting.scales import Tick

MAX_DOTS = 1500
MAX_VERTICES = 500
SPARK_VERTICES = 60
X_TICKS, Y_TICKS = 5, 4
CURVE_X_TICKS = 3
LABEL_LANES = 3
NARROW_PLOT_PIXELS = 300
"""Width of a plot on a telephone: labels that have room there have it everywhere."""
LABEL_CHARACTER_PIXELS = 7.5


class Level(NamedTuple):
    """One value over a stretch of places; `title` tells of it."""

    first_x: float
    last_x: float
    y: float
    title: str


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over requests.

    Attributes:
        title: what it is, with its unit.
        digits: of the values that are told.
        dots: single requests, at least one.
        lines: one for each stretch.
        levels: likewise.
    """

    title: str
    digits: int
    dots: Sequence[Point]
    lines: Sequence[Sequence[Point]]
    levels: Sequence[Level]


@dataclass(frozen=True, slots=True)
class Stroke:
    """One SVG path. `kind` is its CSS class; `title` is shown where the pointer rests, "" for none."""

    kind: str
    path: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at x.

    Attributes:
        x: where.
        kind: its CSS class.
        label: a few characters.
        title: one sentence.
    """

    x: float
    kind: str
    label: str
    title: str


@dataclass(frozen=True, slots=True)
class MarkLabel:
    """A mark's label above the plot; `side` tells which way it extends from the mark."""

    percent: float
    kind: str
    text: str
    title: str
    lane: int
    side: str


@dataclass(frozen=True, slots=True)
class EndLabel:
    """The value at the end of a line, beside it."""

    percent: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One plot.

    Attributes:
        kind: its CSS class.
        title: what is drawn, with its unit.
        summary: the same with its main figures, for those who do not see it.
        x_title: what the horizontal axis counts.
        x_ticks, y_ticks: of the axes.
        strokes: lowest first.
        labels: of marks.
        lanes: rows of labels above the plot.
        end: of the main line, None where it has none.
        note: what is not drawn, "" where everything is.
    """

    kind: str
    title: str
    summary: str
    x_title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    strokes: Sequence[Stroke]
    labels: Sequence[MarkLabel] = ()
    lanes: int = 0
    end: EndLabel | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its interval on a common axis, in percent; `zero` is where nothing changes."""

    low: float
    value: float
    high: float
    zero: float


def over_requests(series: Series, marks: Sequence[Mark], num_requests: int) -> Chart:
    """Faint dots, a line through them and a level for each stretch, and marks where something happened.

    Args:
        series: what is drawn.
        marks: where something happened, left to right.
        num_requests: the horizontal axis counts from 1 to here.
    """
    lines, levels = series.lines, series.levels
    across = Scale(0.5, num_requests + 0.5)
    vertices = [point.y for line in lines for point in line] + [level.y for level in levels]
    up = padded_scale([*central_range(dot.y for dot in series.dots), *vertices])
    every = stride_for(len(series.dots), MAX_DOTS)
    drawn = thinned(series.dots, every)
    inside = [dot for dot in drawn if up.holds(dot.y)]
    strokes = [Stroke("grid", grid(up.ticks(Y_TICKS)))]
    strokes += [Stroke(f"mark {mark.kind}", upright(across.across(mark.x)), mark.title) for mark in marks]
    strokes.append(Stroke("dots", dots_at(inside, across, up)))
    strokes += [_level(level, across, up) for level in levels]
    stride = stride_for(sum(len(line) for line in lines), MAX_VERTICES)
    strokes += [Stroke("line", polyline(thinned(line, stride), across, up)) for line in lines if line]
    last = next((line[-1] for line in reversed(lines) if line), None)
    labels, lanes = _placed_labels(marks, across)
    return Chart(
        kind="requests",
        title=series.title,
        summary=_summary(series.title, [point for line in lines for point in line], series.digits),
        x_title="requests with drafts, oldest first",
        x_ticks=across.ticks(X_TICKS, whole=True),
        y_ticks=up.ticks(Y_TICKS),
        strokes=strokes,
        labels=labels,
        lanes=lanes,
        end=None if last is None else EndLabel(up.percent(last.y), f"{last.y:.{series.digits}f}"),
        note=_left_out(len(drawn) - len(inside), every),
    )


def curve(
    title: str,
    digits: int,
    line: Sequence[Point],
    across: Scale,
    *,
    dotted: bool,
    skipped: Sequence[float] = (),
) -> Chart:
    """One curve of a training run.

    Args:
        title: what is drawn.
        digits: of the values that are told.
        line: at least one point.
        across: the axis that the run's curves share.
        dotted: whether each point gets a dot, for curves of few points.
        skipped: where a step had no finite gradient.
    """
    up = padded_scale((point.y for point in line), least=max(abs(line[-1].y) * 0.02, 1e-9))
    drawn = thinned(line, stride_for(len(line), MAX_VERTICES))
    strokes = [Stroke("grid", grid(up.ticks(Y_TICKS)))]
    strokes += [
        Stroke("skipped", upright(across.across(x)), f"step {x:.0f}: no finite gradient") for x in skipped
    ]
    strokes.append(Stroke("line", polyline(drawn, across, up)))
    if dotted:
        strokes.append(Stroke("beads", dots_at(line, across, up)))
    return Chart(
        kind="curve",
        title=title,
        summary=_summary(title, line, digits),
        x_title="step",
        x_ticks=across.ticks(CURVE_X_TICKS, whole=True),
        y_ticks=up.ticks(Y_TICKS),
        strokes=strokes,
    )


def before_after(
    title: str, x_title: str, groups: Sequence[tuple[str, Sequence[tuple[Point, str]]]]
) -> Chart:
    """A square plot: before to the right, after upwards, one dot each; what gained lies above the diagonal.

    Args:
        title: what is drawn.
        x_title: what is before.
        groups: CSS class, and points with what is told of each; at least one point.
    """
    values = [value for _, points in groups for point, _ in points for value in point]
    both = padded_scale(values, least=0.2)
    strokes = [
        Stroke("grid", grid(both.ticks(Y_TICKS)) + upright_grid(both.ticks(Y_TICKS))),
        Stroke("diagonal", f"M0 {EXTENT}L{EXTENT} 0"),
    ]
    strokes += [
        Stroke(f"dot {kind}", dots_at([point], both, both), title)
        for kind, points in groups
        for point, title in points
    ]
    gained = sum(point.y > point.x for _, points in groups for point, _ in points)
    total = sum(len(points) for _, points in groups)
    return Chart(
        kind="square",
        title=title,
        summary=f"{title}: {gained} of {total} prompts lie above the diagonal",
        x_title=f"{x_title} · above the diagonal is a gain",
        x_ticks=both.ticks(Y_TICKS),
        y_ticks=both.ticks(Y_TICKS),
        strokes=strokes,
    )


def sparkline(values: Sequence[float]) -> str:
    """The path of a small line without axes; "" for fewer than two values."""
    if len(values) < 2:
        return ""
    up, across = padded_scale(values), Scale(0, len(values) - 1)
    points = [Point(place, value) for place, value in enumerate(values)]
    return polyline(thinned(points, stride_for(len(points), SPARK_VERTICES)), across, up)


def intervals(estimates: Sequence[tuple[float, float, float] | None]) -> list[Interval | None]:
    """Low, value and high of each estimate on one axis that holds them all and zero."""
    known = [value for estimate in estimates if estimate is not None for value in estimate]
    if not known:
        return [None] * len(estimates)
    axis = padded_scale([*known, 0.0], margin=0.05, least=1e-6)
    return [
        None
        if one is None
        else Interval(axis.percent(one[0]), axis.percent(one[1]), axis.percent(one[2]), axis.percent(0.0))
        for one in estimates
    ]


def _level(level: Level, across: Scale, up: Scale) -> Stroke:
    ends = [Point(level.first_x - 0.5, level.y), Point(level.last_x + 0.5, level.y)]
    return Stroke("level", polyline(ends, across, up), level.title)


def _summary(title: str, points: Sequence[Point], digits: int) -> str:
    if not points:
        return title
    values = [point.y for point in points]
    first, last = (f"{value:.{digits}f}" for value in (values[0], values[-1]))
    return (
        f"{title}: from {first} to {last}, lowest {min(values):.{digits}f}, highest {max(values):.{digits}f}"
    )


def _left_out(outside: int, every: int) -> str:
    notes = []
    if every > 1:
        notes.append(f"one dot stands for {every} requests")
    if outside:
        notes.append(f"{outside} {'dot lies' if outside == 1 else 'dots lie'} beyond the axis")
    return "; ".join(notes)


def _placed_labels(marks: Sequence[Mark], across: Scale) -> tuple[list[MarkLabel], int]:
    """Labels in lanes such that none covers another on a narrow plot; the rest have their title."""
    free_from = [float("-inf")] * LABEL_LANES
    labels = []
    for mark in marks:
        percent = across.percent(mark.x)
        width = (len(mark.label) + 1) * LABEL_CHARACTER_PIXELS / NARROW_PLOT_PIXELS * 100
        side = "right" if percent < width / 2 else "left" if percent > 100 - width / 2 else "middle"
        begin = percent - {"right": 0.0, "left": width, "middle": width / 2}[side]
        lane = next((lane for lane, free in enumerate(free_from) if begin >= free), None)
        if lane is not None:
            free_from[lane] = begin + width
            labels.append(MarkLabel(percent, mark.kind, mark.label, mark.title, lane, side))
    return labels, 1 + max((label.lane for label in labels), default=-1)
