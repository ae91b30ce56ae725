"""Axes and plots: what is drawn lies where its value belongs, and stays small."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from draftloop.reporting.charts import (
    MAX_DOTS,
    MAX_VERTICES,
    NARROW_PLOT_PIXELS,
    Chart,
    Level,
    Mark,
    Series,
    before_after,
    curve,
    intervals,
    over_requests,
    sparkline,
)
from draftloop.reporting.paths import Point
from draftloop.reporting.scales import EXTENT, Scale, central_range, padded_scale

VALUES = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


@given(VALUES, st.floats(1e-4, 1e6), st.integers(2, 6))
def test_ticks_are_round_distinct_and_on_the_axis(low: float, width: float, count: int) -> None:
    scale = Scale(low, low + width)
    assume(scale.high > scale.low and width > abs(low) * 1e-9)
    ticks = scale.ticks(count)
    places = [tick.percent for tick in ticks]
    assert 1 <= len(ticks) <= count + 2
    assert all(-0.01 <= place <= 100.01 for place in places)
    assert places == sorted(set(places))


def test_tick_labels_tell_their_values() -> None:
    assert [tick.label for tick in Scale(0.62, 1.01).ticks(4)] == ["0.7", "0.8", "0.9", "1.0"]
    assert [tick.label for tick in Scale(0.5, 388.5).ticks(5, whole=True)] == ["100", "200", "300"]
    assert [tick.label for tick in Scale(0, 3.2e-4).ticks(4)] == ["0", "1e-4", "2e-4", "3e-4"]
    assert [tick.label for tick in Scale(0.5, 3.5).ticks(5, whole=True)] == ["1", "2", "3"]
    assert [tick.percent for tick in Scale(0, 10).ticks(4)] == [0, 20, 40, 60, 80, 100]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_a_padded_scale_holds_its_values_in_order(values: list[float]) -> None:
    scale = padded_scale(values)
    assert all(scale.holds(value) for value in values)
    assert scale.low < scale.high
    assert scale.down(max(values)) <= scale.down(min(values))


def test_a_few_odd_values_do_not_stretch_the_central_range() -> None:
    assert central_range([0.8] * 98 + [0.0, 5.0]) == (0.8, 0.8)
    assert central_range([3.0]) == (3.0, 3.0)


def requests_chart(count: int, marks: list[Mark]) -> Chart:
    dots = [Point(place, 0.5 + 0.4 * (place % 7) / 7) for place in range(1, count + 1)]
    lines = [[Point(place, 0.7) for place in range(5, count + 1)]]
    levels = [Level(1, count, 0.71, "bare draft: 0.710")]
    return over_requests(Series("Alpha", 3, dots, lines, levels), marks, count)


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def test_dots_lie_where_their_values_belong() -> None:
    chart = requests_chart(10, [])
    (dots,) = [stroke for stroke in chart.strokes if stroke.kind == "dots"]
    drawn = coordinates(dots.path)
    assert [x for x, _ in drawn] == pytest.approx([EXTENT * (place - 0.5) / 10 for place in range(1, 11)])
    lowest, highest = drawn[6], drawn[5]
    assert highest[1] < drawn[0][1] < lowest[1] <= EXTENT
    (grid,) = [stroke for stroke in chart.strokes if stroke.kind == "grid"]
    lines = [EXTENT - y for _, y in coordinates(grid.path)]
    assert lines == pytest.approx([10 * tick.percent for tick in chart.y_ticks], abs=0.1)
    (level,) = [stroke for stroke in chart.strokes if stroke.kind == "level"]
    assert [x for x, _ in coordinates(level.path)] == [0, EXTENT]
    assert chart.end is not None
    assert chart.end.text == "0.700"
    assert chart.note == ""


def test_many_requests_make_no_large_chart() -> None:
    chart = requests_chart(50_000, [])
    for stroke in chart.strokes:
        most = MAX_DOTS if stroke.kind == "dots" else MAX_VERTICES + 1
        assert len(coordinates(stroke.path)) <= most + 1
    (line,) = [stroke for stroke in chart.strokes if stroke.kind == "line"]
    assert coordinates(line.path)[-1][0] == EXTENT
    assert chart.note.startswith("one dot stands for 34 requests")
    assert sum(len(stroke.path) for stroke in chart.strokes) < 60_000


def test_dots_beyond_the_axis_are_told_of() -> None:
    dots = [Point(place, 0.8) for place in range(1, 100)] + [Point(100, 5.0)]
    chart = over_requests(Series("Tau", 2, dots, [], []), [], 100)
    assert chart.note == "1 dot lies beyond the axis"
    assert chart.end is None


@given(st.lists(st.floats(0.5, 400.5), max_size=30))
def test_labels_of_marks_never_cover_each_other_on_a_narrow_plot(places: list[float]) -> None:
    marks = [Mark(place, "on", f"▲ a{number:04d}", "") for number, place in enumerate(sorted(places))]
    chart = requests_chart(400, marks)
    # The marks stay, whether or not there was room for a label.
    assert sum(stroke.kind == "mark on" for stroke in chart.strokes) == len(marks)
    width = 7 * 7.0 / NARROW_PLOT_PIXELS * 100
    spans: dict[int, list[tuple[float, float]]] = {}
    for label in chart.labels:
        begin = label.percent - {"right": 0.0, "left": width, "middle": width / 2}[label.side]
        assert begin >= -0.5
        assert begin + width <= 100.5
        assert 0 <= label.lane < chart.lanes <= 3
        spans.setdefault(label.lane, []).append((begin, begin + width))
    for lane in spans.values():
        assert all(end <= begin for (_, end), (begin, _) in zip(sorted(lane), sorted(lane)[1:], strict=False))
    assert bool(chart.labels) == bool(marks)


def test_a_curve_marks_steps_without_a_gradient() -> None:
    line = [Point(step, 1 / step) for step in range(1, 21)]
    chart = curve("Loss", 3, line, Scale(0, 20), dotted=False, skipped=[5.0])
    (skipped,) = [stroke for stroke in chart.strokes if stroke.kind == "skipped"]
    assert coordinates(skipped.path) == [(250, 0)]
    assert "step 5" in skipped.title
    assert "from 1.000 to 0.050" in chart.summary


def test_a_constant_curve_has_an_axis() -> None:
    chart = curve("Loss", 3, [Point(1, 0.0), Point(2, 0.0)], Scale(0, 2), dotted=True)
    assert chart.y_ticks
    (line,) = [stroke for stroke in chart.strokes if stroke.kind == "line"]
    assert {y for _, y in coordinates(line.path)} == {EXTENT / 2}


def test_what_gained_lies_above_the_diagonal() -> None:
    groups = [("d0", [(Point(3.0, 3.5), "gained"), (Point(4.0, 3.0), "lost")])]
    chart = before_after("Tau", "before", groups)
    places = {
        stroke.title: coordinates(stroke.path)[0] for stroke in chart.strokes if stroke.kind == "dot d0"
    }
    x, y = places["gained"]
    assert y < EXTENT - x
    x, y = places["lost"]
    assert y > EXTENT - x
    assert "1 of 2" in chart.summary


def test_intervals_share_one_axis_with_zero() -> None:
    rejected, unknown, promoted = intervals([(-0.02, 0.0, 0.02), None, (0.05, 0.08, 0.1)])
    assert unknown is None
    assert rejected is not None
    assert promoted is not None
    assert rejected.low < rejected.zero == rejected.value < rejected.high
    assert promoted.zero == rejected.zero < promoted.low < promoted.value < promoted.high <= 100
    assert intervals([None]) == [None]


def test_a_sparkline_needs_two_values() -> None:
    assert sparkline([]) == sparkline([0.5]) == ""
    assert coordinates(sparkline([0.0, 1.0]))[0][1] > coordinates(sparkline([0.0, 1.0]))[1][1]
    assert len(coordinates(sparkline([0.5] * 10_000))) <= 61
