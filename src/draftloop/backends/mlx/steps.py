"""One mlx-lm network in a round: tokens of several sequences in, what is decided by their logits out.

Contract: one forward for all sequences of a step; everything here is lazy, nothing is brought to the host. A
step is a pure function of tokens, numbers and the caches' arrays. Compiled, Python builds its graph once for
each kind, number of rows, width and capacity; else anew each time. Both compute the same. Must not know
requests or policy, nor what is decided.

mlx-lm's own cache keeps its length in a Python number, which a trace would take for a constant, and has one
length for all sequences. Attention therefore sees `_Layer` instead: the lengths are an array, and all of the
arrays is read, with what lies behind each length masked away. Sequences of fewer tokens are padded on the
right: nobody sees what that writes.

Letters: n sequences, R rows of the arrays they lie in (at least n), T tokens of the widest, V vocabulary,
S capacity of the arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from draftloop.backends.mlx.cache import together
from draftloop.backends.mlx.parts import Part
from draftloop.backends.mlx.replay import head_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.mlx.cache import Layers, MlxCache, Rows
    from draftloop.backends.mlx.head import CutHead
    from draftloop.backends.mlx.parts import Decide

MOST_TRACED_TOKENS = 96
"""A wider step is a backlog or a prompt, whose width does not come again."""
MOST_TRACES = 64
"""Beyond so many the one that was not used for longest is forgotten: a trace of 24 layers takes 2.4 MB."""
MOST_IDLE_STEPS = 32
"""Whom a step leaves out may be asked for soon again (drafts are not made for everybody in every round, and
where memory is short a round is taken in parts): for so many steps his row is computed along."""


class Steps:
    """What one network does in a round.

    Args:
        architecture: its shapes.
        network: mlx-lm's module; it may change only together with a call of `forget`.
        cut: the head where only some tokens are drafted; None is the network's own.
        compiled: whether graphs are traced and reused.
    """

    def __init__(
        self, architecture: Architecture, network: Any, cut: CutHead | None, *, compiled: bool
    ) -> None:
        self._architecture = architecture
        self._network = network
        self._cut = cut
        self._compiled = compiled
        self._traced: dict[Hashable, Any] = {}

    def forget(self) -> None:
        """Trace anew: a trace holds the weights that it was made with."""
        self._traced.clear()

    def read(self, cache: MlxCache, tokens: mx.array) -> None:
        """Append tokens [T] without looking at the logits: the head is never computed."""
        self._hidden_alone(cache, tokens[None])

    def logits(self, cache: MlxCache, tokens: mx.array) -> mx.array:
        """Append tokens [T] int32: logits [T, V] in the model's own dtype; -inf where the head is cut."""
        part = Part("logits", lambda logits: [logits], [], 1, tokens.size)
        return self.verify([cache], tokens[None], [tokens.size], [part])[0][0][0]

    def verify(
        self, caches: Sequence[MlxCache], tokens: mx.array, widths: Sequence[int], parts: Sequence[Part]
    ) -> list[list[mx.array]]:
        """Append tokens and decide by all their rows.

        Args:
            caches: n of them, in the order of the parts.
            tokens: [n, T] int32, padded on the right.
            widths: how many of them are each sequence's own.
            parts: what is decided.

        Returns:
            The outputs of each part.

        Raises:
            ValueError: a cache has no room; nothing was read.
        """
        return self._run(caches, tokens, widths, parts, last=False)

    def draft(
        self, caches: Sequence[MlxCache], tokens: mx.array, widths: Sequence[int], parts: Sequence[Part]
    ) -> list[list[mx.array]]:
        """Append tokens and decide by the last row of each sequence, [n, 1, V] or the columns of a cut head.

        See `verify`. A width of 0 appends nothing; what is decided there means nothing.
        """
        return self._run(caches, tokens, widths, parts, last=True)

    def _run(
        self,
        caches: Sequence[MlxCache],
        tokens: mx.array,
        widths: Sequence[int],
        parts: Sequence[Part],
        *,
        last: bool,
    ) -> list[list[mx.array]]:
        for cache, width in zip(caches, widths, strict=True):
            cache.check_room(width)
        if len(caches) == 1 and not self._traceable(caches[0], tokens.shape[1]):
            hidden = self._hidden_alone(caches[0], tokens)
            logits = self._logits(hidden[:, -1:] if last else hidden, columns=last)
            return [part.decide(logits, *part.inputs) for part in parts]
        for cache in caches:
            self._make_written(cache)
        rows = together(caches, MOST_IDLE_STEPS)
        width = tokens.shape[1]
        rows.make_room(width)
        # With one part for all rows, the forward and what follows from it are one trace.
        whole = parts[0] if len(parts) == 1 and len(caches) == rows.count else None
        # A draft's logits are made for all rows, so that a trace does not depend on how many are asked for.
        # Of the target's there are too many for that.
        seen = rows.count if last else len(caches)
        key = (None if whole is None else whole.kind, last, seen, rows.count, width, rows.capacity)
        step = self._trace(key, width, self._step(None if whole is None else whole.decide, last=last))
        outputs, rows.layers = step(
            rows.layers,
            _where(rows, caches, widths, seen),
            tokens if rows.count == 1 else tokens[_places(caches, rows.count)],
            [] if whole is None else whole.inputs,
        )
        for cache, own in zip(caches, widths, strict=True):
            rows.positions[cache.row] += own
        return [outputs] if whole is not None else self._decided(outputs[0], parts)

    def _decided(self, logits: mx.array, parts: Sequence[Part]) -> list[list[mx.array]]:
        """Logits, n sequences first, → the outputs of each part."""
        outputs, first = [], 0
        for part in parts:
            own = logits[first : first + part.count, : part.rows]
            outputs.append(self._trace((part.kind, *own.shape), part.rows, part.decide)(own, *part.inputs))
            first += part.count
        return outputs

    def _step(self, decide: Decide | None, *, last: bool) -> Callable[..., Any]:
        """The whole step as a function of arrays; its outputs are the logits where nothing is decided yet.

        Tokens [R, T] are in the order of the rows, logits and what is decided in that of the caches.
        """

        def step(
            arrays: Layers, where: list[mx.array], tokens: mx.array, inputs: list[mx.array]
        ) -> tuple[list[mx.array], Layers]:
            positions, order, ends = where
            seen = positions[:, None] + mx.arange(tokens.shape[1])
            layers = [_Layer(keys, values, positions, seen) for keys, values in arrays]
            hidden = self._hidden(layers, tokens)
            if len(positions) == 1:
                hidden = hidden[:, -1:] if last else hidden
            else:
                hidden = hidden[order, ends][:, None] if last else hidden[order]
            logits = self._logits(hidden, columns=last)
            outputs = [logits] if decide is None else decide(logits, *inputs)
            return outputs, [(layer.keys, layer.values) for layer in layers]

        return step

    def _trace(self, key: Hashable, width: int, function: Callable[..., Any]) -> Any:
        """The function, compiled where that is worth it."""
        if not self._compiled or width > MOST_TRACED_TOKENS:
            return function
        # The dictionary is in the order of use.
        traced = self._traced.pop(key, None) or mx.compile(function)
        self._traced[key] = traced
        if len(self._traced) > MOST_TRACES:
            del self._traced[next(iter(self._traced))]
        return traced

    def _traceable(self, cache: MlxCache, width: int) -> bool:
        return self._compiled and cache.written and width <= MOST_TRACED_TOKENS

    def _make_written(self, cache: MlxCache) -> None:
        """Let the network make the arrays, whose shapes and dtype it alone knows."""
        if not cache.written:
            self.read(cache, mx.array([0]))
            cache.trim(1)

    def _hidden_alone(self, cache: MlxCache, tokens: mx.array) -> mx.array:
        """[1, T] → [1, T, D], by mlx-lm's own cache objects, which read no more than there is."""
        cache.check_room(tokens.size)
        cache.part()
        cache.rows.make_room(tokens.size)
        layers = make_prompt_cache(self._network)
        for layer, (keys, values) in zip(layers, cache.rows.layers, strict=False):
            layer.keys, layer.values, layer.offset = keys, values, cache.position
        hidden = self._hidden(layers, tokens)
        cache.take([(layer.keys, layer.values) for layer in layers], layers[0].offset)
        return hidden

    def _hidden(self, layers: Sequence[Any], tokens: mx.array) -> mx.array:
        """[R, T] → [R, T, D]. An id past the vocabulary (the other model's padding) reads as the last row."""
        inside = mx.minimum(tokens, self._architecture.vocab_size - 1)
        return cast("mx.array", self._network.model(inside, cache=layers))

    def _logits(self, hidden: mx.array, *, columns: bool) -> mx.array:
        """[…, D] → […, V], -inf where the head is cut, or its columns alone."""
        if self._cut is None:
            return head_of(self._network, self._architecture)(hidden)
        logits = self._cut.logits(hidden)
        return logits if columns else self._cut.spread(logits, -mx.inf)


class _Layer:
    """One layer's cache within a step, with what mlx-lm's attention asks of a cache.

    Args:
        keys, values: [R, G, S, W].
        offset: how many tokens each row holds, [R].
        places: where the step's tokens are written, [R, T].
    """

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array, places: mx.array) -> None:
        self.keys = keys
        self.values = values
        self.offset = offset
        self._places = places

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [R, G, T, W] behind what is held; everything is returned, the unused places too."""
        self.keys, self.values = self._written(self.keys, keys), self._written(self.values, values)
        return self.keys, self.values

    def make_mask(self, n: int, **_: Any) -> mx.array:  # noqa: ARG002
        """[R, 1, T, S] of bool: each token sees what its row held, those before it, and itself."""
        return (mx.arange(self.keys.shape[2]) <= self._places[..., None])[:, None]

    def _written(self, held: mx.array, new: mx.array) -> mx.array:
        if len(held) == 1:
            return mx.slice_update(held, new, self.offset, axes=[2])
        return mx.put_along_axis(
            held, mx.broadcast_to(self._places[:, None, :, None], new.shape), new, axis=2
        )


def _where(rows: Rows, caches: Sequence[MlxCache], widths: Sequence[int], count: int) -> list[mx.array]:
    """How many tokens each row holds, [R]; which rows are looked at, and the last new token of each, [count]:
    the caches' and behind them, where there are more, others.
    """
    asked = [cache.row for cache in caches]
    order = asked + [row for row in range(rows.count) if row not in asked]
    ends = [max(0, own - 1) for own in widths] + [0] * (rows.count - len(asked))
    return [ids(rows.positions), ids(order[:count]), ids(ends[:count])]


def _places(caches: Sequence[MlxCache], count: int) -> mx.array:
    """Whose tokens each row reads, [R]; a row that nobody asked for reads the first one's."""
    places = np.zeros(count, np.int32)
    places[[cache.row for cache in caches]] = np.arange(len(caches))
    return mx.array(places)


def ids(tokens: Sequence[int]) -> mx.array:
    """[T] int32."""
    return mx.array(np.asarray(tokens, np.int32))
