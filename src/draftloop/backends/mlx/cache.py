"""`MlxCache`: mlx-lm's KV cache of one sequence, kept in sizes that compiled steps can count on.

Contract: mlx-lm's own cache objects hold the arrays, so whatever mlx-lm does with a cache it can do with this
one. Their capacity is always a multiple of `STEP_TOKENS`: a compiled step is traced once for each. Must not
know networks.

Letters: G key and value heads, W their width, S capacity in tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, trim_prompt_cache

from draftloop.backends.mlx.memory import memory_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

STEP_TOKENS = KVCache.step


class MlxCache:
    """One entry a layer; it grows by `STEP_TOKENS` at a time.

    Args:
        layers: as mlx-lm makes them, empty.
        max_tokens: the most it may hold.
    """

    def __init__(self, layers: list[Any], max_tokens: int) -> None:
        self.layers = layers
        self._max_tokens = max_tokens

    @property
    def position(self) -> int:
        """How many tokens the cache holds."""
        return int(self.layers[0].offset)

    @property
    def max_tokens(self) -> int:
        """How many tokens it can hold."""
        return self._max_tokens

    def trim(self, n: int) -> None:
        """Forget the last `n` tokens.

        Raises:
            ValueError: `n` is negative or more than there are.
        """
        if not 0 <= n <= self.position:
            raise ValueError(f"cannot trim {n} of {self.position} tokens")
        trim_prompt_cache(self.layers, n)

    @property
    def bytes_per_token(self) -> int:
        """What one token takes; 0 in a cache that was never written, whose dtype is not known yet."""
        arrays = [
            array for layer in self.layers if layer.keys is not None for array in (layer.keys, layer.values)
        ]
        return sum(array.nbytes // array.shape[2] for array in arrays)

    def copy(self, n: int) -> list[tuple[mx.array, mx.array]]:
        """The first `n` tokens of each layer, keys and values [1, G, n, W]; see `Cache`."""
        if not 1 <= n <= self.position:
            raise ValueError(f"cannot copy {n} of {self.position} tokens")
        with memory_errors("keeping a text's beginning", "Lower memory.prefix_cache_megabytes."):
            # A slice alone would keep the whole array alive.
            copied = [
                (mx.contiguous(layer.keys[..., :n, :]), mx.contiguous(layer.values[..., :n, :]))
                for layer in self.layers
            ]
            mx.eval(copied)
        return copied

    def paste(self, copied: list[tuple[mx.array, mx.array]], n: int) -> None:
        """Begin anew with the first `n` tokens of a copy; see `Cache`."""
        held = copied[0][0].shape[2]
        if not 1 <= n <= held:
            raise ValueError(f"the copy has {held} tokens, not {n}")
        # mlx-lm writes into its arrays; a slice is another array, so the copy stays as it is.
        for layer, (keys, values) in zip(self.layers, copied, strict=True):
            layer.keys, layer.values, layer.offset = keys[..., :n, :], values[..., :n, :], n

    def make_room(self, n: int) -> None:
        """Have a place for `n` more tokens, where the arrays exist already.

        Raises:
            ValueError: they exceed `max_tokens`; with the numbers.
        """
        wanted = self.position + n
        if wanted > self._max_tokens:
            raise ValueError(f"the cache holds {self.position} of {self._max_tokens} tokens; {n} do not fit")
        capacity = -(-wanted // STEP_TOKENS) * STEP_TOKENS
        for layer in self.layers:
            if layer.keys is not None and (layer.keys.shape[2] < wanted or layer.keys.shape[2] % STEP_TOKENS):
                layer.keys, layer.values = (_resized(a, capacity) for a in (layer.keys, layer.values))

    def hold(self, arrays: Sequence[tuple[mx.array, mx.array]], n: int) -> None:
        """Take the arrays [1, G, S, W] that a step has written `n` more tokens into."""
        for layer, (keys, values) in zip(self.layers, arrays, strict=True):
            layer.keys, layer.values, layer.offset = keys, values, layer.offset + n


def _resized(array: mx.array, capacity: int) -> mx.array:
    kept = array[..., :capacity, :]
    return mx.pad(kept, [(0, 0), (0, 0), (0, capacity - kept.shape[2]), (0, 0)])
