"""Decoding steps replayed as CUDA graphs, recorded when first needed.

Contract: `GraphedSteps.logits` gives a short step's logits, `run` what a series of launches makes of them, or
None where it cannot: then the caller goes the plain way. Graphs belong to one set of weights; another one (an
adapter) starts anew. They serve every cache. Must not know how a step goes, nor what follows it.

A step of a small model is bound by launching its kernels: 21 ms for a 0.5B model on an H100 whose weights
are read in 0.3 ms. A graph is one launch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from draftloop.backends.torch.native.library import SWITCH

if TYPE_CHECKING:
    from draftloop.backends.torch.cuda.step import Step
    from draftloop.backends.torch.decoder import Decoder, TorchCache
    from draftloop.backends.torch.weights import Weights

_WARM_UPS = 1
"""Runs before recording: they compile kernels and let libraries allocate what they keep."""
_MOST_GRAPHS = 64
"""Kept at a time. Each keeps the memory of what it computes; the oldest makes room."""

_LOG = logging.getLogger(__name__)


def graphed_steps(decoder: Decoder, max_tokens: int) -> GraphedSteps | None:
    """Graphs for `decoder` over caches of `max_tokens`; None where there is no GPU or no Triton."""
    on_gpu = decoder.weights.final_norm.device.type == "cuda"
    if not on_gpu or os.environ.get(SWITCH) == "0" or find_spec("triton") is None:
        return None
    try:
        from draftloop.backends.torch.cuda.step import Step
    except ImportError as error:
        _LOG.warning("Triton cannot be imported, so steps run kernel by kernel: %s", error)
        return None
    return GraphedSteps(decoder, Step(decoder, max_tokens), max_tokens)


Body = Callable[["Step", tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
"""Launches a step, and what follows it, on inputs that stay where they are: what a graph records."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph, the places of its inputs, and what it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


class GraphedSteps:
    """The recorded steps of one decoder."""

    def __init__(self, decoder: Decoder, step: Step, max_tokens: int) -> None:
        self._decoder = decoder
        self._step = step
        self._max_tokens = max_tokens
        self._max_rows = len(step.tokens)
        self._weights: Weights | None = None
        self._graphs: dict[Hashable, _Recorded] = {}
        self._refused: set[Hashable] = set()

    def logits(self, cache: TorchCache, tokens: torch.Tensor) -> torch.Tensor | None:
        """Read `tokens` [T] into `cache`: [T, V] float32, good until the next step of as many rows.

        None: too many tokens, or this device could not record the step; nothing was read then.
        """
        rows = len(tokens)
        found = self.run(
            "logits", lambda step, _: (step.logits(rows),), cache, tokens, inputs=(), num_read=rows
        )
        return None if found is None else found[0]

    def run(
        self,
        key: Hashable,
        body: Body,
        cache: TorchCache,
        tokens: torch.Tensor,
        *,
        inputs: tuple[torch.Tensor, ...],
        num_read: int,
    ) -> tuple[torch.Tensor, ...] | None:
        """Run `body` behind what `cache` holds; its results are good until it runs again.

        Args:
            key: of everything in `body` but the number of `tokens`.
            body: may read the tokens that were placed, and its inputs, and must not wait for the device.
            cache: of this decoder.
            tokens: [T], placed before.
            inputs: as in every run with this key, but for their values.
            num_read: tokens that `body` appends to the cache.

        Returns:
            None where there are too many tokens, or this device could not record it; nothing was read then.
        """
        key = (key, len(tokens))
        fits = cache.max_tokens <= self._max_tokens and cache.position + num_read <= cache.max_tokens
        if key in self._refused or len(tokens) > self._max_rows or not fits:
            return None
        if self._weights is not self._decoder.weights:
            self._graphs.clear()
            self._weights = self._decoder.weights
        self._step.place(cache, tokens)
        recorded = self._graphs.get(key)
        if recorded is None:
            recorded = self._record(key, body, inputs)
            if recorded is None:
                return None
            # Warming up has moved on.
            self._step.place(cache, tokens)
        for place, value in zip(recorded.inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        recorded.graph.replay()
        cache.advance(num_read)
        return recorded.outputs

    def _record(self, key: Hashable, body: Body, inputs: tuple[torch.Tensor, ...]) -> _Recorded | None:
        """The graph of `body`; None where it could not be recorded, which is not tried again."""
        while len(self._graphs) >= _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        try:
            self._graphs[key] = self._recorded(body, tuple(value.clone() for value in inputs))
        except torch.OutOfMemoryError:
            raise
        except (
            Exception
        ) as error:  # compilers and drivers fail in many ways, and the plain pass is always there
            _LOG.warning("decoding without a CUDA graph: %s: %s", type(error).__name__, error)
            self._refused.add(key)
        return self._graphs.get(key)

    def _recorded(self, body: Body, inputs: tuple[torch.Tensor, ...]) -> _Recorded:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step.rewind()
                body(self._step, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread may train on this device meanwhile; its calls are no part of the graph.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = body(self._step, inputs)
        return _Recorded(graph, inputs, outputs)
