"""Decoding steps replayed as CUDA graphs, recorded when first needed.

Contract: `GraphedSteps.logits` gives a short step's logits, `run` what series of launches make of them, or
None where it cannot: then the caller goes the plain way. Sequences of a batch share a step. Graphs belong to
one set of weights; another one (an adapter) starts anew. They serve every cache, and share the memory of what
they compute on the way, for one of them runs at a time. Must not know how a step goes, nor what follows it.

A step of a small model is bound by launching its kernels: 21 ms for a 0.5B model on an H100 whose weights
are read in 0.3 ms. A graph is one launch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from draftloop.backends.torch.cuda.shapes import Reading, Shape, reading_shape, shape_of
from draftloop.backends.torch.native.library import SWITCH

if TYPE_CHECKING:
    from draftloop.backends.torch.cuda.step import Step
    from draftloop.backends.torch.decoder import Decoder, TorchCache
    from draftloop.backends.torch.weights import Weights

_WARM_UPS = 1
"""Runs before recording: they compile kernels and let libraries allocate what they keep."""
_MOST_GRAPHS = 256
"""Kept at a time, some three times what a server's usual rounds need; the oldest makes room."""

_LOG = logging.getLogger(__name__)


def records_steps(device: torch.device) -> bool:
    """Whether steps are recorded at all: not without a GPU, or Triton."""
    return device.type == "cuda" and os.environ.get(SWITCH) != "0" and find_spec("triton") is not None


def graphed_steps(decoder: Decoder, max_tokens: int) -> GraphedSteps | None:
    """Graphs for `decoder` over caches of `max_tokens`; None where none are recorded."""
    if not records_steps(decoder.weights.final_norm.device):
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
class Part:
    """What one graph holds; `key` names everything that is fixed in it."""

    key: Hashable
    body: Body


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
        self._weights: Weights | None = None
        self._graphs: dict[Hashable, _Recorded] = {}
        self._refused: set[Hashable] = set()
        self._moved = False
        self._stream: torch.cuda.Stream | None = None
        """All are recorded on one: memory that they share belongs to a stream too."""

    def shape_for(self, readings: Sequence[Reading]) -> Shape | None:
        """What is recorded for them; None where they are too many, or one has no room for its tokens."""
        caches = ((one.cache, one.num_tokens) for one in readings)
        fits = all(
            cache.max_tokens <= self._max_tokens and cache.position + count <= cache.max_tokens
            for cache, count in caches
        )
        return shape_of([one.count for one in readings]) if fits else None

    def logits(self, readings: Sequence[Reading], tokens: torch.Tensor) -> torch.Tensor | None:
        """Read `tokens` [T] of all sequences, one behind another: [T, V] float32, good until the next run.

        None: too many tokens, or this device could not record the step; nothing was read then.
        """
        shape = self.shape_for(readings)
        if shape is None:
            return None
        part = Part(("logits", shape), lambda step, _: (step.logits(shape),))
        found = self.run((part,), readings, tokens, inputs=())
        return None if found is None else found[0][: len(tokens)]

    def read(self, cache: TorchCache, tokens: torch.Tensor) -> bool:
        """Read `tokens` [T], at most `MAX_ROWS`; False where that is not recorded: nothing was read then."""
        readings = [Reading(cache, len(tokens))]
        if self.shape_for(readings) is None:
            return False
        shape = reading_shape(len(tokens))

        def body(step: Step, _: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            step.read(shape)
            return ()

        return self.run((Part(("read", shape), body),), readings, tokens, inputs=()) is not None

    def wait(self) -> None:
        """Until the device has done what was run."""
        torch.cuda.current_stream().synchronize()

    def run(
        self,
        parts: Sequence[Part],
        readings: Sequence[Reading],
        tokens: torch.Tensor,
        *,
        inputs: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...] | None:
        """Run `parts` one after another behind what the caches hold, the first on `tokens`.

        Args:
            parts: their bodies may read what was placed, and their inputs, and must not wait for the device.
                One that stands there twice is recorded once.
            readings: what all parts append to the caches of this decoder; `shape_for` has to take them.
            tokens: [T], placed before the first part.
            inputs: of each part; as in every run with its key, but for their values.

        Returns:
            What the last part gives, good until the next run. None where this device could not record a part;
            nothing was read then.
        """
        if self._weights is not self._decoder.weights:
            self._graphs.clear()
            self._weights = self._decoder.weights
        self._step.place(readings, tokens)
        series = [self._ready(part, inputs) for part in parts]
        if self._moved:
            self._step.place(readings, tokens)
            self._moved = False
        known = [recorded for recorded in series if recorded is not None]
        if len(known) < len(series):
            return None
        for recorded in known:
            for place, value in zip(recorded.inputs, inputs, strict=True):
                place.copy_(value, non_blocking=True)
            recorded.graph.replay()
        for one in readings:
            one.cache.advance(one.num_tokens)
        return known[-1].outputs

    def _ready(self, part: Part, inputs: tuple[torch.Tensor, ...]) -> _Recorded | None:
        """The graph of `part`, recorded where it was not yet; None where it could not be, now or before."""
        if part.key in self._refused:
            return None
        return self._graphs.get(part.key) or self._record(part, inputs)

    def _record(self, part: Part, inputs: tuple[torch.Tensor, ...]) -> _Recorded | None:
        """The graph of `part`; None where it could not be recorded, which is not tried again."""
        while len(self._graphs) >= _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        # Warming up moves the step on.
        self._moved = True
        try:
            self._graphs[part.key] = self._recorded(part.body, tuple(value.clone() for value in inputs))
        except torch.OutOfMemoryError:
            raise
        except (
            Exception
        ) as error:  # compilers and drivers fail in many ways, and the plain pass is always there
            _LOG.warning("decoding without a CUDA graph: %s: %s", type(error).__name__, error)
            self._refused.add(part.key)
        return self._graphs.get(part.key)

    def _recorded(self, body: Body, inputs: tuple[torch.Tensor, ...]) -> _Recorded:
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step.rewind()
                body(self._step, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph, others = torch.cuda.CUDAGraph(), next(iter(self._graphs.values()), None)
        pool = None if others is None else others.graph.pool()
        # Another thread may train on this device meanwhile; its calls are no part of the graph.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            outputs = body(self._step, inputs)
        return _Recorded(graph, inputs, outputs)
