"""Values to places on an axis: round ticks, and coordinates in per mille of the plot.

Contract: pure arithmetic. Must not know what is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

EXTENT = 1000
"""Width and height of every plot in its own units."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis, in percent from its low end."""

    percent: float
    label: str


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear axis from `low` to `high`, where `low` < `high`."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """The place of `value`, in percent from the low end."""
        return round(100 * self._share(value), 2)

    def across(self, value: float) -> float:
        """The x coordinate of `value`."""
        return round(EXTENT * self._share(value), 1)

    def down(self, value: float) -> float:
        """The y coordinate of `value`: SVG counts from the top."""
        return round(EXTENT * (1 - self._share(value)), 1)

    def holds(self, value: float) -> bool:
        """Whether `value` lies on the axis."""
        return self.low <= value <= self.high

    def ticks(self, count: int, *, whole: bool = False) -> list[Tick]:
        """`count` round values, or one or two less or more; `whole` allows whole numbers only."""
        step = _round_step((self.high - self.low) / (count + 1), whole=whole)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        values = [index * step for index in range(first, last + 1)]
        return [Tick(self.percent(value), _label(value, step, digits)) for value in values]

    def _share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def padded_scale(values: Iterable[float], *, margin: float = 0.06, least: float = 0.02) -> Scale:
    """A scale that holds all `values` with some room around them.

    Args:
        values: at least one.
        margin: room on either side, as a share of their range.
        least: the shortest range, so that equal values lie in the middle.
    """
    known = list(values)
    low, high = min(known), max(known)
    room = max((high - low) * margin, (least - (high - low)) / 2)
    return Scale(low - room, high + room)


def central_range(values: Iterable[float], share: float = 0.02) -> tuple[float, float]:
    """The values between which all lie but `share` at either end: a few odd ones must not flatten a chart."""
    ordered = sorted(values)
    cut = int(len(ordered) * share)
    return ordered[cut], ordered[len(ordered) - 1 - cut]


def _round_step(rough: float, *, whole: bool) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return max(1.0, step) if whole else step


def _label(value: float, step: float, digits: int) -> str:
    if step < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"
    return f"{value:,.{digits}f}"
