"""Ratios with their intervals as one SVG picture that stands alone: a row of bars for each task.

Contract: pure: bars in, SVG text out. Must not know what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.reporting.scales import Scale
from draftloop.reporting.templating import render

if TYPE_CHECKING:
    from collections.abc import Sequence

TEMPLATE = "ratios.svg"
WIDTH, MARGIN, LABELS_WIDTH, VALUES_WIDTH = 860, 20, 190, 60
BAR_HEIGHT, BAR_GAP, GROUP_GAP = 16, 4, 14
TITLE_HEIGHT, LEGEND_HEIGHT, AXIS_HEIGHT, NOTE_HEIGHT = 60, 20, 26, 18
COLOURS = ("#1f5fa8", "#b3410f", "#00735c", "#a0428c", "#74787d", "#8a6d00")
TICKS = 6


@dataclass(frozen=True, slots=True)
class Bar:
    """One ratio; None where it is not defined."""

    name: str
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """The bars of one task; in every group the same, in the same order."""

    label: str
    bars: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A bar as drawn: places in pixels."""

    y: float
    end: float
    low: float | None
    high: float | None
    label_x: float
    label: str
    colour: str


def draw_ratios(title: str, subtitle: str, groups: Sequence[Group], notes: Sequence[str]) -> str:
    """The picture.

    Args:
        title: above it.
        subtitle: a line below the title.
        groups: at least one.
        notes: lines below it.
    """
    scale = _scale(groups)
    left, right = MARGIN + LABELS_WIDTH, WIDTH - MARGIN - VALUES_WIDTH
    names = [bar.name for bar in groups[0].bars]
    top = y = TITLE_HEIGHT + LEGEND_HEIGHT * len(names) + GROUP_GAP
    rows = []
    for group in groups:
        bars = [
            _placed(bar, index, y + index * (BAR_HEIGHT + BAR_GAP), scale, (left, right))
            for index, bar in enumerate(group.bars)
        ]
        height = len(bars) * (BAR_HEIGHT + BAR_GAP) - BAR_GAP
        rows.append({"label": group.label, "y": y + height / 2, "bars": bars})
        y += height + GROUP_GAP
    return render(
        TEMPLATE,
        title=title,
        subtitle=subtitle,
        legend=[
            {"y": TITLE_HEIGHT + LEGEND_HEIGHT * (index + 0.5), "name": name, "colour": _colour(index)}
            for index, name in enumerate(names)
        ],
        ticks=[{"x": _place(tick.percent, left, right), "label": tick.label} for tick in scale.ticks(TICKS)],
        one=_x(1.0, scale, left, right),
        rows=rows,
        notes=[
            {"y": y + AXIS_HEIGHT + NOTE_HEIGHT * (index + 1), "text": note}
            for index, note in enumerate(notes)
        ],
        top=top - GROUP_GAP / 2,
        bottom=y,
        left=left,
        margin=MARGIN,
        width=WIDTH,
        height=y + AXIS_HEIGHT + NOTE_HEIGHT * (len(notes) + 1),
        bar_height=BAR_HEIGHT,
    )


def _scale(groups: Sequence[Group]) -> Scale:
    """From zero, because bars compare by their length, to beyond the highest interval and 1."""
    values = [value for group in groups for bar in group.bars for value in (bar.value, bar.high)]
    return Scale(0.0, 1.05 * max([1.0, *(value for value in values if value is not None)]))


def _placed(bar: Bar, index: int, y: float, scale: Scale, sides: tuple[float, float]) -> _Placed:
    end, low, high = (
        None if value is None else _x(value, scale, *sides) for value in (bar.value, bar.low, bar.high)
    )
    return _Placed(
        y=y,
        end=sides[0] if end is None else end,
        low=low,
        high=high,
        label_x=max(x for x in (sides[0], end, high) if x is not None) + 7,
        label="-" if bar.value is None else f"{bar.value:.2f}",
        colour=_colour(index),
    )


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _x(value: float, scale: Scale, left: float, right: float) -> float:
    return _place(scale.percent(value), left, right)


def _place(percent: float, left: float, right: float) -> float:
    return round(left + (right - left) * percent / 100, 1)
