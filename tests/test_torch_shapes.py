"""Which sequences share a recorded step, and where its rows belong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from draftloop.backends.torch.cuda.shapes import (  # noqa: E402
    FIELDS,
    MAX_ROWS,
    MAX_SEQUENCES,
    TILE_ROWS,
    Reading,
    runs,
    shape_of,
    table,
    table_after,
)

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@dataclass(frozen=True)
class Cache:
    values: torch.Tensor
    max_tokens: int
    position: int


def readings_of(counts, steps_after=0):
    return [
        Reading(Cache(torch.empty(1), 100 + i, i), count, steps_after * (i % 2))
        for i, count in enumerate(counts)
    ]


def entries(fields):
    assert len(fields) % FIELDS == 0
    return [tuple(fields[at : at + FIELDS]) for at in range(0, len(fields), FIELDS)]


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, kinds=st.lists(st.sampled_from(("greedy", "sampled", None)), min_size=40, max_size=40))
def test_everybody_takes_one_step_with_others_of_a_kind_as_far_as_there_is_room(counts, kinds):
    kinds = kinds[: len(counts)]
    found = runs(kinds, counts)
    assert sorted(index for run in found for index in run) == list(range(len(counts)))
    for run in found:
        assert len({kinds[index] for index in run}) == 1
        assert sum(counts[index] for index in run) <= MAX_ROWS
        assert len(run) <= MAX_SEQUENCES
    assert all(
        len({kinds[one[0]], kinds[other[0]]}) == 2 or one[-1] < other[0] for one, other in pairs(found)
    )


def pairs(found):
    return [(one, other) for at, one in enumerate(found) for other in found[at + 1 :]]


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS.filter(lambda counts: shape_of(counts) is not None), queries=st.integers(1, 16))
def test_every_query_of_every_row_has_its_tile_and_all_tiles_have_room(counts, queries):
    shape, readings = shape_of(counts), readings_of(counts)
    assert shape.rows >= sum(counts)
    assert shape.sequences >= len(counts)
    tiles = entries(table(readings, queries))
    assert len(tiles) <= shape.tiles(queries)
    held = [
        (capacity, position, first + m // queries, m % queries)
        for _, capacity, position, first, count, tile, steps in tiles
        for m in range(tile * TILE_ROWS, (tile + 1) * TILE_ROWS)
        if steps and m < count * queries
    ]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    assert held == [
        (100 + i, i, first + row, query)
        for i, (first, count) in enumerate(zip(firsts, counts, strict=True))
        for row in range(count)
        for query in range(queries)
    ]


@settings(max_examples=30, deadline=None)
@given(counts=COUNTS.filter(lambda counts: shape_of(counts) is not None), queries=st.integers(1, 40))
def test_behind_a_step_each_reads_one_token_more_as_often_as_it_wants(counts, queries):
    shape, readings = shape_of(counts).following, readings_of(counts, steps_after=3)
    tiles = entries(table_after(readings, queries))
    assert len(tiles) <= shape.tiles(queries)
    firsts = [entry for entry in tiles if entry[5] == 0]
    if len(counts) > 1:
        assert [entry[1:5] for entry in firsts] == [
            (100 + i, i + count, i, 1) for i, count in enumerate(counts)
        ]
        assert [entry[6] for entry in firsts] == [3 * (i % 2) for i in range(len(counts))]
    assert table_after(readings_of(counts), queries) == []


def test_one_sequence_takes_no_more_rows_than_it_has():
    assert [shape_of([count]).rows for count in (1, 5, 16, 17, 128)] == [1, 5, 16, 32, 128]
    assert shape_of([129]) is None
    assert shape_of([1] * 33) is None
