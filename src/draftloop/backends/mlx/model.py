"""`MlxModel`: one mlx-lm model behind the seam of `backends/base.py`.

Contract: `propose` builds a lazy graph and brings nothing to the host; `verify` brings one array. Every
sequence is computed alone, so a batch is a loop. Must not know how a model is found or loaded.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from draftloop.backends.base import Proposal
from draftloop.backends.mlx.acceptance import accept, draw, mask, top_tokens, warp
from draftloop.backends.mlx.adapter import Adapters
from draftloop.backends.mlx.head import CutHead
from draftloop.backends.mlx.memory import memory_errors
from draftloop.backends.mlx.replay import replay
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


class MlxCache:
    """mlx-lm's KV cache of one sequence, one entry a layer; it grows by 256 tokens at a time."""

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

    def check_room(self, n: int) -> None:
        """Refuse `n` more tokens where they exceed `max_tokens`.

        Raises:
            ValueError: with the numbers.
        """
        if self.position + n > self._max_tokens:
            raise ValueError(f"the cache holds {self.position} of {self._max_tokens} tokens; {n} do not fit")


class MlxModel:
    """One loaded model.

    Args:
        architecture: its shapes.
        network: mlx-lm's module: (tokens [B, T], cache) → logits [B, T, V].
        device: where to run.
        max_kv_cache_tokens: cap of each cache.
        vocabulary: what the head is cut to; None leaves it whole.
    """

    def __init__(
        self,
        architecture: Architecture,
        network: Any,
        device: mx.Device,
        max_kv_cache_tokens: int,
        vocabulary: CutVocabulary | None = None,
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
                self._forward(job.cache, _ids(job.tokens))
            mx.eval([layer.state for job in batch for layer in cast("MlxCache", job.cache).layers])

    def propose(self, batch: Sequence[ProposeJob]) -> list[Proposal]:
        """Draft K tokens for each job: tokens [K] int32 and, unless greedy, q [K, V], both still lazy."""
        with self._running("answering"):
            return [self._propose(job) for job in batch]

    def verify(self, batch: Sequence[VerifyJob]) -> list[Verdict]:
        """Test each job's proposal; one evaluation and one transfer for the whole batch."""
        with self._running("answering"):
            parts = [self._decide(job) for job in batch]
            packed = np.array(mx.concatenate([array for part in parts for array in part]))
        verdicts = []
        for job, part in zip(batch, parts, strict=True):
            sizes = [array.size for array in part]
            mine, packed = packed[: sum(sizes)], packed[sum(sizes) :]
            verdicts.append(_verdict(np.split(mine, np.cumsum(sizes)[:-1]), job.proposal.num_tokens))
        return verdicts

    def logits(self, cache: Cache, tokens: Sequence[int]) -> Floats:
        """Append tokens [T] and return their logits [T, V]."""
        with self._running("answering"):
            return np.array(self._spread(self._forward(cache, _ids(tokens)), -mx.inf).astype(mx.float32))

    @property
    def adapter_forms(self) -> tuple[AdapterForm, ...]:
        """Every form where the checkpoint is quantized; beside its modules and dense where it is not."""
        return self._adapters.forms

    def set_adapter(self, lora: Lora | None, form: AdapterForm) -> None:
        """Deploy an adapter, or take it away; see `Adapters.wear` for what it raises."""
        with self._running("deploying an adapter"):
            self._adapters.wear(lora, form)

    def replay(self, batch: Sequence[Example]) -> list[Floats]:
        """Alpha at each response row of each example, [R]."""
        with self._running("measuring the draft"):
            return [replay(self._network, self._architecture, example, self._cut) for example in batch]

    @contextmanager
    def _running(self, what: str) -> Iterator[None]:
        remedy = "Lower models.target.max_kv_cache_tokens, or choose smaller models."
        with memory_errors(what, remedy), mx.stream(self._device):
            yield

    def _forward(self, cache: Cache, tokens: mx.array) -> mx.array:
        """Append tokens [T] int32 to a cache: the head's logits [T, V or n], in the model's own dtype.

        An id past the vocabulary (the other model's padding) reads as the last row.
        """
        own = cast("MlxCache", cache)
        own.check_room(tokens.size)
        inside = mx.minimum(tokens, self._architecture.vocab_size - 1)
        if self._cut is not None:
            return self._cut.logits(self._network.model(inside[None], cache=own.layers)[0])
        logits: mx.array = self._network(inside[None], cache=own.layers)[0]
        return logits

    def _spread(self, rows: mx.array, elsewhere: float) -> mx.array:
        """Columns of a cut head -> columns that are token ids; of a whole one as they are."""
        return rows if self._cut is None else self._cut.spread(rows, elsewhere)

    def _propose(self, job: ProposeJob) -> Proposal:
        cut, uniforms = self._cut, mx.array(job.uniforms)
        rules = job.rules if cut is None else cut.vocabulary.rules(job.rules)
        coming = _ids(job.unread)
        tokens, rows = [], []
        for i in range(job.num_draft_tokens):
            logits = self._forward(job.cache, coming)[-1:]
            scores = mask(logits, rules.masked_ids, rules.masked_rows - i)
            if rules.sampling.greedy:
                token = scores[0].argmax()
            else:
                rows.append(warp(scores, rules.sampling))
                token = draw(rows[-1][0], uniforms[i])
            coming = (token if cut is None else cut.token_ids(token)).astype(mx.int32)[None]
            # The device starts on this step while the host builds the next one.
            mx.async_eval(coming)  # type: ignore[no-untyped-call]
            tokens.append(coming)
        q = self._spread(mx.concatenate(rows), 0.0) if rows else None
        return Proposal(tokens=mx.concatenate(tokens), q=q, num_tokens=job.num_draft_tokens)

    def _decide(self, job: VerifyJob) -> list[mx.array]:
        """One job's verdict as flat float32 arrays, lazy; `_verdict` reads them in the same order.

        Ids travel as float32 too, which is exact below 2^24.
        """
        rules, proposal = job.rules, job.proposal
        tokens = proposal.tokens
        if not isinstance(tokens, mx.array):
            tokens = _ids(tokens)
        logits = self._spread(self._forward(job.cache, mx.concatenate([_ids([job.last]), tokens])), -mx.inf)
        p = warp(mask(logits, rules.masked_ids, rules.masked_rows), rules.sampling)
        decision = accept(p, proposal.q, tokens, mx.array(job.accept_uniforms), mx.array(job.extra_uniforms))
        part = [
            decision.accepted_tokens,
            decision.extra_token,
            tokens,
            decision.alphas,
            decision.draft_probs,
            *(top_tokens(logits) if job.trace else ()),
        ]
        return [array.astype(mx.float32).reshape(-1) for array in part]


def _ids(tokens: Sequence[int]) -> mx.array:
    return mx.array(np.asarray(tokens, np.int32))


def _verdict(part: Sequence[Floats], k: int) -> Verdict:
    """Read what `_decide` packed, on the host."""
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
