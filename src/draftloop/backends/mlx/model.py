"""`MlxModel`: one mlx-lm model behind the seam of `backends/base.py`.

Contract: `propose` builds a lazy graph and brings nothing to the host, but where a processor has to be told
each drafted token; `verify` brings one array, which is the round's one wait for the device. Every sequence is
computed alone, so a batch is a loop. Must not know how a model is found or loaded.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from draftloop.backends.base import NO_PROPOSAL, Proposal
from draftloop.backends.biases import draft_bias
from draftloop.backends.mlx.adapter import Adapters
from draftloop.backends.mlx.cache import MlxCache
from draftloop.backends.mlx.head import CutHead
from draftloop.backends.mlx.memory import memory_errors
from draftloop.backends.mlx.replay import replay
from draftloop.backends.mlx.steps import Steps, ids
from draftloop.types import TRACE_TOP_TOKENS, Trace, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.base import Cache, PrefillJob, ProposeJob, VerifyJob
    from draftloop.backends.lora import AdapterForm, Lora
    from draftloop.backends.training import Example
    from draftloop.backends.vocabulary import CutVocabulary

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
        return MlxCache(make_prompt_cache(self._network), self._max_kv_cache_tokens)

    def prefill(self, batch: Sequence[PrefillJob]) -> None:
        """Append tokens to each job's cache. The output head is never computed: nobody asks for it."""
        with self._running("answering"):
            for job in batch:
                self._steps.read(cast("MlxCache", job.cache), ids(job.tokens))
            mx.eval([layer.state for job in batch for layer in cast("MlxCache", job.cache).layers])

    def propose(self, batch: Sequence[ProposeJob]) -> list[Proposal]:
        """Draft K tokens for each job: tokens [K] int32 and, unless greedy, q [K, V], both still lazy."""
        with self._running("answering"):
            return [self._propose(job) for job in batch]

    def verify(self, batch: Sequence[VerifyJob]) -> list[Verdict]:
        """Test each job's proposal; one evaluation and one transfer for the whole batch."""
        with self._running("answering"):
            decided = [self._steps.verify(cast("MlxCache", job.cache), job) for job in batch]
            packed = np.array(mx.concatenate(decided))
        verdicts = []
        for job in batch:
            sizes = self._verdict_sizes(job)
            mine, packed = packed[: sum(sizes)], packed[sum(sizes) :]
            verdicts.append(_verdict(np.split(mine, np.cumsum(sizes)[:-1]), job.proposal.num_tokens))
        return verdicts

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

    def _propose(self, job: ProposeJob) -> Proposal:
        cache, uniforms = cast("MlxCache", job.cache), mx.array(job.uniforms)
        coming, kept = ids(job.unread), None if self._cut is None else self._cut.vocabulary.ids
        tokens: list[mx.array] = []
        rows: list[mx.array] = []
        for i in range(job.num_draft_tokens):
            bias = None
            if job.rules.processor is not None:
                drafted = [int(np.array(token)[0]) for token in tokens]
                bias = draft_bias(job.rules, drafted, self._architecture.vocab_size, kept)
                if bias is None:
                    break
            coming, distribution = self._steps.draft(
                cache, coming, job.rules, row=i, uniform=uniforms[i], bias=bias
            )
            # The device starts on this step while the host builds the next one, and then the verification.
            mx.async_eval(coming)  # type: ignore[no-untyped-call]
            tokens.append(coming)
            rows += [] if distribution is None else [distribution]
        if not tokens:
            return NO_PROPOSAL
        q = mx.concatenate(rows) if rows else None
        return Proposal(tokens=mx.concatenate(tokens), q=q, num_tokens=len(tokens))

    def _verdict_sizes(self, job: VerifyJob) -> list[int]:
        """How long each part of a packed verdict is: `Steps.verify` packs them in this order."""
        k = job.proposal.num_tokens
        rows, columns = k + 1, min(TRACE_TOP_TOKENS, self._architecture.vocab_size)
        return [1, 1, k, k, k, *((rows * columns, rows * columns, rows) if job.trace else ())]


def _verdict(part: Sequence[Floats], k: int) -> Verdict:
    """Read what `Steps.verify` packed, on the host."""
    accepted, extra, drafted, alphas, draft_probs, *top = part
    tokens = tuple(int(token) for token in drafted)
    kept = int(accepted[0])
    trace = _trace(top, tokens, draft_probs, kept + 1) if top else None
    tested = alphas[: min(kept + 1, k)]
    return Verdict(tokens, kept, int(extra[0]), tuple(float(alpha) for alpha in tested), trace)


def _trace(top: Sequence[Floats], tokens: tuple[int, ...], draft_probs: Floats, rows: int) -> Trace:
    """The first `rows` rows of the target's top tokens, beside what was proposed there."""
    ids, logprobs, tail_mass = top
    columns = ids.size // tail_mass.size
    missing = ((0, 0), (0, TRACE_TOP_TOKENS - columns))
    return Trace(
        top_ids=np.pad(ids.reshape(-1, columns)[:rows], missing, constant_values=-1).astype(np.int32),
        top_logprobs=np.pad(logprobs.reshape(-1, columns)[:rows], missing, constant_values=-np.inf),
        tail_mass=tail_mass[:rows].copy(),
        # The bonus row has no draft token: -1, with probability 0.
        draft_ids=np.array((*tokens, -1)[:rows], np.int32),
        draft_probs=np.append(draft_probs, np.float32(0))[:rows],
    )
