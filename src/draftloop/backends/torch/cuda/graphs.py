"""Decoding steps replayed as CUDA graphs, one for each number of rows, recorded when first needed.

Contract: `GraphedSteps.logits` gives a short step's logits, or None where it cannot: then the caller takes
the plain forward pass. Graphs belong to one set of weights; another one (an adapter) starts anew. They
serve every cache. Must not know how a step goes.

A step of a small model is bound by launching its kernels: 21 ms for a 0.5B model on an H100 whose weights
are read in 0.3 ms. A graph is one launch.
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from draftloop.backends.torch.native.library import SWITCH

if TYPE_CHECKING:
    from draftloop.backends.torch.cuda.step import Step
    from draftloop.backends.torch.decoder import Decoder, TorchCache
    from draftloop.backends.torch.weights import Weights

_WARM_UPS = 2
"""Runs before recording: they compile kernels and let libraries allocate what they keep."""

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


class GraphedSteps:
    """The recorded steps of one decoder."""

    def __init__(self, decoder: Decoder, step: Step, max_tokens: int) -> None:
        self._decoder = decoder
        self._step = step
        self._max_tokens = max_tokens
        self._max_rows = len(step.tokens)
        self._weights: Weights | None = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._failed = False

    def logits(self, cache: TorchCache, tokens: torch.Tensor) -> torch.Tensor | None:
        """Read `tokens` [T] into `cache`: [T, V] float32, good until the next step of as many rows.

        None: too many tokens, or this device could not record the step; nothing was read then.

        Raises:
            ValueError: they do not fit the cache.
        """
        rows = len(tokens)
        fits = cache.max_tokens <= self._max_tokens and cache.position + rows <= cache.max_tokens
        if self._failed or rows > self._max_rows or not fits:
            return None
        if self._weights is not self._decoder.weights:
            self._graphs.clear()
            self._weights = self._decoder.weights
        self._step.place(cache, tokens)
        if rows not in self._graphs and not self._record(rows):
            return None
        graph, logits = self._graphs[rows]
        graph.replay()
        cache.advance(rows)
        return logits

    def _record(self, rows: int) -> bool:
        """Whether the step of `rows` tokens could be recorded."""
        try:
            self._graphs[rows] = self._recorded(rows)
        except torch.OutOfMemoryError:
            raise
        except (
            Exception
        ) as error:  # compilers and drivers fail in many ways, and the plain pass is always there
            _LOG.warning("decoding without CUDA graphs: %s: %s", type(error).__name__, error)
            self._graphs.clear()
            self._failed = True
        return not self._failed

    def _recorded(self, rows: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step.logits(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread may train on this device meanwhile; its calls are no part of the graph.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            logits = self._step.logits(rows)
        return graph, logits
