"""SVG path data: lines, dots and grids in per mille of a plot.

Contract: coordinates have one decimal at most, so that pages stay small. Must not know what is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from draftloop.reporting.scales import EXTENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from draftloop.reporting.scales import Scale, Tick


class Point(NamedTuple):
    """A value at a place."""

    x: float
    y: float


def stride_for(count: int, most: int) -> int:
    """The distance between kept points at which at most `most` of `count` are kept."""
    return max(1, -(-count // most))


def thinned(points: Sequence[Point], stride: int) -> list[Point]:
    """A point each `stride`, and the last one."""
    kept = list(points[::stride])
    if points and (len(points) - 1) % stride:
        kept.append(points[-1])
    return kept


def polyline(points: Iterable[Point], across: Scale, up: Scale) -> str:
    """Straight lines from point to point; `points` are not empty."""
    return "M" + "L".join(f"{_short(across.across(p.x))} {_short(up.down(p.y))}" for p in points)


def dots_at(points: Iterable[Point], across: Scale, up: Scale) -> str:
    """A stroke of length zero at each point, which a round or square cap makes a dot."""
    return "".join(f"M{_short(across.across(p.x))} {_short(up.down(p.y))}h0" for p in points)


def upright(x: float) -> str:
    """A line from the top to the bottom at an x coordinate."""
    return f"M{_short(x)} 0V{EXTENT}"


def grid(ticks: Iterable[Tick]) -> str:
    """A line across at each tick of the vertical axis."""
    return "".join(f"M0 {_short(EXTENT - tick.percent * EXTENT / 100)}H{EXTENT}" for tick in ticks)


def upright_grid(ticks: Iterable[Tick]) -> str:
    """A line upright at each tick of the horizontal axis."""
    return "".join(upright(tick.percent * EXTENT / 100) for tick in ticks)


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
