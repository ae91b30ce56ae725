"""`MlxModel`: one mlx-lm model behind the seam of `backends/base.py`.

Contract: a round has one forward for each draft step and one of the target, for all sequences of a batch.
`propose` builds a lazy graph and brings nothing to the host, but where a processor has to be told each token;
`verify` brings one array, which is the round's one wait for the device. Prompts are read one after
another, for their pieces fill the device already. Must not know how a model is found or loaded.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from draftloop.backends.mlx.adapter import Adapters
from draftloop.backends.mlx.cache import MlxCache
from draftloop.backends.mlx.drafting import propose
from draftloop.backends.mlx.head import CutHead
from draftloop.backends.mlx.memory import memory_errors
from draftloop.backends.mlx.replay import replay
from draftloop.backends.mlx.steps import Steps, ids
from draftloop.backends.mlx.verifying import verify

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.base import Cache, PrefillJob, Proposal, ProposeJob, VerifyJob
    from draftloop.backends.lora import AdapterForm, Lora
    from draftloop.backends.training import Example
    from draftloop.backends.vocabulary import CutVocabulary
    from draftloop.types import Verdict

    Floats = NDArray[np.float32]


class MlxModel:
    """One loaded model.

    Args:
        architecture: its shapes.
        network: mlx-lm's module: (tokens [B, T], cache) → logits [B, T, V].
        device: where to run.
        max_kv_cache_tokens: cap of each cache.
        vocabulary: what the head is cut to; None leaves it whole.
        compiled: whether the steps of a round are traced once and reused.
    """

    def __init__(
        self,
        architecture: Architecture,
        network: Any,
        device: mx.Device,
        max_kv_cache_tokens: int,
        vocabulary: CutVocabulary | None = None,
        *,
        compiled: bool,
    ) -> None:
        self._architecture = architecture
        self._network = network
        self._device = device
        self._max_kv_cache_tokens = max_kv_cache_tokens
        self._adapters = Adapters(architecture, network)
        self._cut: CutHead | None = None
        if vocabulary is not None:
            with self._running("cutting the draft's head"):
                self._cut = CutHead(network, architecture, vocabulary)
        self._steps = Steps(architecture, network, self._cut, compiled=compiled)

    @property
    def architecture(self) -> Architecture:
        """Its shapes."""
        return self._architecture

    @property
    def vocabulary(self) -> CutVocabulary | None:
        """What its head is cut to."""
        return None if self._cut is None else self._cut.vocabulary

    @property
    def weight_bytes(self) -> int:
        """Bytes its weights occupy, packed where they are, and those of its adapter and of a cut head."""
        return self._adapters.num_bytes + (0 if self._cut is None else self._cut.num_bytes)

    def new_cache(self) -> MlxCache:
        """An empty cache."""
        return MlxCache(self._max_kv_cache_tokens)

    def prefill(self, batch: Sequence[PrefillJob]) -> None:
        """Append tokens to each job's cache. The output head is never computed: nobody asks for it."""
        with self._running("answering"):
            caches = [cast("MlxCache", job.cache) for job in batch]
            for cache, job in zip(caches, batch, strict=True):
                self._steps.read(cache, ids(job.tokens))
            mx.eval([cache.rows.layers for cache in caches])

    def propose(self, batch: Sequence[ProposeJob]) -> list[Proposal]:
        """Draft K tokens for each job: tokens [K] int32 and, unless greedy, q [K, V], both still lazy."""
        with self._running("answering"):
            return propose(self._steps, self._cut, self._architecture.vocab_size, batch)

    def verify(self, batch: Sequence[VerifyJob]) -> list[Verdict]:
        """Test each job's proposal; one evaluation and one transfer for the whole batch."""
        with self._running("answering"):
            return verify(self._steps, self._architecture.vocab_size, batch)

    def logits(self, cache: Cache, tokens: Sequence[int]) -> Floats:
        """Append tokens [T] and return their logits [T, V]."""
        with self._running("answering"):
            logits = self._steps.logits(cast("MlxCache", cache), ids(tokens))
            return np.array(logits.astype(mx.float32))

    @property
    def adapter_forms(self) -> tuple[AdapterForm, ...]:
        """Every form where the checkpoint is quantized; beside its modules and dense where it is not."""
        return self._adapters.forms

    def set_adapter(self, lora: Lora | None, form: AdapterForm) -> None:
        """Deploy an adapter, or take it away; see `Adapters.wear` for what it raises."""
        with self._running("deploying an adapter"):
            self._adapters.wear(lora, form)
            self._steps.forget()

    def replay(self, batch: Sequence[Example]) -> list[Floats]:
        """Alpha at each response row of each example, [R]."""
        with self._running("measuring the draft"):
            return [replay(self._network, self._architecture, example, self._cut) for example in batch]

    @contextmanager
    def _running(self, what: str) -> Iterator[None]:
        remedy = "Lower models.target.max_kv_cache_tokens, or choose smaller models."
        with memory_errors(what, remedy), mx.stream(self._device):
            yield
