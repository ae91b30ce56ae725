"""`MlxCache`: the KV cache of one sequence, a row of arrays that several sequences may share.

Contract: sequences that are computed together are rows of the same arrays, so that one forward reads and
writes all of them; they are copied into shared arrays when the company changes, not in every round. To its
owner a cache is its own: it trims, copies and pastes its row alone. What lies behind a row's position is
stale: attention masks it, and later tokens overwrite it. The capacity is always a multiple of `STEP_TOKENS`,
for a compiled step is traced once for each. mlx-lm's own cache objects, which its batch caches are too, trim
all sequences alike; a round keeps another number of tokens of each. Must not know networks.

Letters: R rows, G key and value heads, W their width, S capacity in tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ref

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from draftloop.backends.mlx.memory import memory_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    Layers = Sequence[tuple[mx.array, mx.array]]

STEP_TOKENS = KVCache.step


class Rows:
    """Keys and values of R sequences.

    Attributes:
        layers: keys and values of each, [R, G, S, W]; none before anything was written.
        positions: how many tokens each row holds.

    Args:
        layers, positions: as above.
        owners: whose rows they are.
    """

    def __init__(self, layers: Layers, positions: Sequence[int], owners: Sequence[MlxCache]) -> None:
        self.layers = layers
        self.positions = list(positions)
        self._owners = [ref(owner) for owner in owners]
        self._idle_steps = [0] * len(owners)

    @property
    def count(self) -> int:
        """R."""
        return len(self.positions)

    @property
    def capacity(self) -> int:
        """S."""
        return self.layers[0][0].shape[2] if self.layers else 0

    @property
    def owners(self) -> list[MlxCache | None]:
        """Whose rows they are; None where nobody has that one any more."""
        found = [owner() for owner in self._owners]
        return [owner if owner is not None and owner.rows is self else None for owner in found]

    def make_room(self, n: int) -> None:
        """Have a place for `n` more tokens in every row, where the arrays exist already."""
        wanted = max(self.positions) + n
        if self.layers and (self.capacity < wanted or self.capacity % STEP_TOKENS):
            capacity = -(-wanted // STEP_TOKENS) * STEP_TOKENS
            self.layers = [(_resized(k, capacity), _resized(v, capacity)) for k, v in self.layers]

    def row(self, index: int) -> Layers:
        """One of them, [1, G, S, W]."""
        return [(k[index : index + 1], v[index : index + 1]) for k, v in self.layers]

    def suits(self, asked: Sequence[int], most_idle_steps: int) -> bool:
        """Whether a step for these rows is best made in these arrays. The others are computed for nothing.

        Args:
            asked: the rows.
            most_idle_steps: how many steps in succession a row may have been computed for nothing.
        """
        self._idle_steps = [0 if i in asked else idle + 1 for i, idle in enumerate(self._idle_steps)]
        return max(self._idle_steps) <= most_idle_steps and None not in self.owners


class MlxCache:
    """The KV cache of one sequence.

    Args:
        max_tokens: the most it may hold.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.rows = Rows([], [0], [self])
        self.row = 0

    @property
    def position(self) -> int:
        """How many tokens the cache holds."""
        return self.rows.positions[self.row]

    @property
    def max_tokens(self) -> int:
        """How many tokens it can hold."""
        return self._max_tokens

    @property
    def written(self) -> bool:
        """Whether it has arrays; shapes and dtype are the network's."""
        return bool(self.rows.layers)

    def trim(self, n: int) -> None:
        """Forget the last `n` tokens.

        Raises:
            ValueError: `n` is negative or more than there are.
        """
        if not 0 <= n <= self.position:
            raise ValueError(f"cannot trim {n} of {self.position} tokens")
        self.rows.positions[self.row] -= n

    @property
    def bytes_per_token(self) -> int:
        """What one token takes; 0 in a cache that was never written, whose dtype is not known yet."""
        arrays = [array for layer in self.rows.layers for array in layer]
        return sum(array.nbytes // (array.shape[0] * array.shape[2]) for array in arrays)

    def copy(self, n: int) -> Layers:
        """The first `n` tokens of each layer, keys and values [1, G, n, W]; see `Cache`."""
        if not 1 <= n <= self.position:
            raise ValueError(f"cannot copy {n} of {self.position} tokens")
        with memory_errors("keeping a text's beginning", "Lower memory.prefix_cache_megabytes."):
            return _own([(k[..., :n, :], v[..., :n, :]) for k, v in self.rows.row(self.row)])

    def paste(self, copied: Layers, n: int) -> None:
        """Begin anew with the first `n` tokens of a copy; see `Cache`."""
        held = copied[0][0].shape[2]
        if not 1 <= n <= held:
            raise ValueError(f"the copy has {held} tokens, not {n}")
        # A slice is another array, so the copy stays as it is.
        self.take([(k[..., :n, :], v[..., :n, :]) for k, v in copied], n)

    def check_room(self, n: int) -> None:
        """Refuse `n` more tokens where they do not fit.

        Raises:
            ValueError: they exceed `max_tokens`; with the numbers.
        """
        if self.position + n > self._max_tokens:
            raise ValueError(f"the cache holds {self.position} of {self._max_tokens} tokens; {n} do not fit")

    def part(self) -> None:
        """Have arrays of its own."""
        if self.rows.count > 1:
            self.take(_own(self.rows.row(self.row)), self.position)

    def take(self, layers: Layers, position: int) -> None:
        """Hold these arrays [1, G, S, W] and nothing else."""
        self.rows, self.row = Rows(layers, [position], [self]), 0


def together(caches: Sequence[MlxCache], most_idle_steps: int) -> Rows:
    """Arrays whose rows these caches are; they are laid together anew where that is due.

    Args:
        caches: all written.
        most_idle_steps: for how many steps in succession a row that is not asked for is computed along.
    """
    rows = caches[0].rows
    shared = all(cache.rows is rows for cache in caches)
    if not shared or not rows.suits([cache.row for cache in caches], most_idle_steps):
        _lay_together(caches)
    return caches[0].rows


def _lay_together(caches: Sequence[MlxCache]) -> None:
    """Copy all of them into one set of arrays; whoever shared theirs until now stays with none of them."""
    staying = {owner for cache in caches for owner in cache.rows.owners if owner is not None}
    for owner in staying.difference(caches):
        # Else its row would keep the others' alive.
        owner.part()
    capacity = max(cache.rows.capacity for cache in caches)
    runs = _runs(caches)
    layers = [
        tuple(
            mx.concatenate(
                [_resized(rows.layers[layer][part][first:end], capacity) for rows, first, end in runs]
            )
            for part in (0, 1)
        )
        for layer in range(len(caches[0].rows.layers))
    ]
    rows = Rows([(k, v) for k, v in layers], [cache.position for cache in caches], caches)
    for index, cache in enumerate(caches):
        cache.rows, cache.row = rows, index


def _runs(caches: Sequence[MlxCache]) -> list[tuple[Rows, int, int]]:
    """Rows that lie one behind another already are copied at once: (arrays, first, end)."""
    runs: list[tuple[Rows, int, int]] = []
    for cache in caches:
        if runs and runs[-1][0] is cache.rows and runs[-1][2] == cache.row:
            runs[-1] = (cache.rows, runs[-1][1], cache.row + 1)
        else:
            runs.append((cache.rows, cache.row, cache.row + 1))
    return runs


def _own(layers: Layers) -> Layers:
    """Copies. A slice alone would keep the whole array alive."""
    copied = [(mx.contiguous(k), mx.contiguous(v)) for k, v in layers]
    mx.eval(copied)
    return copied


def _resized(array: mx.array, capacity: int) -> mx.array:
    kept = array[..., :capacity, :]
    missing = capacity - kept.shape[2]
    return mx.pad(kept, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else kept
