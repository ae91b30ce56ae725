"""Where the rows of a recorded step belong: sizes that are recorded, and the tables that kernels read.

Contract: numbers of the host alone. Several sequences' rows are packed one behind another. Both counts are
rounded up, so that few sizes are recorded; what stands there beyond the real ones belongs to no sequence and
writes nowhere. Must not know how a step goes.

Letters: R rows, S sequences, Q query heads that share a key/value head.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from draftloop.backends.torch.decoder import TorchCache

TILE_ROWS = 16
"""Rows of one tensor-core tile: fewer cost the same."""
FIELDS = 7
"""Of a tile in a table: its cache's address, that one's capacity in tokens, how many it holds, the sequence's
first row, its rows, which of its tiles this is, and in how many steps it still takes part."""
POSITION, STEPS = 2, 6

_ROWS = (2, 4, 8, 16, 32, 48, 64, 96, 128)
_SEQUENCES = (1, 2, 4, 8, 16, 32)
MAX_ROWS, MAX_SEQUENCES = _ROWS[-1], _SEQUENCES[-1]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a recorded step is fixed to, both rounded up."""

    rows: int
    sequences: int

    def tiles(self, queries: int) -> int:
        """Tiles of attention that R rows of S sequences fill at most; queries: Q."""
        return (self.rows * queries + (TILE_ROWS - 1) * self.sequences) // TILE_ROWS

    @property
    def following(self) -> Shape:
        """Of the steps behind this one, in which each sequence reads one token."""
        return Shape(self.sequences, self.sequences)


READ_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Sizes of a step that only reads: a text is cut to any length."""

LARGEST = Shape(MAX_ROWS, MAX_SEQUENCES)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one sequence reads: `count` tokens in a step, and one in each of `steps_after` steps behind it."""

    cache: TorchCache
    count: int
    steps_after: int = 0

    @property
    def num_tokens(self) -> int:
        """All that it appends to the cache."""
        return self.count + self.steps_after


def shape_of(counts: Sequence[int]) -> Shape | None:
    """The size to record for sequences that read so many tokens; None where that is too much for one step."""
    rows, sequences = sum(counts), len(counts)
    if rows > MAX_ROWS or sequences > MAX_SEQUENCES:
        return None
    if sequences == 1 and rows <= TILE_ROWS:
        # The usual case takes no more than it needs: sampling costs by the row.
        return Shape(rows, 1)
    return Shape(_rounded_up(rows, _ROWS), _rounded_up(sequences, _SEQUENCES))


def reading_shape(count: int) -> Shape:
    """The size to record for one sequence that reads so many tokens, at most `MAX_ROWS`, and nothing else."""
    return Shape(_rounded_up(count, READ_ROWS), 1)


def runs(kinds: Sequence[Hashable], counts: Sequence[int]) -> list[list[int]]:
    """Indices of sequences of one kind that read so many tokens, as many together as a step has room for."""
    by_kind: dict[Hashable, list[list[int]]] = {}
    for index, kind in enumerate(kinds):
        found = by_kind.setdefault(kind, [[]])
        if shape_of([counts[other] for other in (*found[-1], index)]) is None and found[-1]:
            found.append([])
        found[-1].append(index)
    return [run for found in by_kind.values() for run in found]


def first_rows(readings: Sequence[Reading]) -> list[int]:
    """Where each sequence's rows begin."""
    return [0, *accumulate(one.count for one in readings[:-1])]


def table(readings: Sequence[Reading], queries: int) -> list[int]:
    """FIELDS of each tile of a step in which all of them read; what stands behind them has to be zero."""
    fields: list[int] = []
    for one, first in zip(readings, first_rows(readings), strict=True):
        cache, count = one.cache, one.count
        address, capacity, position = cache.values.data_ptr(), cache.max_tokens, cache.position
        for tile in range(-(-count * queries // TILE_ROWS)):
            fields += (address, capacity, position, first, count, tile, 1)
    return fields


def table_after(readings: Sequence[Reading], queries: int) -> list[int]:
    """The same of the first of the steps behind that one; empty where there is none."""
    if not any(one.steps_after for one in readings):
        return []
    fields: list[int] = []
    for row, one in enumerate(readings):
        cache, position = one.cache, one.cache.position + one.count
        for tile in range(-(-queries // TILE_ROWS)):
            fields += (cache.values.data_ptr(), cache.max_tokens, position, row, 1, tile, one.steps_after)
    return fields


def _rounded_up(number: int, sizes: tuple[int, ...]) -> int:
    return sizes[bisect_left(sizes, number)]
