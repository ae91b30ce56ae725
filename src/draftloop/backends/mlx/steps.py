"""The steps of a round on one mlx-lm network, as graphs that are traced once and then reused.

Contract: everything here is lazy; nothing is brought to the host. A step is a pure function of tokens,
numbers and the cache's arrays. Compiled, Python builds its graph once for each kind, width and capacity of
the cache; else mlx-lm builds it anew each time. Both compute the same. Must not know requests or policy.

What makes whole steps compilable: mlx-lm's own cache keeps its length in a Python number, which a trace would
take for a constant. Within a trace attention therefore sees `_Layer` instead: the length is an array, and all
of the arrays is read, with what lies behind the length masked away.

Letters: T tokens of the step, K draft tokens, V vocabulary, S capacity of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from draftloop.backends.biases import target_biases
from draftloop.backends.mlx.acceptance import (
    Stages,
    accept,
    bar,
    barred_tokens,
    draw,
    numbers_of,
    top_tokens,
    warp,
)
from draftloop.backends.mlx.replay import head_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.base import VerifyJob
    from draftloop.backends.mlx.cache import MlxCache
    from draftloop.backends.mlx.head import CutHead
    from draftloop.types import Rules

    Function = Callable[..., list[mx.array]]

MOST_TRACED_TOKENS = 96
"""A wider step is a backlog or a prompt, whose width does not come again."""
MOST_TRACES = 256
"""Beyond so many all of them are forgotten."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides which operations a step consists of.

    Attributes:
        name: `logits`, `draft` or `verify`.
        stages: the warping's.
        masked: whether some rows have barred tokens.
        biased: whether something is added to each row.
        point_mass: whether the drafts come without q.
        trace: whether the top tokens are wanted.
    """

    name: str
    stages: Stages | None = None
    masked: bool = False
    biased: bool = False
    point_mass: bool = False
    trace: bool = False


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
        self._traced: dict[tuple[Kind, int, int], Any] = {}

    def forget(self) -> None:
        """Trace anew: a trace holds the weights that it was made with."""
        self._traced.clear()

    def read(self, cache: MlxCache, tokens: mx.array) -> None:
        """Append tokens [T] without looking at the logits: the head is never computed."""
        cache.make_room(tokens.size)
        self._hidden(cache.layers, tokens)

    def logits(self, cache: MlxCache, tokens: mx.array) -> mx.array:
        """Append tokens [T] int32: logits [T, V] in the model's own dtype."""
        return self._run(Kind("logits"), cache, tokens.size, [tokens])[0]

    def draft(
        self,
        cache: MlxCache,
        tokens: mx.array,
        rules: Rules,
        *,
        row: int,
        uniform: mx.array,
        bias: NDArray[np.float32] | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """Append tokens [T] and draw the one behind them.

        Args:
            cache: the draft's.
            tokens: [T] int32.
            rules: warping and masks.
            row: how many of the rules' rows went before.
            uniform: scalar in [0, 1).
            bias: [V], added to the row of the token that is drawn.

        Returns:
            The token, [1] int32, and its distribution [1, V]; None where that is a point mass.
        """
        cut, width = self._cut, self._architecture.vocab_size
        if cut is not None:
            rules, width = cut.vocabulary.rules(rules), len(cut.vocabulary.ids)
        barred = barred_tokens(rules.masked_ids, width) if rules.masked_rows > row else None
        inputs = [tokens, numbers_of(rules.sampling), uniform]
        kind = Kind("draft", Stages.of(rules.sampling), masked=barred is not None, biased=bias is not None)
        if bias is not None:
            inputs.append(mx.array(bias if cut is None else bias[cut.vocabulary.ids]))
        inputs += [] if barred is None else [barred]
        token, *distribution = self._run(kind, cache, tokens.size, inputs)
        return token, distribution[0] if distribution else None

    def verify(self, cache: MlxCache, job: VerifyJob) -> mx.array:
        """Append the last token and K drafts, and decide: all of the verdict in one flat float32 array.

        Ids travel as float32 too, which is exact below 2^24.
        """
        rules, proposal = job.rules, job.proposal
        tokens = proposal.tokens if isinstance(proposal.tokens, mx.array) else ids(proposal.tokens)
        width = self._architecture.vocab_size
        barred = barred_tokens(rules.masked_ids, width) if rules.masked_rows > 0 else None
        kind = Kind(
            "verify",
            Stages.of(rules.sampling),
            masked=barred is not None,
            biased=rules.processor is not None,
            point_mass=proposal.q is None,
            trace=job.trace,
        )
        inputs = [
            mx.concatenate([ids([job.last]), tokens]),
            numbers_of(rules.sampling),
            mx.array(job.accept_uniforms),
            mx.array(job.extra_uniforms),
        ]
        if rules.processor is not None:
            drafted = np.array(tokens).tolist()
            inputs.append(mx.array(target_biases(rules.processor, drafted, width)))
        inputs += [] if barred is None else [barred, mx.array(rules.masked_rows)]
        inputs += [] if proposal.q is None else [proposal.q]
        return self._run(kind, cache, proposal.num_tokens + 1, inputs)[0]

    def _run(self, kind: Kind, cache: MlxCache, width: int, inputs: list[mx.array]) -> list[mx.array]:
        cache.make_room(width)
        first = cache.layers[0]
        if not self._compiled or first.keys is None or width > MOST_TRACED_TOKENS:
            return self._function(kind)(cache.layers, *inputs)
        key = (kind, width, first.keys.shape[2])
        if key not in self._traced:
            if len(self._traced) >= MOST_TRACES:
                self._traced.clear()
            self._traced[key] = _traced(self._function(kind))
        arrays = [(layer.keys, layer.values) for layer in cache.layers]
        outputs, arrays = self._traced[key](arrays, mx.array(cache.position), inputs)
        cache.hold(arrays, width)
        return cast("list[mx.array]", outputs)

    def _function(self, kind: Kind) -> Function:
        """(layers, inputs) → outputs."""
        if kind.name == "draft":
            return self._draft_function(kind)
        if kind.name == "verify":
            return self._verify_function(kind)
        return lambda layers, tokens: [self._forward(layers, tokens)]

    def _draft_function(self, kind: Kind) -> Function:
        stages = cast("Stages", kind.stages)

        def draft(
            layers: list[Any], tokens: mx.array, numbers: mx.array, uniform: mx.array, *rest: mx.array
        ) -> list[mx.array]:
            # The head is a good part of a small draft: the last row alone is wanted.
            scores = self._head(self._hidden(layers, tokens)[-1:]).astype(mx.float32)
            if kind.biased:
                scores = scores + rest[0]
            if kind.masked:
                scores = bar(scores, rest[-1], 1)
            q = None if stages.greedy else warp(scores, stages, numbers)
            token = scores[0].argmax() if q is None else draw(q[0], uniform)
            if self._cut is not None:
                token, q = self._cut.token_ids(token), None if q is None else self._cut.spread(q, 0.0)
            return [token.astype(mx.int32)[None], *([] if q is None else [q])]

        return draft

    def _verify_function(self, kind: Kind) -> Function:
        stages = cast("Stages", kind.stages)

        def verify(
            layers: list[Any],
            text: mx.array,
            numbers: mx.array,
            accept_uniforms: mx.array,
            extra_uniforms: mx.array,
            *rest: mx.array,
        ) -> list[mx.array]:
            # The last token was emitted before; the others are tested.
            logits, tokens = self._forward(layers, text), text[1:]
            scores = logits.astype(mx.float32)
            if kind.biased:
                scores, rest = scores + rest[0], rest[1:]
            if kind.masked:
                scores = bar(scores, rest[0], rest[1])
            q = None if kind.point_mass else rest[-1]
            decision = accept(warp(scores, stages, numbers), q, tokens, accept_uniforms, extra_uniforms)
            parts = [
                decision.accepted_tokens,
                decision.extra_token,
                tokens,
                decision.alphas,
                decision.draft_probs,
                *(top_tokens(logits) if kind.trace else ()),
            ]
            return [mx.concatenate([part.astype(mx.float32).reshape(-1) for part in parts])]

        return verify

    def _forward(self, layers: Sequence[Any], tokens: mx.array) -> mx.array:
        """Logits [T, V] in the model's own dtype; -inf where the head is cut."""
        logits = self._head(self._hidden(layers, tokens))
        return logits if self._cut is None else self._cut.spread(logits, -mx.inf)

    def _head(self, hidden: mx.array) -> mx.array:
        """[T, D] -> [T, V], or the columns of a cut head."""
        if self._cut is not None:
            return self._cut.logits(hidden)
        return head_of(self._network, self._architecture)(hidden)

    def _hidden(self, layers: Sequence[Any], tokens: mx.array) -> mx.array:
        """[T, D]. An id past the vocabulary (the other model's padding) reads as the last row."""
        inside = mx.minimum(tokens, self._architecture.vocab_size - 1)
        return cast("mx.array", self._network.model(inside[None], cache=layers)[0])


class _Layer:
    """One layer's cache within a trace, with what mlx-lm's attention asks of a cache.

    Args:
        keys, values: [1, G, S, W].
        offset: how many tokens they hold, a scalar.
    """

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        self.keys = keys
        self.values = values
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [1, G, T, W] behind what is held; everything is returned, the unused places too."""
        self.keys = mx.slice_update(self.keys, keys, self.offset, axes=[2])
        self.values = mx.slice_update(self.values, values, self.offset, axes=[2])
        return self.keys, self.values

    def make_mask(self, n: int, **_: Any) -> mx.array:
        """[T, S] of bool: each row sees what was held, the rows before it, and itself."""
        rows = self.offset + mx.arange(n)
        return mx.arange(self.keys.shape[2])[None] <= rows[:, None]


def ids(tokens: Sequence[int]) -> mx.array:
    """[T] int32."""
    return mx.array(np.asarray(tokens, np.int32))


def _traced(function: Function) -> Any:
    """(arrays of the layers, position, inputs) → (outputs, new arrays), compiled."""

    def step(
        arrays: list[tuple[mx.array, mx.array]], position: mx.array, inputs: list[mx.array]
    ) -> tuple[list[mx.array], list[tuple[mx.array, mx.array]]]:
        layers = [_Layer(keys, values, position) for keys, values in arrays]
        outputs = function(layers, *inputs)
        return outputs, [(layer.keys, layer.values) for layer in layers]

    return mx.compile(step)
